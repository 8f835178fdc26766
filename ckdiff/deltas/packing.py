"""Making the frames of a packed delta; what is in them is said in :mod:`ckdiff.deltas.form`."""

from __future__ import annotations

import ctypes
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
    Int64,
    initial_state,
)
from ckdiff.deltas.varints import varints
from ckdiff.kernels.abi import (
    CLASS_AT,
    CLASS_COLUMNS,
    CLASS_LEAST,
    CLASS_PENDING,
    CLASS_SYMBOLS,
    DELTA_AT,
    DELTA_EXTRA,
    DELTA_HEAD,
    DELTA_PENDING,
    GAPS_SCRATCH,
    LANES,
    LARGE_HALF,
)
from ckdiff.kernels.compiled import c_function
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
        self._sizes = np.zeros(2, np.int64)

    def encode(self, form: Form, base: int, tuned: int, nbytes: int) -> tuple[bytes, int]:
        """(frame, changed lanes) of the windows at two addresses; no frame where none changed.

        A window is a multiple of a lane and at most ``form.frame`` bytes.
        """
        state = self._split(form, base, tuned, nbytes)
        rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
        starts = [symbols.ctypes.data for symbols in self._symbols[: len(rows)]]
        ones = (rows[:, CLASS_SYMBOLS] - starts).tolist()
        changed = sum(ones)
        if changed == 0:
            return b"", 0
        whole, rest = int(state[DELTA_EXTRA]) - self._extra.ctypes.data, int(state[DELTA_AT])
        self._extra[whole] = int(state[DELTA_PENDING]) & 0xFF
        frame = _Writer(CHANGES, self._zstd)
        frame.numbers += [len(rows), form.shift, 8 * whole + rest]
        frame.plain(self._extra[: whole + (rest > 0)])
        for c, row in enumerate(rows):
            if c:
                frame.numbers.append(int(row[CLASS_LEAST]) >> form.shift)
            self._add_class(frame, row, self._bits[c], self._symbols[c, : ones[c]])
        return frame.finish(), changed

    def encode_whole(self, form: Form, data: Bytes) -> bytes:
        """The frame of a window that has no base: its bytes, those of equal weight together."""
        frame = _Writer(WHOLE, self._zstd)
        for plane in data.reshape(-1, form.bytes).T:
            frame.coded(np.ascontiguousarray(plane))
        return frame.finish()

    # inside

    def _split(self, form: Form, base: int, tuned: int, nbytes: int) -> Int64:
        words = nbytes // (LANES * form.bytes)
        least = self._classes(form, base, tuned, words)
        state = initial_state(least, self._bits, self._symbols)
        state[DELTA_EXTRA] = self._extra.ctypes.data
        split = c_function("split", form.kind + self._variant).ctypes
        scratch = self._scratch[0].ctypes.data
        split(base, tuned, words, len(least), state.ctypes.data, scratch)
        done = words * LANES * form.bytes
        if done < nbytes:
            self._scratch[1:] = 0
            ends = [self._scratch[1].ctypes.data, self._scratch[2].ctypes.data]
            for end, source in zip(ends, (base, tuned), strict=True):
                ctypes.memmove(end, source + done, nbytes - done)
            split(*ends, 1, len(least), state.ctypes.data, scratch)
        return state

    def _classes(self, form: Form, base: int, tuned: int, words: int) -> list[int]:
        """The least magnitude of each class."""
        if not form.bins or words < _SAMPLED // 8:
            return [0]
        counts = np.zeros((form.bins, 2), np.int64)
        tally = c_function("tally", form.kind).ctypes
        every = max(1, words // _SAMPLED)
        tally(base, tuned, words, every, form.shift, counts.ctypes.data)
        return [first << form.shift for first in choose(counts, words * LANES)]

    def _add_class(self, frame: _Writer, row: Int64, bits: Bytes, symbols: Bytes) -> None:
        elements, ones = int(row[CLASS_AT]), len(symbols)
        if elements % 64:
            bits.view(np.int64)[elements // 64] = row[CLASS_PENDING]
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
            frame.coded(bits[: -(-elements // 8)])
        elif mode == GAPS:
            flip = np.uint64(0 if ones == rarer else 0xFFFFFFFFFFFFFFFF)
            c_function("gaps").ctypes(
                bits.ctypes.data, elements, flip, low, self._gaps.ctypes.data,
                self._low.ctypes.data, self._sizes.ctypes.data, self._places.ctypes.data,
            )  # fmt: skip
            gap_bytes, low_bytes = self._sizes.tolist()
            frame.numbers.append(gap_bytes)
            frame.coded(self._gaps[:gap_bytes])
            frame.plain(self._low[:low_bytes])
        if not ones:
            return
        if not paired:
            frame.coded(symbols)
            return
        rest = c_function("pair").ctypes(
            symbols.ctypes.data, ones, self._pairs.ctypes.data, self._rest.ctypes.data
        )
        frame.coded(self._pairs[: -(-ones // 2)])
        frame.numbers.append(rest)
        frame.coded(self._rest[:rest])
