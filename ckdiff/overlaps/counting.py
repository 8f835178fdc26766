"""Overlap: one pass over the masks of several stores, chunk by chunk, added up in a fixed tree.

The chunk task counts; parts of neighbouring chunks are merged pairwise. The tree depends only on
the number of chunks, so that sums of floating-point moments are the same whoever computes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckdiff.kernels import counting
from ckdiff.layout import Layout
from ckdiff.overlaps.nulls.base import Base
from ckdiff.overlaps.nulls.moments import Moments
from ckdiff.overlaps.nulls.null import Collector, Evidence, Inputs
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.running.threads import Stopped
from ckdiff.stores.maskstream import MaskSource
from ckdiff.stores.maskwalk import walk
from ckdiff.stores.tally import Said, Tally, Waiting

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Part:
    """What some neighbouring chunks add up to; rows are the groups that occur in them."""

    groups: IntArray  #: (rows,) sorted
    pairs: IntArray  #: (rows, upper triangle with diagonal): elements that both hold
    votes: IntArray  #: (rows, stores + 1); [0] is not counted
    moments: dict[str, Moments] = field(default_factory=dict)  #: of whole tensors, by null
    #: of tensors that go on in other chunks, by null and tensor
    open: dict[str, dict[int, Evidence]] = field(default_factory=dict)
    ones: Waiting = field(default_factory=dict)  #: of tensors that go on in other chunks


@dataclass(slots=True, eq=False)
class OverlapTask:
    """The chunk task of an overlap. Shared by the threads of a process."""

    layout: Layout
    starts: IntArray  #: as in Matched
    sources: list[MaskSource]
    groups: IntArray  #: group of each tensor
    nulls: tuple[str, ...]  #: those that count in the masks
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    said: Said  #: what the stores count
    base: Base | None = None
    on_bytes: Callable[[int], None] = lambda size: None
    #: is told the evidence of each whole tensor, in any order and from any thread
    heard: Callable[[int, Evidence], None] = lambda tensor, evidence: None

    @property
    def stores(self) -> int:
        """How many stores are compared."""
        return len(self.sources)

    def __call__(self, chunk: int, stop: threading.Event) -> Part:
        """See ChunkTask. Raises StoreCorrupt, CheckpointError, SourceChanged, Stopped."""
        first, end = self.layout.chunk_range(chunk)
        groups = np.unique(self.groups[self.layout.spans(first, end).tensors])
        part = self.empty(groups)
        tally = Tally(self.said)
        with ExitStack() as stack:
            collectors = {
                name: stack.enter_context(closing(self._collector(name))) for name in self.nulls
            }
            for window in walk(self.layout, self.starts, self.sources, first, end):
                if stop.is_set():
                    raise Stopped
                tally.add(window)
                rows = np.searchsorted(groups, self.groups[window.spans.tensors])
                segments = window.segments(rows)
                counting.agree(segments, window.memory, part.pairs, part.votes)
                for collector in collectors.values():
                    collector.add(window)
                self.on_bytes(self.stores * int(window.sizes.sum()))
            for name, collector in collectors.items():
                self._close(part, name, collector.finish())
        part.ones = tally.waiting
        return part

    def merge(self, left: Part, right: Part) -> Part:
        """The sum of two parts, ``left`` being the chunks right before those of ``right``."""
        out = self.empty(np.union1d(left.groups, right.groups))
        for part in (left, right):
            rows = np.searchsorted(out.groups, part.groups)
            out.pairs[rows] += part.pairs
            out.votes[rows] += part.votes
            for name, moments in part.moments.items():
                out.moments[name].mean[rows] += moments.mean
                out.moments[name].variance[rows] += moments.variance
        for name in self.nulls:
            joined = dict(left.open.get(name, {}))
            for tensor, evidence in right.open.get(name, {}).items():
                before = joined.get(tensor)
                joined[tensor] = evidence if before is None else before.join(evidence)
            self._close(out, name, joined)
        out.ones = Tally(self.said, left.ones).join(right.ones)
        return out

    def empty(self, groups: IntArray) -> Part:
        """A part of no elements with these groups."""
        rows, stores = len(groups), self.stores
        return Part(
            groups,
            np.zeros((rows, stores * (stores + 1) // 2), np.int64),
            np.zeros((rows, stores + 1), np.int64),
            {name: Moments.zeros(rows, stores) for name in self.nulls},
        )

    def _collector(self, name: str) -> Collector:
        make = NULLS[name].collector
        assert make is not None  # ``nulls`` are those that have one
        return make(Inputs(self.dtypes, self.shapes, self.stores, self.base))

    def _close(self, part: Part, name: str, known: dict[int, Evidence]) -> None:
        """Turn the evidence of whole tensors into moments; the rest stays open."""
        unfinished = {}
        for tensor, evidence in sorted(known.items()):
            if evidence.elements < self.layout.elements[tensor]:
                unfinished[tensor] = evidence
                continue
            self.heard(tensor, evidence)
            row = int(np.searchsorted(part.groups, self.groups[tensor]))
            part.moments[name].add(row, *evidence.moments(tensor, self.base))
        part.open[name] = unfinished
