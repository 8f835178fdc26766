"""Making the frames of a packed delta; what is in them is said in :mod:`ckdiff.deltas.form`."""

from __future__ import annotations

import math

import numpy as np
import zstandard

from ckdiff.deltas.classes import MOST_CLASSES, choose
from ckdiff.deltas.form import (
    BITS,
    CHANGES,
    EMPTY,
    FRAME_BYTES,
    FRAME_LANES,
    FULL,
    GAPS,
    SLACK,
    WHOLE,
    Bytes,
    Form,
)
from ckdiff.deltas.varints import varints
from ckdiff.kernels import delta as kernels
from ckdiff.kernels.abi import GAPS_SCRATCH, LANES, LARGE_HALF
from ckdiff.stores.maskcodec import skewed_compressor

#: where less than this of a class differs, or all but this, gaps are shorter than bits
_SPARSE = 1 / 8
_SAMPLED = 1024  # words looked at to choose classes
_PAIRED_BELOW, _LOOKED_AT = 0.03, 4096  # share of large symbols, among the first ones


class _Writer:
    """A frame being put together."""

    def __init__(self, kind: int, compressor: zstandard.ZstdCompressor) -> None:
        self._kind = kind
        self._zstd = compressor
        self.numbers: list[int] = []
        self._streams: list[bytes] = []

    def plain(self, data: Bytes) -> None:
        """Append a stream as it is; the reader knows its size."""
        self._streams.append(data.tobytes())

    def coded(self, data: Bytes) -> None:
        """Append a stream and its stored size."""
        stored = self._zstd.compress(data.data) if len(data) else b""
        if len(stored) >= len(data):
            stored = data.tobytes()
        self.numbers.append(len(stored))
        self._streams.append(stored)

    def finish(self) -> bytes:
        return b"".join([bytes([self._kind]), varints(self.numbers), *self._streams])


class FrameEncoder:
    """Makes frames. One for each thread, since buffers are not shared."""

    def __init__(self, *, portable: bool = False) -> None:
        self._variant = " portable" if portable else ""
        self._zstd = skewed_compressor(window_log=17, checksum=False)
        self._bits = np.empty((MOST_CLASSES, FRAME_LANES // 8 + SLACK), np.uint8)
        self._symbols = np.empty((MOST_CLASSES, FRAME_LANES + SLACK), np.uint8)
        self._gaps = np.empty(FRAME_LANES // 4 + SLACK, np.uint8)
        self._low = np.empty(FRAME_LANES // 4 + SLACK, np.uint8)
        self._places = np.empty(GAPS_SCRATCH, np.uint8)
        self._pairs = np.empty(FRAME_LANES // 2 + SLACK, np.uint8)
        self._rest = np.empty(FRAME_LANES + SLACK, np.uint8)
        self._extra = np.empty(FRAME_BYTES + SLACK, np.uint8)
        self._scratch = np.zeros((3, LANES * 8), np.uint8)

    def encode(self, form: Form, base: Bytes, tuned: Bytes) -> tuple[bytes, int]:
        """(frame, changed lanes) of two windows; no frame where none changed.

        A window is a multiple of a lane and at most ``form.frame`` bytes.
        """
        into = kernels.Streams(self._bits, self._symbols, self._extra, self._scratch)
        least = self._classes(form, base, tuned)
        classes, extra, extra_bits = kernels.split(
            form.kind + self._variant, least, base, tuned, into
        )
        changed = sum(len(one.symbols) for one in classes)
        if changed == 0:
            return b"", 0
        frame = _Writer(CHANGES, self._zstd)
        frame.numbers += [len(classes), form.shift, extra_bits]
        frame.plain(extra)
        for c, one in enumerate(classes):
            if c:
                frame.numbers.append(one.least >> form.shift)
            self._add_class(frame, one, self._symbols[c])
        return frame.finish(), changed

    def encode_whole(self, form: Form, data: Bytes) -> bytes:
        """The frame of a window that has no base: its bytes, those of equal weight together."""
        frame = _Writer(WHOLE, self._zstd)
        for plane in data.reshape(-1, form.bytes).T:
            frame.coded(np.ascontiguousarray(plane))
        return frame.finish()

    # inside

    def _classes(self, form: Form, base: Bytes, tuned: Bytes) -> list[int]:
        """The least magnitude of each class."""
        words = len(base) // (LANES * form.bytes)
        if not form.bins or words < _SAMPLED // 8:
            return [0]
        counts = np.zeros((form.bins, 2), np.int64)
        kernels.tally(form.kind, base, tuned, max(1, words // _SAMPLED), form.shift, counts)
        return [first << form.shift for first in choose(counts, words * LANES)]

    def _add_class(self, frame: _Writer, one: kernels.Split, buffer: Bytes) -> None:
        """Append a class; ``buffer`` is what its symbols are at the beginning of."""
        elements, symbols = one.elements, one.symbols
        ones = len(symbols)
        rarer = min(ones, elements - ones)
        mode, low = BITS, 0
        if rarer == 0:
            mode = FULL if ones else EMPTY
        elif rarer < elements * _SPARSE:
            mode = GAPS
            low = max(0, int(math.log2(elements / rarer)) - 4)
        paired = ones > 0 and float((symbols[:_LOOKED_AT] >= LARGE_HALF).mean()) < _PAIRED_BELOW
        frame.numbers += [elements, ones, mode | paired << 2 | low << 3]
        if mode == BITS:
            frame.coded(one.bits[: -(-elements // 8)])
        elif mode == GAPS:
            into = kernels.Gaps(self._gaps, self._low, self._places)
            high, low_part = kernels.gaps(one.bits, elements, rarer, low, into, flip=ones != rarer)
            frame.numbers.append(len(high))
            frame.coded(high)
            frame.plain(low_part)
        if not ones:
            return
        if not paired:
            frame.coded(symbols)
            return
        pairs, rest = kernels.pair(buffer, ones, self._pairs, self._rest)
        frame.coded(pairs)
        frame.numbers.append(len(rest))
        frame.coded(rest)
