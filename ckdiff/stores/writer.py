"""Writing what a store holds besides masks: Zarr metadata, the tensor table, the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ckdiff._version import __version__
from ckdiff.errors import StoreError, printable
from ckdiff.layout import ALIGNMENT, Layout
from ckdiff.naming import natural_key
from ckdiff.outputs.placing import write_file
from ckdiff.stores import tablefile
from ckdiff.stores.manifest import TABLE, dump_json, seal
from ckdiff.stores.metadata import documents
from ckdiff.stores.schema import FORMAT, FORMAT_VERSION, needs_newer
from ckdiff.stores.sealed import fits
from ckdiff.stores.table import MaskTable


def require_text(content: Any) -> None:
    """Raise StoreError for a name in ``content`` (JSON values) that no store can record.

    A path that is no UTF-8 becomes text with half of a surrogate pair in it, which no file in
    UTF-8 can hold. It is said before the work, and not when it is done.
    """
    try:
        dump_json(content)
    except UnicodeEncodeError:
        name = next(text for text in _texts(content) if not _is_text(text))
        raise StoreError(
            f"a store cannot record {printable(name)}: it is not valid text (UTF-8)",
            hint="give it another name, or use a link that has one",
        ) from None


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        yield from (text for item in content.items() for text in _texts(item))
    elif isinstance(content, (list, tuple)):
        yield from (text for item in content for text in _texts(item))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_tables(
    root: Path,
    table: MaskTable,
    layout: Layout,
    *,
    masks: list[str],
    rules: list[str],
    objects: dict[str, tuple[int, str]],
    provenance: dict[str, Any],
    tied: Sequence[dict[str, Any]] = (),
) -> bytes:
    """Write the metadata and the tensor table below ``root``; gives the manifest's bytes.

    ``objects`` are the mask objects already there, key -> (size, digest); ``tied`` of a diff the
    unpaired tensors with the bits of another, ``name``, ``same_as`` and ``side``. The store is of
    the oldest format that can say all that. Raises StoreError for more tensors than a store that
    can be read again may have; OSError passes through.
    """
    said = provenance | {"tied": [*tied]}
    if "selection" in said and not table.resized:  # then it makes no difference
        said["selection"] = {k: v for k, v in said["selection"].items() if k != "common_rows"}
    version = FORMAT_VERSION if table.unlike or needs_newer(said) else 1
    if version == 1 or "made_by" in provenance:
        del said["tied"]
    metadata = documents(masks, layout.total // 8, version)
    everything = objects | _write_files(root, metadata, table, version)
    manifest = {
        "format": FORMAT,
        "format_version": version,
        "ckdiff_version": __version__,
        "rules": rules,
        "masks": masks,
        "elements": table.total_elements,
        "tensors": len(table),
        "changed": {rule: int(counts.sum()) for rule, counts in table.changed.items()},
        "layout": {"addresses": layout.total, "alignment": ALIGNMENT, "chunk": layout.chunk},
        **said,
        "objects": {key: list(everything[key]) for key in sorted(everything, key=natural_key)},
    }
    sealed = seal(manifest)
    if not fits(sealed):
        raise _too_many(table)
    return sealed


def _write_files(
    root: Path, metadata: dict[str, dict[str, Any]], table: MaskTable, version: int
) -> dict[str, tuple[int, str]]:
    """Write the Zarr metadata and the table; gives their sizes and digests."""
    written = {}
    for key, content in (metadata | {TABLE: table.to_json(version)}).items():
        data = dump_json(content)
        if key == TABLE and not tablefile.fits(data):
            raise _too_many(table)
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data, sync=False)
        written[key] = len(data), xxhash.xxh3_128_hexdigest(data)
    return written


def _too_many(table: MaskTable) -> StoreError:
    return StoreError(
        f"{len(table):,} tensors, and the list of those left out, are more than a store can record",
        hint="leave some of them out, with --exclude",
    )
