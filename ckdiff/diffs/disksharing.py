"""How the readers of streamed checkpoints share the disk that they may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ckdiff.budget import format_size, parse_size
from ckdiff.checkpoints.places.hub.spool import PAGE, room_for, temporary_folder
from ckdiff.checkpoints.places.hub.streamed import CONNECTIONS
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.allotment import Allotment
from ckdiff.diffs.task import SMALLEST_WINDOW
from ckdiff.errors import BudgetError, UsageError
from ckdiff.layout import IntArray
from ckdiff.options import Options
from ckdiff.outputs.checks import free_space
from ckdiff.running.ahead import AHEAD

if TYPE_CHECKING:
    from ckdiff.diffs.comparison import Comparison

_NOTES = 256  # of which a file system may take one part to note where the others are
_OVERLAP = 2  # windows that have to fit, for one to be fetched while one is compared


@dataclass(frozen=True, slots=True)
class Streaming:
    """What streaming needs of a diff."""

    allotment: Allotment  #: so that it fits the disk as well
    streams: tuple[Checkpoint, ...] = field(repr=False)
    nbytes: int  #: fetched, but for headers and small gaps between tensors
    refusal: str | None  #: of a rehearsal: why a run would be refused

    def hang_up(self) -> None:
        """Let nobody wait for a server any more."""
        for stream in self.streams:
            stream.hang_up()


def share_disk(
    comparison: Comparison,
    found: Allotment,
    options: Options,
    *,
    on_cluster: bool,
    note: Callable[[str], None],
) -> Streaming:
    """Give each reader of a streamed side its part of ``options.disk``, and of what is free there.

    What was ``found`` for the memory is kept where it fits. Else windows are smaller, and there are
    fewer workers unless their number was asked for, which ``note`` is told. Raises UsageError where
    nothing can be streamed, and BudgetError where it does not fit, unless it is a dry run.
    """
    sides = comparison.base, comparison.tuned
    streams = tuple(side for side in sides if side.streams)
    if not any(side.streams or side.origin for side in sides):
        raise UsageError("neither checkpoint is on the hub", hint="leave out --stream")
    if on_cluster:
        raise UsageError(
            "the workers of a cluster cannot stream",
            hint="leave out --stream, or --scheduler",
        )
    if not streams:  # all of it is in the cache
        return Streaming(found, (), 0, None)
    read = ~comparison.known
    nbytes = sum(int(s.nbytes[read].sum()) for s in comparison.sides if s.checkpoint.streams)
    try:
        fitting = _fitting(comparison, found, streams, options, note)
    except BudgetError as error:
        if not options.dry_run:
            raise
        return Streaming(found, streams, nbytes, error.one_line())
    return Streaming(fitting, streams, nbytes, None)


def _fitting(
    comparison: Comparison,
    found: Allotment,
    streams: Sequence[Checkpoint],
    options: Options,
    note: Callable[[str], None],
) -> Allotment:
    asked, workers = parse_size(options.disk), options.workers
    folder = temporary_folder()
    free = free_space(folder)
    allowed = min(asked, free - free // 64)  # file systems need some for themselves

    def each(count: int) -> int:
        share = allowed // (len(streams) * count)
        return (share - share // _NOTES) // PAGE * PAGE

    count, need = found.workers, _Need.of(comparison, found.window)
    if workers is None:  # those that are more than the connections would wait most of the time
        while count > CONNECTIONS and each(count) < need.some:
            count -= 1
    while each(count) < need.some and need.window > SMALLEST_WINDOW:
        need = _Need.of(comparison, need.window // 2)
    if workers is None:
        while count > 1 and each(count) < need.one:
            count -= 1
    if each(count) < need.one:
        least = -(-need.one // PAGE) * PAGE * len(streams) * count
        raise _too_little(allowed, least, count, folder if allowed < asked else None)
    if count < found.workers:
        note(
            f"{count} worker{'s' * (count > 1)} instead of {found.workers}, to keep to "
            f"{format_size(allowed)} of disk"
        )
    for stream in streams:
        spool = max(PAGE, min(each(count), -(-need.all // PAGE) * PAGE))
        stream.share(spool, CONNECTIONS // len(streams))
    return replace(found, workers=count, window=need.window)


def _too_little(allowed: int, least: int, workers: int, full: Path | None) -> BudgetError:
    """The error for a bound on the disk that is too low, or for a folder that is ``full``."""
    many = f"{workers} workers" if workers > 1 else "one worker"
    return BudgetError(
        f"{format_size(allowed)} of disk is too little for {many}: this needs {format_size(least)}"
        + (f" free in {full}" if full is not None else ""),
        hint=("set TMPDIR to a disk with more room" if full is not None else "raise --disk")
        + (" or lower --workers" if workers > 1 else ""),
    )


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes of a spool, for windows of so many elements."""

    window: int
    one: int  #: for any window
    some: int  #: for as many as are needed to fetch while comparing
    all: int  #: for all that a worker ever asks for at a time

    @classmethod
    def of(cls, comparison: Comparison, window: int) -> _Need:
        nbytes, spans = _windows(comparison, window)

        def most(count: int) -> int:
            """Of so many windows one after the other."""
            count = min(count, len(nbytes))
            if not count:
                return 0
            sums = np.convolve(nbytes, np.ones(count, np.int64), "valid")
            return int(sums.max()) + count * (one - widest)

        widest = int(nbytes.max(initial=0))
        one = room_for(widest, int(spans.max(initial=0)))
        return cls(window, one, most(_OVERLAP), most(1 + AHEAD))


def _windows(comparison: Comparison, window: int) -> tuple[IntArray, IntArray]:
    """For each window of the layout, how many bytes of a side are read at most, and how many
    spans they are in at most.
    """
    layout = comparison.layout
    if not layout.total:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    base, tuned = (side.bits for side in comparison.sides)
    bits = np.maximum(base, tuned) * ~comparison.known
    nbytes = layout.elements * bits // 8
    edges = np.arange(0, layout.total + window, window)
    # the last tensor that begins at or before each edge, and how much of it is before the edge
    last = np.maximum(np.searchsorted(layout.starts, edges, side="right") - 1, 0)
    inside = np.clip(edges - layout.starts[last], 0, layout.elements[last]) * bits[last] // 8
    before = np.cumsum(nbytes)[last] - nbytes[last] + inside
    return np.diff(before), np.diff(last) + 1
