"""Reading mask stores: nothing missing or damaged is ever taken for "unchanged".

Knows the store format and nothing of where the masks came from. Format: docs/store-format.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, UsageError, of_the_whole, printable
from ckdiff.options import checked_function, checked_int, checked_path, checked_text
from ckdiff.outputs.placing import MANIFEST
from ckdiff.rules import Rule
from ckdiff.stores import manifest as manifests
from ckdiff.stores.manifest import TABLE
from ckdiff.stores.maskbits import MaskBits
from ckdiff.stores.metadata import documents
from ckdiff.stores.objects import OBJECT, array_path, object_key, object_keys
from ckdiff.stores.shown import TableShown, not_whole, table_html
from ckdiff.stores.table import MaskTable, TensorRecord
from ckdiff.stores.tablefile import read_table
from ckdiff.stores.verified import VerifiedObjects

if TYPE_CHECKING:
    import zarr

    from ckdiff.stores.summaries import By
    from ckdiff.stores.zarrview import VerifiedStore

Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


def open_store(path: str | os.PathLike[str] | MaskStore) -> MaskStore:
    """Open a mask store. This verifies every value of the manifest, the tensor table and the Zarr
    metadata, and that every object exists with its size. Raises StoreIncomplete or StoreCorrupt.
    """
    if isinstance(path, MaskStore):
        return path
    store = MaskStore(Path(checked_path("the store", path)))
    _log.debug("opened %r", store)
    return store


class MaskStore(TableShown):
    """A finished store: which elements of each tensor changed, under each stored rule."""

    def __init__(self, path: Path) -> None:
        self.path = path  #: the directory
        self.manifest: dict[str, Any] = manifests.read_manifest(path)
        self._shown = printable(str(path))
        objects: dict[str, tuple[int, str]] = {
            key: (size, digest) for key, (size, digest) in self.manifest["objects"].items()
        }
        #: rules that were counted; the first are those that were asked for
        self.rules: tuple[str, ...] = tuple(self.manifest["rules"])
        #: rules whose masks are stored
        self.masks: tuple[str, ...] = tuple(self.manifest["masks"])
        self._verified = VerifiedObjects(path, objects)
        #: every file of the store but the manifest: key -> (size in bytes, digest); read-only
        self.objects: Mapping[str, tuple[int, str]] = MappingProxyType(objects)
        for key in objects:
            self._verified.check_size(key)
        self.tensors: Sequence[TensorRecord] = self._read_table()
        length = self.manifest["layout"]["addresses"] // 8
        written = documents(self.masks, length, self.manifest["format_version"])
        self._bits = MaskBits(self._verified, self.table, length, written)
        self._check_metadata()

    @property
    def table(self) -> MaskTable:
        """The tensors in columns."""
        assert isinstance(self.tensors, MaskTable)
        return self.tensors

    def mask(
        self,
        name: str,
        rule: str | Rule | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> npt.NDArray[np.bool_]:
        """The mask of a tensor: a bool array with the tensor's shape in the table, true where it
        changed.

        With ``start`` or ``stop``, only that range of the flattened elements, in one dimension. You
        may leave out ``rule`` if the store has ``exact`` or only one mask. A whole mask is compared
        with its count. Raises CkdiffError for an unknown name or rule, StoreCorrupt for damaged
        bytes.
        """
        position, record = self._record(name)
        first, last = self._range(record, start, stop)
        packed = self._bits.tensor(self._rule(rule), position, first, last)
        low = 8 * (first // 8)
        flat = np.unpackbits(packed, bitorder="little")[first - low : last - low].view(np.bool_)
        return flat.reshape(record.shape) if start is None and stop is None else flat

    def packed(
        self,
        name: str,
        rule: str | Rule | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> npt.NDArray[np.uint8]:
        """The mask of a tensor as ceil(elements / 8) bytes, little-endian bit order, padding 0.

        With ``start`` (a multiple of 8) or ``stop``, only that range of the flattened elements;
        bits past the range are 0. A whole mask is compared with its count. Raises CkdiffError for
        an unknown name or rule and for a start inside a byte, StoreCorrupt for damaged bytes.
        """
        position, record = self._record(name)
        first, last = self._range(record, start, stop)
        if first % 8:
            raise UsageError(f"start must be a multiple of 8, not {first}")
        packed = self._bits.tensor(self._rule(rule), position, first, last)
        if last % 8 and last > first:
            packed[-1] &= (1 << last % 8) - 1
        return packed

    def _range(self, record: TensorRecord, start: object, stop: object) -> tuple[int, int]:
        """[first, last) of a tensor's elements."""
        limits = [
            None if limit is None else checked_int(what, limit)
            for what, limit in (("start", start), ("stop", stop))
        ]
        first, last, _ = slice(*limits).indices(record.elements)
        return first, max(first, last)

    def array(self, rule: str | Rule | None = None) -> zarr.Array[Any]:
        """The flat mask of all tensors: a read-only zarr.Array of packed bytes (uint8).

        A chunk that is missing or damaged, or has other bits than the table counts, raises
        StoreCorrupt; it never reads as zeros.
        """
        with of_the_whole():
            import zarr

        path = array_path(self._rule(rule))
        return zarr.open_array(store=self._view(), path=path, mode="r", zarr_format=3)

    def dask(self, rule: str | Rule | None = None) -> Any:
        """``array(rule)`` as a dask array of uint8, one block for each stored object."""
        with of_the_whole():
            import dask.array

        array = self.array(rule)
        name = f"ckdiff-{self.manifest_digest()}-{self._rule(rule)}"
        return dask.array.from_array(array, chunks=(OBJECT,), name=name, inline_array=True)

    def summary(
        self, by: By = "layer", *, sort: str | None = None, top: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows of counts by ``tensor``, ``layer``, ``module``, ``dtype`` or ``model``.

        A row has ``group``, ``elements``, ``rules`` (for each counted rule ``changed`` and
        ``density``), and with statistics also ``statistics``. The row of a tensor has ``name``,
        ``dtype`` and ``shape`` instead of ``group``, and if the sides differ ``tuned_dtype`` and
        ``rows`` of both. ``sort`` names a column, largest first. ``top`` keeps that many rows, by
        default those with the highest density.
        """
        from ckdiff.stores.summaries import summarise

        if sort is not None:
            checked_text("sort", sort)
        if top is not None:
            top = checked_int("top", top)
        return summarise(self.table, by, sort=sort, top=top)

    def manifest_digest(self) -> str:
        """A digest of the whole store: two stores with the same content have the same."""
        return str(json.loads(manifests.seal(self.manifest))["digest"])

    def check(self, progress: Progress | None = None) -> int:
        """Verify every byte: each file against its digest, each count against its mask.

        Returns the store's size in bytes. ``progress`` is called with (bytes done, bytes in all).
        Raises StoreCorrupt, which names the first wrong file.
        """
        if progress is not None:
            checked_function("progress", progress)
        self._check_files()
        total = sum(size for size, _ in self.objects.values())
        # masks are read twice: as files, and decoded to be counted
        again = sum(
            self.objects[key][0]
            for rule in self.masks
            for key in object_keys(rule, self._bits.length)
        )
        done = 0

        def advance(key: str) -> None:
            nonlocal done
            done += self.objects[key][0]
            if progress is not None:
                progress(done, total + again)

        for key in self.objects:
            self._verified.verify(key)
            advance(key)
        for key in self._bits.documents:
            self._bits.metadata(key)
        for rule in self.masks:
            counts = np.zeros(len(self.table), np.int64)
            for chunk in range(self._bits.chunks):
                counts += self._bits.count(rule, chunk)
                advance(object_key(rule, chunk))
            self._bits.check(rule, counts)
        return total

    def __repr__(self) -> str:
        return f"<MaskStore {self._shown}: {len(self.tensors)} tensors, {', '.join(self.masks)}>"

    def _repr_html_(self) -> str:
        made = self.manifest.get("made_by")
        if made is not None:
            words = [f"Derived: {made.get('operation', '?')}.", *not_whole(self.table, 0)]
        else:
            base, tuned = (self.manifest[side]["label"] for side in ("base", "tuned"))
            unpaired = len(self.manifest["unpaired"])
            words = [f"{tuned} against {base}.", *not_whole(self.table, unpaired)]
        words.append(f"Masks of {', '.join(self.masks) or 'no rule'} are stored.")
        return table_html(self.table, self.path.name, words)

    # inside

    def _to_show(self) -> tuple[MaskTable, str]:
        return self.table, self.path.name.removesuffix(".zarr")

    def _check_files(self) -> None:
        present = {
            str(Path(folder, name).relative_to(self.path))
            for folder, _, names in os.walk(self.path)
            for name in names
        }
        strangers = sorted(present - self.objects.keys() - {MANIFEST})
        if strangers:
            raise StoreCorrupt(
                f"{self._shown} holds a file that its manifest does not know: "
                f"{printable(strangers[0])}",
                hint="remove it if nobody needs it",
            )

    def _record(self, name: str) -> tuple[int, TensorRecord]:
        position = self.table.find(checked_text("a tensor's name", name))
        return position, self.tensors[position]

    def _rule(self, rule: str | Rule | None) -> str:
        """Canonical text of a rule whose mask is stored."""
        if rule is None:
            if "exact" in self.masks:
                return "exact"
            if len(self.masks) == 1:
                return self.masks[0]
            raise UsageError(
                f"{self._shown} has several masks", hint=f"name one of {', '.join(self.masks)}"
            )
        text = str(Rule.parse(rule))
        if text not in self.masks:
            raise UsageError(
                f"{self._shown} has no mask for the rule {text}",
                hint=f"it has {', '.join(self.masks) or 'none'}",
            )
        return text

    def _view(self) -> VerifiedStore:
        from ckdiff.stores.zarrview import VerifiedStore

        # what was verified here says nothing about the files that another process sees
        again = partial(_view_again, os.path.abspath(self.path), self.manifest_digest())
        return VerifiedStore(self._bits, again)

    def _read_table(self) -> MaskTable:
        try:
            return read_table(self._verified.read(TABLE), self.manifest)
        except ValueError as error:
            raise StoreCorrupt(
                f"{self._shown}/{TABLE} makes no sense: {error}",
                hint="it was not written by ckdiff: make the store again",
            ) from None

    def _check_metadata(self) -> None:
        """Raise StoreCorrupt where a Zarr reader would be told of another array than ours.

        Damage is another matter: masks can be read without these files, and who needs them says so.
        """
        for key in self._bits.documents:
            try:
                self._verified.read(key)
            except StoreCorrupt:
                continue
            self._bits.metadata(key)


def _view_again(path: str, digest: str) -> VerifiedStore:
    """The Zarr view of a store in another process, which opens the store itself."""
    return _opened_again(path, digest)._view()


@lru_cache(maxsize=2)
def _opened_again(path: str, digest: str) -> MaskStore:
    # kept: every task of a Dask graph brings the view along
    store = MaskStore(Path(path))
    if store.manifest_digest() != digest:
        raise StoreCorrupt(f"{printable(path)} is a different store here than where it was opened")
    return store


def check_store(
    path: str | os.PathLike[str] | MaskStore, progress: Progress | None = None
) -> dict[str, Any]:
    """Verify every byte of a store; gives ``{"store", "bytes", "objects", "ok"}``.

    Raises StoreIncomplete or StoreCorrupt.
    """
    store = open_store(path)
    size = store.check(progress)
    return {
        "store": str(store.path),
        "objects": len(store.manifest["objects"]),
        "bytes": size,
        "ok": True,
    }
