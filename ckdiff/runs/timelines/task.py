"""One chunk of a timeline: windows of all checkpoints side by side, a mask object for each step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import Bytes
from ckdiff.kernels.paths import COLUMNS, JOB_COLUMNS
from ckdiff.kernels.timeline import Marching, Sums, columns, moves
from ckdiff.layout import Layout, Spans
from ckdiff.running.ahead import looked_ahead
from ckdiff.running.threads import PerThread
from ckdiff.runs.timelines.chunk import TimelineChunk
from ckdiff.runs.timelines.file import first_object_key, step_folder
from ckdiff.runs.timelines.pairs import MarchingPairs
from ckdiff.runs.timelines.paths import Paths, path_kinds, wider
from ckdiff.runs.timelines.versions import Earlier, FoldReader, stretch
from ckdiff.runs.timelines.widening import Widening, Window
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.maskstream import MaskSource, MaskWindows
from ckdiff.stores.objects import INNER, OBJECT, ObjectWriter, object_key
from ckdiff.stores.sink import ObjectSink


@dataclass(slots=True)
class _Tools:
    """What a thread has for itself."""

    masks: list[Bytes]  #: for each side but the first and each rule
    first: Bytes | None  #: numbers of steps
    encoder: MaskEncoder
    wide: dict[tuple[int, str], Bytes] = field(default_factory=dict)


@dataclass(slots=True)
class TimelineTask:
    """The chunk task of a timeline: call it with a chunk number. Shared by all threads."""

    pairs: MarchingPairs
    layout: Layout
    slots: IntArray  #: kernel slot of each pair (row) and tensor
    kernels: Marching
    rules: int  #: how many are evaluated; the masks are those of the last
    rule: str
    loaded: list[MaskSource]  #: the masks of the first steps, where these are known
    width: int  #: bytes of the number of a step; 0 where no first moves are kept
    window: int  #: elements
    cuts: IntArray
    paths: Paths | None  #: what is summed where statistics are asked for
    folder: Path  #: the timeline in the making
    out: Path  #: how errors of writing name it
    on_bytes: Callable[[int], None] = lambda size: None
    _tools: PerThread[_Tools] = field(init=False)

    def __post_init__(self) -> None:
        self._tools = PerThread(self._make_tools)

    @property
    def steps(self) -> int:
        """How many there are, known ones included."""
        return len(self.loaded) + len(self.pairs.sides) - 1

    def __call__(self, chunk: int, stop: threading.Event) -> TimelineChunk:
        """See ChunkTask. Raises SourceChanged, CheckpointError, StoreError, Stopped."""
        first, end = self.layout.chunk_range(chunk)
        spans = self.layout.spans(first, end)
        sides = self.pairs.sides
        stats = self.paths is not None
        into = Sums(len(spans), len(sides), self.rules, self.steps, stats=stats)
        with ExitStack() as stack:
            writers = _Writers(self, chunk, stack)
            readers: list[SpanReader | FoldReader] = []
            for side in range(len(sides)):
                readers.append(stack.enter_context(closing(self._reader(side, readers))))
            room = self.window // (8 * INNER)
            known = stack.enter_context(MaskWindows(self.loaded, room)) if self.loaded else None
            windows = self.windows(first, end, spans)
            for window in looked_ahead(windows, partial(self._prefetch, readers), stop):
                self._march(window, readers, known, into, writers)
            objects = writers.finish()
        return TimelineChunk.of(spans.tensors, into, objects)

    def _reader(
        self, side: int, before: Sequence[SpanReader | FoldReader]
    ) -> SpanReader | FoldReader:
        found, fold = self.pairs.sides[side], self.pairs.folds[side]
        if not fold.versions:
            return found.checkpoint.reader()
        nbytes = self.window * int(found.bits.max(initial=8)) // 8
        if fold.start is not None:
            origin = fold.start.checkpoint
            return FoldReader(
                fold.versions, found.checkpoint, nbytes, origin.reader(), partial(stretch, origin)
            )
        last = before[-1]
        if isinstance(last, FoldReader):
            earlier: Earlier = last.stretch
        else:
            earlier = partial(stretch, self.pairs.sides[side - 1].checkpoint)
        return FoldReader(fold.versions, found.checkpoint, nbytes, None, earlier)

    def windows(self, first: int, end: int, spans: Spans) -> Iterator[Window]:
        """The windows of the addresses [first, end), whose spans are ``spans``."""
        for start in range(first, end, self.window):
            stop = min(start + self.window, end)
            inside = self.layout.spans(start, stop).cut(self.cuts)
            rows = np.searchsorted(spans.tensors, inside.tensors)
            wanted = [
                (side.index[inside.tensors], *inside.byte_ranges(side.bits))
                for side in self.pairs.sides
            ]
            yield Window(start, stop, inside, rows, wanted)

    def _prefetch(self, readers: Sequence[SpanReader | FoldReader], window: Window) -> None:
        for reader, wanted in zip(readers, window.wanted, strict=True):
            reader.prefetch(*wanted)

    def _march(
        self,
        window: Window,
        readers: Sequence[SpanReader | FoldReader],
        known: MaskWindows | None,
        into: Sums,
        writers: _Writers,
    ) -> None:
        tools = self._tools()
        segments, widening = self._segments(window, readers)
        for mask in tools.masks:
            mask.fill(0)  # the gaps between tensors are padding
        self.kernels.run(segments, tools.masks, into)
        if self.paths is not None:
            self.paths.add(widening, into.paths)
        for reader in readers:
            reader.release()
        masks = tools.masks[self.rules - 1 :: self.rules]
        size = -(-(window.stop - window.first) // (8 * INNER)) * INNER
        earlier = [] if known is None else self._earlier(known, window, size)
        if tools.first is not None:
            tools.first.fill(0)
        moves(segments, [*earlier, *masks], tools.first, self.width, into)
        for mask, writer in zip(masks, writers.masks, strict=True):
            writer.add(
                [tools.encoder.encode(mask[at : at + INNER]) for at in range(0, size, INNER)]
            )
        if tools.first is not None:
            writers.add_first(window, tools.first, tools.encoder)
        self.on_bytes(window.nbytes(self.pairs.folds))

    def _earlier(self, known: MaskWindows, window: Window, size: int) -> list[Bytes]:
        """The masks of the steps that are known, over a window; room as wide as the others have."""
        begin = window.first // (8 * INNER)
        wanted = np.arange(begin, begin + size // INNER)
        known.load([wanted] * len(self.loaded))
        every = known.memory.reshape(len(self.loaded), -1)
        return [every[source, : self.window // 8] for source in range(len(self.loaded))]

    def _segments(
        self, window: Window, readers: Sequence[SpanReader | FoldReader]
    ) -> tuple[IntArray, Widening]:
        """Make a window's bytes addressable: what kernels take, until the readers release it."""
        spans, sides, tensors = window.spans, self.pairs.sides, window.spans.tensors
        segments = np.empty((len(spans), columns(len(sides))), np.int64)
        segments[:, abi.MARCH_ELEMENTS] = spans.elements
        segments[:, abi.MARCH_POSITION] = spans.addresses - window.first
        segments[:, abi.MARCH_UNIT] = spans.starts // UNIT
        segments[:, abi.MARCH_ROW] = window.rows
        addresses: list[IntArray] = []
        for reader, wanted in zip(readers, window.wanted, strict=True):
            if isinstance(reader, FoldReader):
                addresses.append(reader.acquire(addresses[-1], *wanted))
            else:
                addresses.append(reader.acquire(*wanted))
        at = abi.MARCH_HEAD
        for side, address in zip(sides, addresses, strict=True):
            segments[:, at], segments[:, at + 1] = address, side.bits[tensors]
            at += abi.MARCH_SIDE
        widening = Widening(sides, window, addresses, self._room)
        for p, two in enumerate(self.pairs.pairs):
            for column, which in enumerate(two):
                segments[:, at + column] = widening.column(which, self.pairs.wide[p])
            segments[:, at + 2] = self.slots[p, tensors]
            at += abi.MARCH_PAIR
        return segments, widening

    def _room(self, side: int, kind: str) -> Bytes:
        """Where a thread keeps a window of a side in a wider dtype."""
        wide = self._tools().wide
        if (side, kind) not in wide:
            wide[side, kind] = np.empty(self.window * DTYPES[kind].bits // 8, np.uint8)
        return wide[side, kind]

    def _make_tools(self) -> _Tools:
        count = (len(self.pairs.sides) - 1) * self.rules
        masks = [np.zeros(self.window // 8, np.uint8) for _ in range(count)]
        first = np.zeros(self.window * self.width, np.uint8) if self.width else None
        # from step to step masks are denser
        return _Tools(masks, first, MaskEncoder(alike=False))


class _Writers:
    """The objects of a chunk: a mask for each step that is compared, and its first moves."""

    def __init__(self, task: TimelineTask, chunk: int, stack: ExitStack) -> None:
        self._task, self._stack, self._chunk = task, stack, chunk
        self.masks: list[ObjectWriter] = []
        self._keys: list[str] = []
        for step in range(len(task.loaded) + 1, task.steps + 1):
            sink = ObjectSink(task.folder / step_folder(step), task.out)
            self.masks += sink.begin(chunk, [task.rule], stack).values()
            self._keys.append(f"{step_folder(step)}/{object_key(task.rule, chunk)}")
        self._firsts: dict[str, ObjectWriter] = {}

    def add_first(self, window: Window, first: Bytes, encoder: MaskEncoder) -> None:
        """Write a window's numbers of steps, in objects of OBJECT bytes."""
        width = self._task.width
        size = -(-(window.stop - window.first) * width // INNER) * INNER
        for at in range(0, size, INNER):
            key = first_object_key((window.first * width + at) // OBJECT)
            writer = self._firsts.get(key)
            if writer is None:
                writer = self._firsts[key] = ObjectWriter(self._task.folder / key)
                self._stack.callback(writer.abandon)
            writer.add([encoder.encode(first[at : at + INNER])])

    def finish(self) -> dict[str, tuple[int, str]]:
        """All that was written: key -> size, digest."""
        both = zip([*self._keys, *self._firsts], [*self.masks, *self._firsts.values()], strict=True)
        return {key: writer.finish() for key, writer in both}


def working_memory(
    pairs: MarchingPairs,
    layout: Layout,
    loaded: int,
    rules: int,
    width: int,
    window: int,
    *,
    stats: bool,
) -> int:
    """Bytes of anonymous memory that one worker needs for the largest chunk."""
    rows = 1
    for chunk in range(layout.chunks):
        rows = max(rows, len(layout.spans(*layout.chunk_range(chunk))))
    sides, steps = len(pairs.sides), loaded + len(pairs.sides) - 1
    row = 8 * ((sides - 1) * (rules + 1) + 2 * sides + steps + 1)
    row += 8 * COLUMNS * (sides - 1) if stats else 0
    masks = ((sides - 1) * rules + 3 + 4 * loaded) * (window // 8)
    job = 8 * JOB_COLUMNS * 5 * (sides - 1) if stats else 0
    spans = min(rows, window // UNIT) * (16 * columns(sides) + 400 * sides + job)
    copies = sum(window * DTYPES[kind].bits // 8 for _, kind in _copies(pairs, stats=stats))
    return masks + 3 * window * width + 3 * rows * row + spans + copies + (2 << 20)


def _copies(pairs: MarchingPairs, *, stats: bool) -> set[tuple[int, str]]:
    """Which sides are copied to which wider dtypes."""
    found = {(s, k) for two, wide in zip(pairs.pairs, pairs.wide, strict=True)
             for s in two for k in set(wide.values())}  # fmt: skip
    for side in range(1, len(pairs.sides)) if stats else ():
        kinds = set(wider(pairs, side, path_kinds(pairs, side)).values())
        found |= {(which, kind) for which in (0, side - 1, side) for kind in kinds}
    return found
