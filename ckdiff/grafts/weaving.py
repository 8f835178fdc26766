"""Parts put back into a fused tensor in which they lie strided: in its order, not in theirs.

Where a part's elements lie in the fused tensor is a box with strides. Seen in as many dimensions as
those strides ask for, each part is a box of the fused tensor, and its own elements have strides: so
whoever gathers pieces can gather the fused tensor from its parts, and their masks as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.pieces import Contents, Piece, packed_strides
from ckdiff.checkpoints.protocol import IntArray, SpanReader, TensorTable
from ckdiff.kernels.memory import U8, place
from ckdiff.stores.maskstore import MaskStore

NOTHING = -1  #: the source of a mask without ones


@dataclass(frozen=True, slots=True)
class Lying:
    """A part, and where it lies in the fused tensor."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def woven(
    elements: int, width: int, parts: Sequence[Lying]
) -> tuple[tuple[int, ...], list[list[Piece]]] | None:
    """The fused tensor's shape in as many dimensions as it takes, and of each part the boxes of it.

    ``width`` are bytes of an element. Each piece's ``source`` is the position of its part in
    ``parts``, ``begin`` is an element of that, and so are the strides. None where parts lie in a
    way that no such shape describes.
    """
    steps = {1, elements}
    for part in parts:
        for piece in part.pieces:
            steps.update(t for n, t in zip(piece.shape, piece.strides, strict=True) if n > 1)
    levels = sorted(steps, reverse=True)
    if any(wide % narrow for wide, narrow in pairwise(levels)):
        return None
    shape = tuple(wide // narrow for wide, narrow in pairwise(levels))
    found = []
    for at, part in enumerate(parts):
        boxes = [_box(at, part.shape, piece, width, shape) for piece in part.pieces]
        known = [box for box in boxes if box is not None]
        if len(known) < len(boxes):
            return None
        found.append(known)
    every = [box for boxes in found for box in boxes]
    return (shape, found) if _tile(every, elements) else None


def _tile(boxes: Sequence[Piece], elements: int) -> bool:
    """Whether boxes cover as many elements, each of them once."""
    if sum(prod(box.shape) for box in boxes) != elements:
        return False
    begins = np.array([box.at for box in boxes]).reshape(len(boxes), -1)
    ends = begins + np.array([box.shape for box in boxes]).reshape(len(boxes), -1)
    if len(boxes) < 2:
        return True
    # along one axis few are beside each other: only these are compared
    axis = max(range(begins.shape[1]), key=lambda i: len(np.unique(begins[:, i])))
    order = np.argsort(begins[:, axis], kind="stable")
    begins, ends = begins[order], ends[order]
    stops = np.searchsorted(begins[:, axis], ends[:, axis])
    return not any(
        ((begins[at] < ends[at + 1 : stop]) & (begins[at + 1 : stop] < ends[at])).all(axis=1).any()
        for at, stop in enumerate(stops.tolist())
    )


def _box(
    source: int, of: tuple[int, ...], piece: Piece, width: int, shape: tuple[int, ...]
) -> Piece | None:
    """A piece of a part as a box of the fused tensor."""
    steps, own = packed_strides(shape), packed_strides(of)
    first = piece.begin // width
    at = tuple(first // step % size for step, size in zip(steps, shape, strict=True))
    sizes, strides = [1] * len(shape), [0] * len(shape)
    for size, step, stride in zip(piece.shape, piece.strides, own, strict=True):
        if not size:
            return None
        level = steps.index(step) if size > 1 else -1
        while size > 1:
            if level < 0 or sizes[level] > 1:
                return None
            fits = at[level] + size <= shape[level]
            here = size if fits else shape[level]
            if not fits and (at[level] or size % here):
                return None
            sizes[level], strides[level] = here, stride
            size, stride, level = size // here, stride * here, level - 1
    begin = sum(a * s for a, s in zip(piece.at, own, strict=True))
    return Piece(source, begin, at, tuple(sizes), tuple(strides))


def contents(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    widths: Sequence[int],
    boxes: Sequence[Sequence[tuple[int, Piece]]],
) -> Contents:
    """What a PieceReader gathers: tensors of these shapes and bytes an element, from ``boxes``,
    each with the position of its source.
    """
    sizes = [prod(shape) * width for shape, width in zip(shapes, widths, strict=True)]
    pieces = {
        i: tuple(
            Piece(source, box.begin * width, box.at, box.shape, box.strides) for source, box in held
        )
        for i, (held, width) in enumerate(zip(boxes, widths, strict=True))
    }
    nowhere = np.full(len(shapes), -1)
    names = [str(i) for i in range(len(shapes))]
    table = TensorTable(names, list(dtypes), list(shapes), np.array(sizes, np.int64))
    return Contents(table, nowhere.astype(np.int32), nowhere.astype(np.int64), pieces=pieces)


class FlagReader:
    """A SpanReader of a store's masks, a byte for each element, by the names of ``names``."""

    def __init__(self, store: MaskStore, rule: str, names: Sequence[str]) -> None:
        self._store, self._rule, self._names = store, rule, names
        self._held: list[npt.NDArray[np.uint8]] = []

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader; elements stand for bytes. Raises StoreCorrupt."""
        addresses = np.zeros(len(tensors), np.int64)
        columns = zip(tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True)
        for i, (tensor, start, size) in enumerate(columns):
            flags = np.zeros(size, np.uint8) if tensor == NOTHING else self._of(tensor, start, size)
            self._held.append(flags)
            addresses[i] = place(flags, U8)
        return addresses

    def _of(self, tensor: int, start: int, size: int) -> npt.NDArray[np.uint8]:
        first = start // 8 * 8
        packed = self._store.packed(self._names[tensor], self._rule, start=first, stop=start + size)
        return np.unpackbits(packed, count=start + size - first, bitorder="little")[start - first :]

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""

    def release(self) -> None:
        """See SpanReader."""
        self._held.clear()

    close = release


def flag_reader(store: MaskStore, rule: str, names: Sequence[str], held: Contents) -> SpanReader:
    """A reader of fused tensors' masks, a byte for each element."""
    return PieceReader(FlagReader(store, rule, names), held)
