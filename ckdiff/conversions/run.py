"""The chunks of a conversion: windows of the checkpoint in, the output's bytes out."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.conversions.plan import Plan
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.casting import narrow
from ckdiff.kernels.memory import Bytes, views
from ckdiff.layout import ALIGNMENT, Spans, bits_of
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.threads import Amount, Stopped

_WINDOW = 1 << 20  # elements that are made addressable at a time
_AHEAD = 3  # windows asked of the disk before they are needed
_BUFFER = 4 << 20  # bytes that are written at a time
_WORDS = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def working_memory(plan: Plan) -> int:
    """Bytes of anonymous memory that one worker needs."""
    bits = bits_of(plan.checkpoint.table.dtypes)
    window = _WINDOW * int(bits.max(initial=8)) // 8
    # beside the buffer what numpy makes of it when infinities are counted
    return 2 * _BUFFER + (2 << 20) + plan.checkpoint.reader_memory(window)


@dataclass(slots=True)
class Found:
    """What became of numbers."""

    rounded: int = 0  #: elements that are other numbers now
    overflowed: int = 0  #: finite ones that are infinite now
    example: int = -1  #: a tensor with some of these

    def add(self, other: Found) -> None:
        """Count what was found elsewhere as well."""
        self.rounded += other.rounded
        self.overflowed += other.overflowed
        self.example = max(self.example, other.example)


class ConvertTask:
    """The chunk task; shared by the threads."""

    def __init__(self, plan: Plan, rebuilt: Rebuilt, done: Amount) -> None:
        self._plan, self._rebuilt, self._done = plan, rebuilt, done
        self._bits: IntArray = bits_of(plan.checkpoint.table.dtypes)

    def __call__(self, chunk: int, stop: threading.Event) -> Found:
        """See ChunkTask. Raises SourceChanged, CheckpointError, OutputError."""
        layout, found = self._plan.layout, Found()
        first, end = layout.chunk_range(chunk)
        buffer = np.empty(_BUFFER, np.uint8)
        windows = [layout.spans(low, min(low + _WINDOW, end)) for low in range(first, end, _WINDOW)]
        with closing(self._plan.checkpoint.reader()) as reader:
            for coming in windows[:_AHEAD]:
                reader.prefetch(*self._wanted(coming))
            for i, spans in enumerate(windows):
                for coming in windows[i + _AHEAD : i + _AHEAD + 1]:
                    reader.prefetch(*self._wanted(coming))
                if len(spans):
                    self._window(spans, reader, buffer, found, stop)
        return found

    def _wanted(self, spans: Spans) -> tuple[IntArray, IntArray, IntArray]:
        """Which bytes of which tensors of the checkpoint a window is."""
        order = self._plan.order
        return order[spans.tensors], *spans.byte_ranges(self._bits[order])

    def _window(
        self,
        spans: Spans,
        reader: SpanReader,
        buffer: Bytes,
        found: Found,
        stop: threading.Event,
    ) -> None:
        wanted = self._wanted(spans)
        held = views(reader.acquire(*wanted), wanted[2])
        columns = zip(
            wanted[0].tolist(), spans.starts.tolist(), spans.elements.tolist(), held, strict=True
        )
        for tensor, start, elements, data in columns:
            if stop.is_set():
                raise Stopped
            self._convert(tensor, (start, elements), data, buffer, found)
            self._done.add(len(data))
        reader.release()

    def _convert(
        self, tensor: int, span: tuple[int, int], data: Bytes, buffer: Bytes, found: Found
    ) -> None:
        """Write a span of a tensor, which is ``data``, a buffer at a time."""
        plan, (start, elements) = self._plan, span
        stored, written = plan.checkpoint.table.dtypes[tensor], plan.dtypes[tensor]
        bits, wide = DTYPES[stored].bits, DTYPES[written].bits
        most = _BUFFER * 8 // max(bits, wide) // ALIGNMENT * ALIGNMENT
        file, begin = int(plan.file[tensor]), int(plan.begin[tensor])
        for first in range(0, elements, most):
            count = min(most, elements - first)
            part = data[first * bits // 8 : (first + count) * bits // 8]
            into = buffer[: count * wide // 8]
            if stored == written:
                # not from the mapping: the system would report a file that was cut as a failure
                # to write
                into[:] = part
            else:
                rounded = narrow(part, stored, written, into)
                found.rounded += rounded
                if rounded:
                    _count_overflow(tensor, (part, stored), (into, written), found)
            self._rebuilt.write(file, begin + (start + first) * wide // 8, into)


def _count_overflow(
    tensor: int, before: tuple[Bytes, str], after: tuple[Bytes, str], found: Found
) -> None:
    infinite = _infinities(*after)
    if infinite and (more := infinite - _infinities(*before)):
        found.overflowed += more
        found.example = max(found.example, tensor)


def _infinities(data: Bytes, name: str) -> int:
    """How many elements of a float of at least 16 bits are infinite."""
    dtype = DTYPES[name]
    words = data.view(_WORDS[dtype.bits])
    exponent = ((1 << dtype.exponent) - 1) << dtype.mantissa
    # without the sign, which is shifted out
    return int(np.count_nonzero(words << words.dtype.type(1) == words.dtype.type(exponent << 1)))
