"""Counting masks while others walk them: the bits of each tensor against what its store says.

Whoever walks whole tensors adds each window here while it is in the cache; that costs a hundredth
of decoding it. A tensor that goes on in other windows, or chunks, waits until all of it has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.kernels import counting
from ckdiff.kernels.abi import SEG_GROUP, SEG_SIZE, SEGMENT_COLUMNS
from ckdiff.layout import ALIGNMENT, Layout
from ckdiff.stores.maskstream import MaskSource
from ckdiff.stores.maskwalk import MaskSpans, walk

IntArray = npt.NDArray[np.int64]
#: of tensors that go on elsewhere: elements, and ones in each store
Waiting = dict[int, tuple[int, IntArray]]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What some stores say of the tensors that are walked."""

    layout: Layout
    sources: list[MaskSource]
    names: list[str]
    changed: IntArray  #: (stores, tensors)

    def only(self, tensors: IntArray) -> Said:
        """Of the tensors at these positions, laid out by themselves."""
        return Said(
            Layout(self.layout.elements[tensors]),
            self.sources,
            [self.names[i] for i in tensors.tolist()],
            self.changed[:, tensors],
        )


class Tally:
    """What was counted so far. For one thread; what waits in several is joined afterwards."""

    def __init__(self, said: Said, waiting: Waiting | None = None) -> None:
        self._said = said
        self.waiting: Waiting = {} if waiting is None else dict(waiting)

    def add(self, window: MaskSpans) -> None:
        """Count a window. Raises StoreCorrupt where a tensor's ones are not as many as its store
        says, and where padding bits are set.
        """
        said, spans = self._said, window.spans
        check_padding(said, window)
        counts = self._ones(window)
        whole = spans.elements == said.layout.elements[spans.tensors]
        wrong = (counts != said.changed[:, spans.tensors]) & whole
        if wrong.any():
            store, span = np.argwhere(wrong)[0].tolist()
            raise miscounted(said, store, int(spans.tensors[span]))
        for span in np.flatnonzero(~whole).tolist():
            self._put(int(spans.tensors[span]), int(spans.elements[span]), counts[:, span])

    def join(self, other: Waiting) -> Waiting:
        """Take in what waits elsewhere; gives what still waits. Raises StoreCorrupt."""
        for tensor, (elements, counts) in other.items():
            self._put(tensor, elements, counts)
        return self.waiting

    def _put(self, tensor: int, elements: int, counts: IntArray) -> None:
        before, found = self.waiting.pop(tensor, (0, np.zeros_like(counts)))
        elements, found = before + elements, found + counts
        if elements < self._said.layout.elements[tensor]:
            self.waiting[tensor] = elements, found
            return
        wrong = np.flatnonzero(found != self._said.changed[:, tensor])
        if wrong.size:
            raise miscounted(self._said, int(wrong[0]), tensor)

    def _ones(self, window: MaskSpans) -> IntArray:
        """(stores, spans): the population count of every span, its padding included."""
        # one call for all stores: each span of each store is a row of its own
        rows = window.places.size
        table = np.zeros((rows, SEGMENT_COLUMNS + 1), np.int64)
        table.reshape(*window.places.shape, -1)[:, :, SEG_SIZE] = window.sizes
        table[:, SEG_GROUP] = np.arange(rows)
        table[:, SEGMENT_COLUMNS] = window.places.reshape(-1)
        ones = np.zeros((rows, 1), np.int64)
        counting.agree(table, window.memory, ones, np.zeros((rows, 2), np.int64))
        return ones.reshape(window.places.shape)


def check_padding(said: Said, window: MaskSpans) -> None:
    """Raise StoreCorrupt where bits past a tensor's end are set: ckdiff does not write such masks,
    and whoever counts whole words would count them.
    """
    spans = window.spans
    ragged = np.flatnonzero(spans.elements % ALIGNMENT)
    if not len(ragged):
        return
    # the last 512 bits of a tensor, of which some are its own
    blocks = window.memory.view(np.uint64).reshape(-1, ALIGNMENT // 64)
    foreign = _padding()[spans.elements[ragged] % ALIGNMENT]
    for store, row in enumerate(window.places):
        last = (row[ragged] + window.sizes[ragged]) // (ALIGNMENT // 8) - 1
        wrong = np.flatnonzero((blocks[last] & foreign).any(1))
        if len(wrong):
            name = printable(said.names[int(spans.tensors[ragged[wrong[0]]])])
            raise StoreCorrupt(
                f"the mask of {name} in {said.sources[store].shown} has padding bits that are set",
                hint="ckdiff did not write it like this: make the store again",
            )


def miscounted(said: Said, store: int, tensor: int) -> StoreCorrupt:
    """The error for a tensor whose mask has more ones, or fewer, than its store says."""
    return StoreCorrupt(
        f"the mask of {printable(said.names[tensor])} in {said.sources[store].shown} disagrees "
        "with its count",
        hint="ckdiff did not write it like this: make the store again",
    )


@cache
def _padding() -> npt.NDArray[np.uint64]:
    """For each number of bits that are a tensor's own, the others among 512."""
    own = np.arange(ALIGNMENT)[:, None] > np.arange(ALIGNMENT)[None, :]
    return np.packbits(~own, axis=1, bitorder="little").view(np.uint64)


def recount(said: Said, starts: IntArray, ranges: Sequence[tuple[int, int]], tally: Tally) -> None:
    """Count what lies in some ranges of addresses that nobody else walks. Raises StoreCorrupt."""
    for first, stop in ranges:
        for window in walk(said.layout, starts, said.sources, first, stop):
            tally.add(window)
