"""One chunk of a diff: from two sources' spans to a stored mask object and a row of results.

A chunk is done window by window: both sides are made addressable, the kernels run, the bytes are
given back, and the finished mask bits are encoded and written while they are still in cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.places.memory import MemoryReader
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader
from ckdiff.checkpoints.strips import NO_GRIDS
from ckdiff.checkpoints.views.blockscalereader import ScaledReader
from ckdiff.diffs import merging
from ckdiff.diffs.casting import Buffers, Cast, Casting
from ckdiff.diffs.rows import in_panels, row_by_row
from ckdiff.diffs.sides import Side, Window
from ckdiff.kernels import BLOCK, HASH_COLUMNS, Comparing, Kernels, Results, abi, statistics
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.panels import Panel
from ckdiff.layout import Layout, Spans
from ckdiff.running.ahead import looked_ahead
from ckdiff.stores.chunkresult import ChunkResult
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.objects import INNER, ObjectWriter
from ckdiff.stores.sink import ObjectSink

SMALLEST_WINDOW = INNER * 8  #: elements: one inner chunk of mask
LARGEST_WINDOW = 1 << 22  #: elements

assert SMALLEST_WINDOW % BLOCK == 0


def largest_window(checkpoints: Iterable[Checkpoint]) -> int:
    """Elements of a window, where memory is plenty, that is compared on the CPU: parts that lie
    between each other are copied together where it has both, and values that are made while they
    are compared come from few bytes.
    """
    sides = list(checkpoints)
    return LARGEST_WINDOW << max(
        any(side.scattered for side in sides), min((side.longer for side in sides), default=0)
    )


@dataclass(slots=True)
class DiffTask:
    """The chunk task of a diff: call it with a chunk number. Shared by the threads of a process."""

    sides: tuple[Side, Side]  #: base and tuned
    layout: Layout
    kinds: list[str]  #: the dtype by whose values each tensor is compared
    known: npt.NDArray[np.bool_]  #: for each tensor, whether its sides are equal and not read
    slots: IntArray  #: kernel slot of each tensor
    kernels: Kernels
    comparing: Comparing  #: those kernels, or the same on a device
    masks: dict[str, int]  #: which rules' masks are stored: canonical text -> position
    rules: int  #: how many rules are evaluated; the first is exact
    with_statistics: bool
    window: int  #: elements
    cuts: IntArray  #: addresses, in order, at which spans are cut
    merging: npt.NDArray[np.bool_] | None  #: whose bases are made by an adapter
    casting: Casting  #: what is widened before it is compared
    sink: ObjectSink | None  #: where the masks go; None: count only, and ``masks`` are none
    stays: str = ""  #: the device on which tensors that are there are compared where they are
    on_bytes: Callable[[int], None] = lambda size: None
    _local: threading.local = field(default_factory=threading.local)

    def __call__(self, chunk: int, stop: threading.Event) -> ChunkResult:
        """See ChunkTask. Raises SourceChanged, CheckpointError, StoreError, Stopped."""
        first, end = self.layout.chunk_range(chunk)
        spans = self.layout.spans(first, end)
        results = Results(len(spans), self.rules, with_statistics=self.with_statistics)
        survived = None if self.merging is None else merging.columns()
        cast = self.casting.begin(self._cast_buffers(), late=self._makes)
        with ExitStack() as stack:
            writers = {} if self.sink is None else self.sink.begin(chunk, list(self.masks), stack)
            readers = [stack.enter_context(closing(s.checkpoint.reader())) for s in self.sides]
            self._prefer_rows(readers)
            if self.stays:
                for reader in readers:
                    if isinstance(reader, MemoryReader):
                        reader.stay(self.stays)
            windows = self.windows(first, end, spans)
            for window in looked_ahead(windows, partial(self.prefetch, readers), stop):
                self._compare(window, readers, results, cast, list(writers.values()), survived)
            objects = {key: writer.finish() for key, writer in writers.items()}
        cast.finish(results)
        return ChunkResult(
            spans.tensors, results.changed, results.hashes, results.statistics, objects, survived
        )

    def windows(self, first: int, end: int, spans: Spans) -> Iterator[Window]:
        """The windows of the addresses [first, end), whose spans are ``spans``."""
        for start in range(first, end, self.window):
            stop = min(start + self.window, end)
            inside = self.layout.spans(start, stop).without(self.known).cut(self.cuts)
            rows = np.searchsorted(spans.tensors, inside.tensors)
            base, tuned = (
                (side.index[inside.tensors], *inside.byte_ranges(side.bits)) for side in self.sides
            )
            yield Window(start, stop, inside, rows, (base, tuned))

    def prefetch(self, readers: Sequence[SpanReader], window: Window) -> None:
        """Ask for a window's bytes before they are needed."""
        for reader, wanted in zip(readers, window.wanted, strict=True):
            reader.prefetch(*wanted)

    def _compare(
        self,
        window: Window,
        readers: list[SpanReader],
        results: Results,
        cast: Cast,
        writers: list[ObjectWriter],
        survived: IntArray | None,
    ) -> None:
        segments = self.segments(window, readers)
        if survived is not None and self.merging is not None:
            merging.add(survived, self.merging, segments, window, self.sides, readers[0])
        cast.widen(segments, window)
        masks = self._buffers()
        for mask in masks:
            mask.fill(0)  # the gaps between tensors are padding
        panels = self._panels(segments, window, readers)
        if panels is not None and isinstance(self.comparing, Kernels):
            self.comparing.run_panels(segments, masks, results, panels)
        else:
            self.comparing.run(segments, masks, results)
        for reader in readers:
            reader.release()
        size = -(-(window.stop - window.first) // (8 * INNER)) * INNER
        for position, writer in zip(self.masks.values(), writers, strict=True):
            encode = self._encoder().encode
            mask = masks[position]
            writer.add([encode(mask[at : at + INNER]) for at in range(0, size, INNER)])
        self.on_bytes(window.nbytes)

    def segments(self, window: Window, readers: Sequence[SpanReader]) -> IntArray:
        """Make a window's bytes addressable: what kernels take, until the readers release it."""
        spans = window.spans
        addresses = [
            reader.acquire(*wanted) for reader, wanted in zip(readers, window.wanted, strict=True)
        ]
        segments = np.empty((len(spans), abi.SEG_COLUMNS), np.int64)
        segments[:, abi.SEG_BASE], segments[:, abi.SEG_TUNED] = addresses
        segments[:, abi.SEG_ELEMENTS] = spans.elements
        segments[:, abi.SEG_POSITION] = spans.addresses - window.first
        segments[:, abi.SEG_SLOT] = self.slots[spans.tensors]
        segments[:, abi.SEG_UNIT] = spans.starts // UNIT
        segments[:, abi.SEG_ROW] = window.rows
        pieces = [reader if isinstance(reader, PieceReader) else None for reader in readers]
        bits = [side.bits[spans.tensors] for side in self.sides]
        grids = [NO_GRIDS if reader is None else reader.grids for reader in pieces]
        rows = [None if reader is None else reader.rows for reader in pieces]
        return row_by_row(segments, grids, rows, bits)

    def _panels(
        self, segments: IntArray, window: Window, readers: Sequence[SpanReader]
    ) -> list[Panel] | None:
        """What has to be copied while segments are compared, if anything."""
        spans = window.spans
        for reader, side in zip(readers, self.sides, strict=True):
            if isinstance(reader, PieceReader) and reader.late:
                places = spans.addresses - window.first
                return in_panels(segments, reader.late, places, side.bits[spans.tensors])
        return None

    @property
    def _makes(self) -> bool:
        """Whether values are made while they are compared, if readers say how."""
        return isinstance(self.comparing, Kernels) and self.comparing.makes

    def _prefer_rows(self, readers: Sequence[SpanReader]) -> None:
        """Let readers not gather what can be compared row by row, nor make values before they are
        compared. Of rows sums of floats would come in another order, and a device, a cast and an
        adapter take spans as they are.
        """
        if self.merging is not None or not isinstance(self.comparing, Kernels):
            return
        pieces = [reader for reader in readers if isinstance(reader, PieceReader)]
        if not self.with_statistics and not any(self.casting.narrow):
            for piece in pieces:
                piece.give_rows()
            # one side's: those of the other would end elsewhere
            turned = sorted(pieces, key=lambda piece: not piece.turns)[:1]
            for piece in turned if self.comparing.makes else []:
                piece.give_panels()
        for reader, narrow in zip(readers, self.casting.narrow, strict=True):
            late = self.comparing.makes and not narrow and not pieces
            if late and isinstance(reader, ScaledReader):
                reader.give_recipes()

    def _buffers(self) -> list[npt.NDArray[np.uint8]]:
        if not hasattr(self._local, "masks"):
            self._local.masks = [np.zeros(self.window // 8, np.uint8) for _ in range(self.rules)]
        masks: list[npt.NDArray[np.uint8]] = self._local.masks
        return masks

    def _cast_buffers(self) -> Buffers:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        buffers: Buffers = self._local.buffers
        return buffers

    def _encoder(self) -> MaskEncoder:
        if not hasattr(self._local, "encoder"):
            self._local.encoder = MaskEncoder()
        encoder: MaskEncoder = self._local.encoder
        return encoder


def working_memory(layout: Layout, rules: int, window: int, *, with_statistics: bool) -> int:
    """Bytes of anonymous memory one worker needs for the largest chunk."""
    rows = 1
    for chunk in range(layout.chunks):
        rows = max(rows, len(layout.spans(*layout.chunk_range(chunk))))
    row = 8 * (2 + rules + HASH_COLUMNS) + (8 * statistics.COLUMNS if with_statistics else 0)
    most_spans = min(rows, window // UNIT)
    # masks, their frames and the joined copy; results and their journal copy; what a span costs
    # in segments and in the readers' Python lists
    return 3 * rules * (window // 8) + 3 * rows * row + most_spans * 1200 + (2 << 20)
