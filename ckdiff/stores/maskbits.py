"""The bits of a store against what its table says of them.

A count is written beside the bits, and whoever changes the one need not change the other. Whoever
reads a whole tensor, or a whole object, holds both against each other on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.stores.metadata import same_document
from ckdiff.stores.objects import INNER, OBJECT, check_absent, object_key, read_inners
from ckdiff.stores.table import MaskTable
from ckdiff.stores.verified import Identity, VerifiedObjects

IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_PIECE = 1 << 20  # bytes of mask that are counted at a time


@dataclass(slots=True, eq=False)
class MaskBits:
    """The masks of a store as its objects hold them. Shared by threads."""

    verified: VerifiedObjects
    table: MaskTable
    length: int  #: bytes of each rule's mask
    documents: dict[str, dict[str, Any]]  #: the ``zarr.json`` files as they must be, by their paths
    #: objects whose bits were held against the table; when two threads do it, both find the same
    _sound: dict[str, Identity] = field(default_factory=dict)

    def metadata(self, key: str) -> bytes:
        """A ``zarr.json`` of the store, which must say what we would write; raises StoreCorrupt."""
        raw = self.verified.read(key)
        if not same_document(raw, self.documents[key]):
            raise StoreCorrupt(
                f"{self.verified.shown(key)} is not what ckdiff writes: Zarr would see other bits",
                hint="make the store again",
            )
        return raw

    @property
    def chunks(self) -> int:
        """How many objects a mask has."""
        return -(-self.length // OBJECT)

    def read(self, rule: str, first: int, count: int) -> Bytes:
        """``count`` bytes of a rule's mask from byte ``first``; raises StoreCorrupt."""
        out = np.empty(count, np.uint8)
        at = 0
        while at < count:
            chunk, inside = divmod(first + at, OBJECT)
            size = min(count - at, OBJECT - inside)
            low, high = inside // INNER, -(-(inside + size) // INNER)
            key = object_key(rule, chunk)
            with self.verified.opened(key) as fd:
                part = read_inners(fd, self._size(key), self.verified.shown(key), low, high)
            out[at : at + size] = part[inside - low * INNER :][:size]
            at += size
        return out

    def tensor(self, rule: str, position: int, first: int, last: int) -> Bytes:
        """The bytes that hold the elements [first, last) of a tensor; ``first`` is in byte 0.

        The bits after ``last`` in the last byte are the tensor's own, or zero where it ends. A
        tensor that is read as a whole is held against its count. Raises StoreCorrupt.
        """
        table = self.table
        elements = int(table.elements[position])
        low = first // 8
        packed = self.read(rule, int(table.starts[position]) // 8 + low, -(-last // 8) - low)
        if last == elements and last % 8 and len(packed) and packed[-1] >> last % 8:
            where = printable(str(self.verified.root))
            raise _padded(f"the {rule} mask of {printable(table.names[position])} in {where}")
        if first == 0 and last == elements and ones(packed) != int(table.changed[rule][position]):
            raise self._miscounted(rule, position)
        return packed

    def check_object(self, rule: str, chunk: int) -> None:
        """Verify an object and every bit in it, once for as long as its file stays the same.

        For readers that decode it themselves. Tensors that go on in other objects are not counted.
        Raises StoreCorrupt.
        """
        key = object_key(rule, chunk)
        identity = self.verified.check_size(key)
        if self._sound.get(key) == identity:
            return
        counts = self.count(rule, chunk)
        table = self.table
        first, stop = 8 * OBJECT * chunk, 8 * OBJECT * (chunk + 1)
        inside = (table.starts >= first) & (table.starts + table.elements <= stop)
        wrong = np.flatnonzero(inside & (counts != table.changed[rule]) & (table.elements > 0))
        if wrong.size:
            raise self._miscounted(rule, int(wrong[0]))
        self._sound[key] = identity

    def check(self, rule: str, counts: IntArray) -> None:
        """Raise StoreCorrupt where the sums of ``count`` over all objects are not the table's."""
        wrong = np.flatnonzero(counts != self.table.changed[rule])
        if wrong.size:
            raise self._miscounted(rule, int(wrong[0]))

    def count(self, rule: str, chunk: int) -> IntArray:
        """The ones of each tensor in an object, all of which is decoded.

        Raises StoreCorrupt, for padding bits that are set as well.
        """
        table = self.table
        key = object_key(rule, chunk)
        where, size = self.verified.shown(key), min(OBJECT, self.length - chunk * OBJECT)
        inners = -(-size // INNER)
        bits = np.zeros(inners * INNER, np.uint8)
        first = chunk * OBJECT
        ends = table.starts + table.elements  # of tensors, in bits
        inside = (ends > 8 * first) & (ends <= 8 * (first + size)) & (ends % 8 > 0)
        last, keep = ends[inside] // 8 - first, (ends[inside] % 8).astype(np.uint8)
        among = np.searchsorted(last, np.arange(inners + 1) * INNER).tolist()
        with self.verified.opened(key) as fd:
            check_absent(fd, self._size(key), where, inners)
            for i in range(inners):  # small pieces: a chunk decodes to 8 MiB
                part = read_inners(fd, self._size(key), where, i, i + 1)
                here = slice(among[i], among[i + 1])
                if (part[last[here] - i * INNER] >> keep[here]).any():
                    raise _padded(where)
                bits[i * INNER : (i + 1) * INNER] = np.bitwise_count(part)
        sums = np.concatenate(([0], np.cumsum(bits, dtype=np.int64)))
        starts = np.clip(table.starts // 8 - first, 0, size)
        stops = np.clip(-(-ends // 8) - first, 0, size)
        counts: IntArray = sums[stops] - sums[starts]
        if int(sums[-1]) != int(counts.sum()):
            raise _padded(where)
        return counts

    def _size(self, key: str) -> int:
        return self.verified.objects[key][0]

    def _miscounted(self, rule: str, position: int) -> StoreCorrupt:
        return StoreCorrupt(
            f"the {rule} mask of {printable(self.table.names[position])} in "
            f"{printable(str(self.verified.root))} disagrees with its count",
            hint="ckdiff did not write it like this: make the store again",
        )


def _padded(what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{what} has padding bits that are set",
        hint="ckdiff did not write it like this: make the store again",
    )


def ones(packed: Bytes) -> int:
    """How many bits are set."""
    if len(packed) <= _PIECE:
        return int(np.bitwise_count(packed).sum())
    return sum(ones(packed[at : at + _PIECE]) for at in range(0, len(packed), _PIECE))
