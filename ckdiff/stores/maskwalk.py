"""Walking the masks of matched stores: from a range of addresses to segments in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import SEG_GROUP, SEG_SIZE, SEGMENT_COLUMNS
from ckdiff.layout import ALIGNMENT, Layout, Spans
from ckdiff.stores.maskstream import MaskSource, MaskWindows
from ckdiff.stores.objects import INNER

IntArray = npt.NDArray[np.int64]

_WINDOWS = 2 << 20  # bytes of mask of all stores together: about what a core's own cache holds
_LARGEST = 8  # inner chunks of each store in a window
_ROUND = ALIGNMENT // 8


@dataclass(frozen=True, slots=True)
class MaskSpans:
    """What lies in a window: pieces of tensors, and where each store's bits of them are."""

    spans: Spans
    sizes: IntArray  #: bytes of mask, multiples of 64; bits past a tensor's end are zero
    places: IntArray  #: in ``memory``, (stores, spans)
    memory: npt.NDArray[np.uint8]

    def segments(self, rows: IntArray) -> IntArray:
        """The table that kernels walk, each span counted towards its row; neighbours are merged."""
        begins = np.ones(len(rows), bool)
        joined = (self.places[:, 1:] == self.places[:, :-1] + self.sizes[:-1]).all(0)
        begins[1:] = ~joined | (rows[1:] != rows[:-1])
        first = np.flatnonzero(begins)
        table = np.zeros((len(first), SEGMENT_COLUMNS + len(self.places)), np.int64)
        table[:, SEG_SIZE] = np.add.reduceat(self.sizes, first)
        table[:, SEG_GROUP] = rows[first]
        table[:, SEGMENT_COLUMNS:] = self.places[:, first].T
        return table


def window_inners(stores: int, largest: int = _LARGEST) -> int:
    """Inner chunks of each store that are decoded at a time; ``largest`` is the most of one."""
    return max(1, min(largest, _WINDOWS // (INNER * stores)))


def window_elements(stores: int, largest: int = _LARGEST) -> int:
    """Elements of the layout that a window has at most."""
    return window_inners(stores, largest) * INNER * 8


def working_memory(stores: int, largest: int = _LARGEST) -> int:
    """Bytes of anonymous memory that one walk needs."""
    room = window_inners(stores, largest) + 2
    return stores * room * INNER * 2 + (1 << 20)


def walk(
    layout: Layout, starts: IntArray, sources: list[MaskSource], first: int, stop: int,
    *, largest: int = _LARGEST, cut: Callable[[int, int], int] | None = None,
) -> Iterator[MaskSpans]:  # fmt: skip
    """The windows of the addresses [first, stop), in order.

    ``starts`` (stores x tensors) are the bytes of each store's flat mask at which the tensors of
    the layout begin. ``cut`` is given where a window begins and where it may end at the latest,
    and says where it ends: at a multiple of ALIGNMENT. What a window gives is gone when the next
    one is asked for. Raises StoreCorrupt.
    """
    inners = window_inners(len(sources), largest)
    with MaskWindows(sources, inners + 2) as windows:
        # Most stores have the same layout: then places are worked out once.
        known: dict[bytes, int] = {}
        which = [known.setdefault(row.tobytes(), len(known)) for row in starts]
        distinct = [starts[which.index(i)] for i in range(len(known))]
        ranges = _ranges(first, stop, inners * INNER * 8, cut)
        ranges.reverse()
        while ranges:
            low, high = ranges.pop()
            spans = layout.spans(low, high)
            if not len(spans):
                continue
            sizes = -(-spans.elements // ALIGNMENT) * _ROUND
            begins = [row[spans.tensors] + spans.starts // 8 for row in distinct]
            wanted = [_inners(begin, sizes, inners) for begin in begins]
            if max(map(len, wanted)) > windows.room:
                # Small tensors far from each other in some store: take fewer of them at a time.
                middle = (low + high) // 2 // ALIGNMENT * ALIGNMENT
                ranges += [(middle, high), (low, middle)]
                continue
            windows.load([wanted[i] for i in which])
            places = np.stack([windows.places(k, begins[i]) for k, i in enumerate(which)])
            yield MaskSpans(spans, sizes, places, windows.memory)


def _ranges(
    first: int, stop: int, most: int, cut: Callable[[int, int], int] | None
) -> list[tuple[int, int]]:
    """The addresses [first, stop) in pieces of at most ``most``."""
    found, at = [], first
    while at < stop:
        end = min(at + most, stop)
        if cut is not None and end < stop:
            end = cut(at, end)
        found.append((at, end))
        at = end
    return found


def _inners(begins: IntArray, sizes: IntArray, most: int) -> IntArray:
    """The inner chunks that hold bytes [begins, begins + sizes), each once and in order."""
    low, high = begins // INNER, (begins + sizes - 1) // INNER
    steps = [low + i for i in range(most + 1)]
    return np.unique(np.concatenate([step[step <= high] for step in steps]))
