"""Reading mask stores: nothing missing or damaged is ever taken for "unchanged".

Knows the store format and nothing of where the masks came from. Format: docs/store-format.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, UsageError, printable
from ckdiff.layout import CHUNK, Layout
from ckdiff.options import checked_function, checked_int, checked_path, checked_text
from ckdiff.rules import Rule
from ckdiff.stores import manifest as manifests
from ckdiff.stores.manifest import TABLE
from ckdiff.stores.table import MaskTable, TensorRecord
from ckdiff.stores.verified import VerifiedObjects
from ckdiff.writing.objects import INNER, OBJECT, read_inners
from ckdiff.writing.placing import MANIFEST

if TYPE_CHECKING:
    import zarr

    from ckdiff.summaries import By

Progress = Callable[[int, int], None]
#: what walking JSON of another shape than ours raises
_NONSENSE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def open_store(path: str | os.PathLike[str] | MaskStore) -> MaskStore:
    """Open a mask store: verifies the manifest, the tensor table, and that every object is there
    with its size. Raises StoreIncomplete or StoreCorrupt.
    """
    if isinstance(path, MaskStore):
        return path
    return MaskStore(Path(checked_path("the store", path)))


class MaskStore:
    """A finished store: which elements of each tensor changed, under each stored rule."""

    def __init__(self, path: Path) -> None:
        self.path = path  #: the directory
        self.manifest: dict[str, Any] = manifests.read_manifest(path)
        self._shown = printable(str(path))
        try:
            objects = {
                key: (int(size), str(digest))
                for key, (size, digest) in self.manifest["objects"].items()
            }
            #: rules that were counted; the first are those that were asked for
            self.rules: tuple[str, ...] = tuple(self.manifest["rules"])
            #: rules whose masks are stored
            self.masks: tuple[str, ...] = tuple(self.manifest["masks"])
            self._length = int(self.manifest["layout"]["addresses"]) // 8
        except _NONSENSE as error:
            raise StoreCorrupt(f"the manifest of {self._shown} makes no sense: {error}") from None
        self._verified = VerifiedObjects(path, objects)
        #: every file of the store but the manifest: key -> (size in bytes, digest); read-only
        self.objects: Mapping[str, tuple[int, str]] = MappingProxyType(objects)
        self._check_objects()
        self.tensors: Sequence[TensorRecord] = self._read_table()

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
        """The mask of a tensor: bool, with the tensor's shape.

        With ``start`` or ``stop`` only that range of its flattened elements, one-dimensional.
        ``rule`` may be left out where the store has ``exact`` or a single mask. Raises
        CkdiffError for an unknown name or rule, StoreCorrupt for damaged bytes.
        """
        record = self._record(name)
        first, last = self._range(record, start, stop)
        low = first // 8
        packed = self._read(self._rule(rule), record.start // 8 + low, -(-last // 8) - low)
        bits = np.unpackbits(packed, bitorder="little")[first - 8 * low : last - 8 * low]
        flat = bits.view(np.bool_)
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

        With ``start``, a multiple of 8, or ``stop`` only that range of its flattened elements; bits
        past the range are 0. Raises CkdiffError for an unknown name or rule and for a start inside
        a byte, StoreCorrupt for damaged bytes.
        """
        record = self._record(name)
        first, last = self._range(record, start, stop)
        if first % 8:
            raise UsageError(f"start must be a multiple of 8, not {first}")
        packed = self._read(
            self._rule(rule), record.start // 8 + first // 8, -(-last // 8) - first // 8
        )
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

        A chunk that is missing or damaged raises StoreCorrupt; it never reads as zeros.
        """
        import zarr

        from ckdiff.stores.zarrview import VerifiedStore

        view = VerifiedStore(self._verified)
        return zarr.open_array(store=view, path=f"masks/{self._rule(rule)}", mode="r")

    def dask(self, rule: str | Rule | None = None) -> Any:
        """``array(rule)`` as a dask array of uint8, one block for each stored object."""
        import dask.array

        array = self.array(rule)
        name = f"ckdiff-{self.manifest_digest()}-{self._rule(rule)}"
        return dask.array.from_array(array, chunks=(OBJECT,), name=name, inline_array=True)

    def summary(
        self, by: By = "layer", *, sort: str | None = None, top: int | None = None
    ) -> list[dict[str, Any]]:
        """Rows of counts by ``tensor``, ``layer``, ``module``, ``dtype`` or ``model``.

        Rows hold ``group`` (for tensors ``name``, ``dtype``, ``shape``), ``elements`` and
        ``rules``: for each counted rule ``changed`` and ``density``; with statistics also
        ``statistics``. ``sort`` names a column, largest first; ``top`` keeps that many rows, of
        the highest density where nothing else is asked for.
        """
        from ckdiff.summaries import summarise

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

        Gives the store's size in bytes. ``progress`` is called with (bytes done, bytes in all).
        Raises StoreCorrupt naming the first file that is wrong.
        """
        if progress is not None:
            checked_function("progress", progress)
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
                hint="remove it if it is not yours to keep",
            )
        total = sum(size for size, _ in self.objects.values())
        # masks are read twice: as files, and decoded to be counted
        chunks = [f"masks/{rule}/c/" for rule in self.masks]
        again = sum(
            size for key, (size, _) in self.objects.items() if key.startswith(tuple(chunks))
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
        for rule in self.masks:
            self._recount(rule, advance)
        return total

    def __repr__(self) -> str:
        return f"<MaskStore {self._shown}: {len(self.tensors)} tensors, {', '.join(self.masks)}>"

    # inside

    def _record(self, name: str) -> TensorRecord:
        return self.tensors[self.table.find(checked_text("a tensor's name", name))]

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

    def _read(self, rule: str, first: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes of the flat mask from byte ``first``, verified."""
        out = np.empty(count, np.uint8)
        at = 0
        while at < count:
            chunk, inside = divmod(first + at, OBJECT)
            size = min(count - at, OBJECT - inside)
            low, high = inside // INNER, -(-(inside + size) // INNER)
            key = f"masks/{rule}/c/{chunk}"
            self._verified.verify(key)
            part = self._inners(key, low, high)
            out[at : at + size] = part[inside - low * INNER :][:size]
            at += size
        return out

    def _inners(self, key: str, first: int, stop: int) -> npt.NDArray[np.uint8]:
        where = self._verified.shown(key)
        try:
            return read_inners(self.path / key, where, first, stop)
        except OSError as error:
            raise StoreCorrupt(f"cannot read {where}: {error.strerror}") from error

    def _check_objects(self) -> None:
        for key in self.objects:
            if any(part in ("", ".", "..") for part in key.split("/")):
                raise StoreCorrupt(f"the manifest of {self._shown} names {printable(key)!r}")
            self._verified.check_size(key)
        chunks = -(-self._length // OBJECT)
        for rule in self.masks:
            for chunk in range(chunks):
                if f"masks/{rule}/c/{chunk}" not in self.objects:
                    raise StoreCorrupt(f"the manifest of {self._shown} lacks chunk {chunk}")

    def _read_table(self) -> MaskTable:
        if TABLE not in self.objects:
            raise StoreCorrupt(f"the manifest of {self._shown} names no tensor table")
        self._verified.verify(TABLE)
        try:
            table = MaskTable.from_json(json.loads((self.path / TABLE).read_bytes()))
            layout = Layout(table.elements)
            sound = (
                set(table.changed) == set(self.rules) >= set(self.masks)
                and layout.total == 8 * self._length
                and np.array_equal(layout.starts, table.starts)
                and all(min(shape, default=0) >= 0 for shape in table.shapes)
                and [math.prod(shape) for shape in table.shapes] == table.elements.tolist()
            )
        except (OSError, *_NONSENSE) as error:
            raise StoreCorrupt(f"cannot read {self._shown}/{TABLE}: {error}") from None
        if not sound:
            raise StoreCorrupt(f"{self._shown}/{TABLE} contradicts itself or the manifest")
        return table

    def _recount(self, rule: str, done: Callable[[str], None]) -> None:
        """Hold the counts of the table against the bits; padding must be zero."""
        table = self.table
        counts = np.zeros(len(table), np.int64)
        total = 0
        for chunk in range(-(-self._length // OBJECT)):
            key = f"masks/{rule}/c/{chunk}"
            size = min(OBJECT, self._length - chunk * OBJECT)
            inners = -(-size // INNER)
            bits = np.zeros(inners * INNER, np.uint8)
            for i in range(inners):  # small pieces: a chunk decodes to 8 MiB
                part = self._inners(key, i, i + 1)
                bits[i * INNER : (i + 1) * INNER] = np.bitwise_count(part)
            sums = np.concatenate(([0], np.cumsum(bits, dtype=np.int64)))
            total += int(sums[-1])
            first = chunk * OBJECT
            starts = np.clip(table.starts // 8 - first, 0, size)
            stops = np.clip(-(-(table.starts + table.elements) // 8) - first, 0, size)
            counts += sums[stops] - sums[starts]
            done(key)
        wrong = np.flatnonzero(counts != table.changed[rule])
        if wrong.size:
            name = printable(table.names[int(wrong[0])])
            raise StoreCorrupt(
                f"the {rule} mask of {name} in {self._shown} disagrees with its count"
            )
        if total != int(counts.sum()):
            raise StoreCorrupt(f"the {rule} mask of {self._shown} has padding bits that are set")


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


assert CHUNK == 8 * OBJECT
