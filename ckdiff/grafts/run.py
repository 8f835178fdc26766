"""The chunks of a graft: windows of both checkpoints and of the mask in, the output's bytes out."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.grafts.plan import Plan
from ckdiff.kernels.blending import Blend
from ckdiff.kernels.memory import Bytes, views
from ckdiff.layout import ALIGNMENT, Layout, Spans
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.threads import Amount, Stopped
from ckdiff.stores import maskwalk

_WINDOW = 1 << 22  # elements that are made addressable at a time, where nothing is blended
_AHEAD = 3  # windows asked of the disk before they are needed
_BUFFER = 4 << 20  # bytes that are written at a time


def working_memory(plan: Plan) -> int:
    """Bytes of anonymous memory that one worker needs."""
    most = max(_WINDOW, maskwalk.window_elements(1))  # elements that are made addressable at a time
    window = most * int(plan.all_bits.max(initial=8)) // 8
    sides = [plan.base, plan.tuned] if len(plan.rows) else [plan.base]
    readers = sum(side.reader_memory(window) for side in sides)
    return maskwalk.working_memory(1) + _BUFFER + (2 << 20) + readers


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
    """The chunk task: first the chunks that are blended, then those that are copied."""

    def __init__(self, plan: Plan, rebuilt: Rebuilt, done: Amount) -> None:
        self._plan = plan
        self._rebuilt = rebuilt
        self._done = done
        self._blend_bits = plan.all_bits[plan.base_index]
        self._blends = {int(bits): Blend(int(bits)) for bits in np.unique(self._blend_bits)}

    def __call__(self, chunk: int, stop: threading.Event) -> tuple[IntArray, IntArray]:
        """See ChunkTask. Raises SourceChanged, CheckpointError, StoreCorrupt, OutputError."""
        plan = self._plan
        buffer = np.empty(_BUFFER, np.uint8)
        if chunk < plan.blending.chunks:
            return self._blended(chunk, buffer, stop)
        self._copy(chunk - plan.blending.chunks, buffer, stop)
        return np.empty(0, np.int64), np.empty((0, 2), np.int64)

    def _blended(self, chunk: int, buffer: Any, stop: threading.Event) -> tuple[IntArray, IntArray]:
        plan, layout = self._plan, self._plan.blending
        first, end = layout.chunk_range(chunk)
        rows = layout.spans(first, end).tensors
        counts = np.zeros((len(rows), 2), np.int64)
        with ExitStack() as stack:
            base, tuned = (
                _Side(stack.enter_context(closing(side.reader())), index, self._blend_bits)
                for side, index in ((plan.base, plan.base_index), (plan.tuned, plan.tuned_index))
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
                    sides = one, other, mask
                    counts[row] += self._blend(tensor, start, elements, sides, buffer)
                base.reader.release()
                tuned.reader.release()
        return rows, counts

    def _blend(
        self,
        tensor: int,
        start: int,
        elements: int,
        sides: tuple[Bytes, Bytes, Bytes],
        buffer: Bytes,
    ) -> IntArray:
        """Blend a span and write it, a buffer at a time."""
        plan = self._plan
        bits = int(self._blend_bits[tensor])
        base, tuned, mask = sides
        # whole bytes of mask, and whole bytes of elements that share them
        most = _BUFFER * 8 // bits // ALIGNMENT * ALIGNMENT
        counts = np.zeros(2, np.int64)
        for first in range(0, elements, most):
            count = min(most, elements - first)
            at, size = first * bits // 8, count * bits // 8
            counts += self._blends[bits](
                base[at : at + size], tuned[at : at + size], mask[first // 8 :], buffer, count
            )
            self._write(int(plan.base_index[tensor]), start * bits // 8 + at, buffer[:size])
            self._done.add(2 * size)
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
                    for at in range(0, len(data), _BUFFER):
                        size = min(_BUFFER, len(data) - at)
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
