"""The chunks of a graft: windows of both checkpoints and of the mask in, the output's bytes out."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.grafts.blending import BUFFER, MEMORY, Blender, Blends
from ckdiff.grafts.plan import Plan
from ckdiff.grafts.weaving import flag_reader
from ckdiff.kernels.memory import Bytes, views
from ckdiff.layout import Layout, Spans, bits_of
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.threads import Amount, Stopped
from ckdiff.stores import maskwalk

_WINDOW = 1 << 22  # elements that are made addressable at a time, where nothing is blended
_AHEAD = 3  # windows asked of the disk before they are needed
_WOVEN = 1 << 21  # elements of fused tensors that are gathered at a time


def chunks_of(plan: Plan) -> int:
    """How many chunks there are, of all kinds."""
    return plan.blending.chunks + plan.copying.chunks + plan.weaving.chunks


def working_memory(plan: Plan) -> int:
    """Bytes of anonymous memory that one worker needs."""
    most = max(_WINDOW, maskwalk.window_elements(1))  # elements that are made addressable at a time
    readers = plan.base.reader_memory(most * int(plan.all_bits.max(initial=8)) // 8)
    if len(plan.rows):
        readers += plan.tuned.reader_memory(most * int(plan.tuned_bits.max()) // 8)
    if plan.weaving.chunks:
        width = int(plan.fused.tuned.table.nbytes.max() // max(plan.weaving.elements.max(), 1))
        window = _WOVEN * max(width, 8)
        readers += plan.tuned.reader_memory(PieceReader.asked(window)) + PieceReader.memory(window)
        # flags are bytes, and so is what they are gathered from
        readers += PieceReader.memory(_WOVEN) + 2 * PieceReader.asked(_WOVEN) + _WOVEN
    return maskwalk.working_memory(1) + MEMORY + (2 << 20) + readers


@dataclass(slots=True)
class _Side:
    """One checkpoint as a task reads it: spans of a layout become addresses."""

    reader: SpanReader
    index: IntArray  #: for each tensor of the layout its position in the checkpoint
    bits: IntArray  #: of one element, for each tensor of the layout
    begins: IntArray | None = None  #: the byte of each tensor where the layout's begins, if not 0

    def ranges(self, spans: Spans) -> tuple[IntArray, IntArray]:
        """Where the bytes of spans begin in their tensors, and how many they are."""
        starts, nbytes = spans.byte_ranges(self.bits)
        return starts if self.begins is None else starts + self.begins[spans.tensors], nbytes

    def prefetch(self, spans: Spans) -> None:
        self.reader.prefetch(self.index[spans.tensors], *self.ranges(spans))

    def acquire(self, spans: Spans) -> list[Bytes]:
        starts, nbytes = self.ranges(spans)
        return views(self.reader.acquire(self.index[spans.tensors], starts, nbytes), nbytes)


class GraftTask:
    """The chunk task: first the chunks that are blended, then those that are copied, and last those
    of fused tensors that are gathered from their parts.
    """

    def __init__(self, plan: Plan, rebuilt: Rebuilt, done: Amount) -> None:
        self._plan = plan
        self._rebuilt = rebuilt
        self._done = done
        self._kinds = plan.every_kind
        self._blends = Blends(self._kinds)
        self._index = np.concatenate([plan.base_index, plan.fused.index])

    def __call__(self, chunk: int, stop: threading.Event) -> tuple[IntArray, IntArray]:
        """See ChunkTask. Raises SourceChanged, CheckpointError, StoreCorrupt, OutputError."""
        plan = self._plan
        if chunk < plan.blending.chunks:
            return self._blended(chunk, stop)
        chunk -= plan.blending.chunks
        if chunk < plan.copying.chunks:
            self._copy(chunk, np.empty(BUFFER, np.uint8), stop)
            return np.empty(0, np.int64), np.empty((0, 3), np.int64)
        return self._woven(chunk - plan.copying.chunks, stop)

    def _blended(self, chunk: int, stop: threading.Event) -> tuple[IntArray, IntArray]:
        plan, layout, blender = self._plan, self._plan.blending, Blender(self._blends)
        first, end = layout.chunk_range(chunk)
        rows = layout.spans(first, end).tensors
        counts = np.zeros((len(rows), 3), np.int64)
        with ExitStack() as stack:
            base, tuned = (
                _Side(stack.enter_context(closing(side.reader())), index, bits)
                for side, index, bits in (
                    (plan.base, plan.base_index, plan.all_bits[plan.base_index]),
                    (plan.tuned, plan.tuned_index, plan.tuned_bits),
                )
            )
            ahead = _Ahead(layout, [base, tuned], first, end)
            starts = plan.matched.starts[:, plan.rows]
            for window in maskwalk.walk(layout, starts, plan.matched.sources(), first, end):
                spans = window.spans
                ahead.passed(int(spans.addresses[-1] + spans.elements[-1]))
                columns = zip(
                    spans.tensors.tolist(), spans.starts.tolist(), spans.elements.tolist(),
                    base.acquire(spans), tuned.acquire(spans), window.places[0].tolist(),
                    strict=True,
                )  # fmt: skip
                for tensor, start, elements, one, other, place in columns:
                    if stop.is_set():
                        raise Stopped
                    row = int(np.searchsorted(rows, tensor))
                    mask = window.memory[place : place + -(-elements // 8)]
                    counts[row] += self._blend(tensor, start, (one, other, mask), blender)
                base.reader.release()
                tuned.reader.release()
        return rows, counts

    def _woven(self, chunk: int, stop: threading.Event) -> tuple[IntArray, IntArray]:
        """Blend fused tensors in the order in which they lie in the base."""
        plan, fused, blender = self._plan, self._plan.fused, Blender(self._blends)
        layout, store = plan.weaving, plan.matched.stores[0]
        first, end = layout.chunk_range(chunk)
        rows = layout.spans(first, end).tensors
        counts = np.zeros((len(rows), 3), np.int64)
        here = np.arange(len(fused.index))
        with ExitStack() as stack:
            readers = (
                plan.base.reader(),
                PieceReader(plan.tuned.reader(), fused.tuned),
                flag_reader(store, plan.matched.rule, fused.names, fused.flags),
            )
            columns = list(zip(*((base, tuned, "U8") for base, tuned in fused.kinds), strict=True))
            sides = [
                _Side(stack.enter_context(closing(reader)), index, bits_of(dtypes))
                for reader, index, dtypes in zip(
                    readers, (fused.index, here, here), columns, strict=True
                )
            ]
            for low in range(first, end, _WOVEN):
                if stop.is_set():
                    raise Stopped
                spans = layout.spans(low, min(low + _WOVEN, end))
                held = zip(
                    spans.tensors.tolist(), spans.starts.tolist(),
                    *(side.acquire(spans) for side in sides), strict=True,
                )  # fmt: skip
                for tensor, start, one, other, flags in held:
                    row = int(np.searchsorted(rows, tensor))
                    mask = np.packbits(flags, bitorder="little")
                    at = tensor + len(plan.rows)
                    counts[row] += self._blend(at, start, (one, other, mask), blender)
                for side in sides:
                    side.reader.release()
        return rows + len(plan.rows), counts

    def _blend(
        self, tensor: int, start: int, sides: tuple[Bytes, Bytes, Bytes], blender: Blender
    ) -> IntArray:
        """Blend a span and write it, a buffer at a time; ``tensor`` is one of ``every_kind``."""
        kinds = self._kinds[tensor]
        bits = DTYPES[kinds[0]].bits
        counts, at = np.zeros(3, np.int64), start * bits // 8
        for data, found in blender(kinds, sides, len(sides[0]) * 8 // bits):
            self._write(int(self._index[tensor]), at, data)
            counts += found
            at += len(data)
            self._done.add(len(data) * (bits + DTYPES[kinds[1]].bits) // bits)
        return counts

    def _copy(self, chunk: int, buffer: Any, stop: threading.Event) -> None:
        plan, layout = self._plan, self._plan.copying
        first, end = layout.chunk_range(chunk)
        with closing(plan.base.reader()) as reader:
            base = _Side(reader, plan.copied, plan.all_bits[plan.copied], plan.copied_from)
            ahead = _Ahead(layout, [base], first, end)
            for low in range(first, end, _WINDOW):
                if stop.is_set():
                    raise Stopped
                high = min(low + _WINDOW, end)
                ahead.passed(high)
                spans = layout.spans(low, high)
                starts, _ = base.ranges(spans)
                for tensor, start, data in zip(
                    spans.tensors.tolist(), starts.tolist(), base.acquire(spans), strict=True
                ):
                    for at in range(0, len(data), BUFFER):
                        size = min(BUFFER, len(data) - at)
                        # not from the mapping: the system would report a file that was cut as a
                        # failure to write
                        buffer[:size] = data[at : at + size]
                        self._write(int(plan.copied[tensor]), start + at, buffer[:size])
                        self._done.add(size)
                reader.release()

    def _write(self, position: int, offset: int, data: Any) -> None:
        """Write bytes of the base's tensor at ``position``."""
        base = self._plan.base
        file = int(base.file_index[position])
        self._rebuilt.write(file, int(base.offset[position]) + offset, data)


class _Ahead:
    """Asks the disk for what comes next, a few windows before it is needed."""

    def __init__(self, layout: Layout, sides: list[_Side], first: int, end: int) -> None:
        self._layout, self._sides, self._end = layout, sides, end
        self._asked = first
        self.passed(first)

    def passed(self, address: int) -> None:
        """Say that everything before ``address`` is being worked on."""
        until = min(address + _AHEAD * _WINDOW, self._end)
        if until <= self._asked:
            return
        spans = self._layout.spans(self._asked, until)
        self._asked = until
        for side in self._sides:
            side.prefetch(spans)
