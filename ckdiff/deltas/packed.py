"""One frame of a packed delta: two windows of a tensor in, bytes out; and back.

    frame    0, numbers, streams; or 1, numbers, planes, for a window that has no base
    numbers  classes, shift, extra bits; then for each class
               its least magnitude >> shift (the first one's is 0 and left out)
               elements; changed ones; mode | paired << 2 | low bits << 3
               mode bits: stored size of the bits; mode gaps: gap bytes and their stored size
               symbols: stored size; if paired, the number of the rest and its stored size
    streams  extra bits; then for each class, as far as it has them: bits, or gap bytes and the low
             bits of gaps; symbols; rest

A stream is stored as it is where its stored size is its size, and is a zstd frame otherwise. What
the streams mean is said in docs/delta-format.md.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from ckdiff.deltas.classes import MOST_CLASSES, choose
from ckdiff.deltas.varints import Damaged, FrameReader, varints
from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import (
    CLASS_AT,
    CLASS_BITS,
    CLASS_COLUMNS,
    CLASS_LEAST,
    CLASS_PENDING,
    CLASS_SYMBOLS,
    CLASS_TOTAL,
    DELTA_AT,
    DELTA_EXTRA,
    DELTA_HEAD,
    DELTA_PENDING,
    GAPS_SCRATCH,
    LANES,
    LARGE_HALF,
)
from ckdiff.kernels.compiled import c_function

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

FRAME_BYTES = 1 << 23  #: of one side, at most
FRAME_LANES = 1 << 22  #: elements, at most
_CHANGES, _WHOLE = 0, 1  # kinds of frames
_EMPTY, _FULL, _BITS, _GAPS = range(4)  # modes of positions; gaps are between the rarer bits
#: where less than this of a class differs, or all but this, gaps are shorter than bits
_SPARSE = 1 / 8
_SAMPLED = 1024  # words looked at to choose classes
_PAIRED_BELOW, _LOOKED_AT = 0.03, 4096  # share of large symbols, among the first ones
_LONGEST_LOW = 32
_SLACK = 72  # kernels read and write whole words and lanes


class Form:
    """How the elements of a dtype are seen by the kernels."""

    def __init__(self, dtype: DType) -> None:
        # complex numbers are pairs of floats; sub-byte elements are compared as bytes
        bits = 32 if dtype.name == "C64" else max(dtype.bits, 8)
        ordered = dtype.kind == "float" or dtype.name == "C64"
        self.kind = f"{bits}{'f' if ordered else 'i'}"
        self.bytes = bits // 8  #: of one lane
        #: bytes of a whole frame; a multiple of what any number of hashed units takes
        self.frame = 3 << 20 if dtype.bits == 6 else min(FRAME_BYTES, FRAME_LANES * self.bytes)
        mantissa = 23 if dtype.name == "C64" else dtype.mantissa
        #: magnitudes are told apart by their highest bits: at least the exponent's
        self.shift = min(mantissa, max(0, bits - 9)) if ordered else 0
        self.bins = 1 << (bits - 1 - self.shift) if ordered else 0


FORMS = {name: Form(dtype) for name, dtype in DTYPES.items()}


def _compressor() -> zstandard.ZstdCompressor:
    # What the streams have is skewed bytes and nothing that repeats: a small match table and long
    # matches keep the library from finding "repeats" that cost more than they save.
    return zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            chain_log=6,
            min_match=7,
            target_length=0,
            window_log=17,
            write_content_size=1,
            write_checksum=0,
        )
    )


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
        self._zstd = _compressor()
        self._bits = np.empty((MOST_CLASSES, FRAME_LANES // 8 + _SLACK), np.uint8)
        self._symbols = np.empty((MOST_CLASSES, FRAME_LANES + _SLACK), np.uint8)
        self._gaps = np.empty(FRAME_LANES // 4 + _SLACK, np.uint8)
        self._low = np.empty(FRAME_LANES // 4 + _SLACK, np.uint8)
        self._places = np.empty(GAPS_SCRATCH, np.uint8)
        self._pairs = np.empty(FRAME_LANES // 2 + _SLACK, np.uint8)
        self._rest = np.empty(FRAME_LANES + _SLACK, np.uint8)
        self._extra = np.empty(FRAME_BYTES + _SLACK, np.uint8)
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
        frame = _Writer(_CHANGES, self._zstd)
        frame.numbers += [len(rows), form.shift, 8 * whole + rest]
        frame.plain(self._extra[: whole + (rest > 0)])
        for c, row in enumerate(rows):
            if c:
                frame.numbers.append(int(row[CLASS_LEAST]) >> form.shift)
            self._add_class(frame, row, self._bits[c], self._symbols[c, : ones[c]])
        return frame.finish(), changed

    def encode_whole(self, form: Form, data: Bytes) -> bytes:
        """The frame of a window that has no base: its bytes, those of equal weight together."""
        frame = _Writer(_WHOLE, self._zstd)
        for plane in data.reshape(-1, form.bytes).T:
            frame.coded(np.ascontiguousarray(plane))
        return frame.finish()

    # inside

    def _split(self, form: Form, base: int, tuned: int, nbytes: int) -> Int64:
        words = nbytes // (LANES * form.bytes)
        least = self._classes(form, base, tuned, words)
        state = _state(least, self._bits, self._symbols)
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
        mode, low = _BITS, 0
        if rarer == 0:
            mode = _FULL if ones else _EMPTY
        elif rarer < elements * _SPARSE:
            mode = _GAPS
            low = max(0, int(math.log2(elements / rarer)) - 4)
        paired = ones > 0 and float((symbols[:_LOOKED_AT] >= LARGE_HALF).mean()) < _PAIRED_BELOW
        frame.numbers += [elements, ones, mode | paired << 2 | low << 3]
        if mode == _BITS:
            frame.coded(bits[: -(-elements // 8)])
        elif mode == _GAPS:
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


def _state(least: list[int], bits: Bytes, symbols: Bytes) -> Int64:
    """The state of the kernels at the start of a frame."""
    state = np.zeros(DELTA_HEAD + CLASS_COLUMNS * len(least), np.int64)
    rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
    rows[:, CLASS_LEAST] = least
    for row, row_bits, row_symbols in zip(rows, bits, symbols, strict=False):
        row[CLASS_BITS], row[CLASS_SYMBOLS] = row_bits.ctypes.data, row_symbols.ctypes.data
    return state


@dataclass(slots=True)
class _Class:
    """The numbers of a class."""

    least: int
    elements: int
    ones: int
    mode: int
    paired: bool
    low: int
    gaps: int  #: bytes
    positions: int  #: stored size of bits or gap bytes
    symbols: int  #: stored size
    rest: int  #: symbols
    rest_stored: int

    @classmethod
    def read(cls, frame: FrameReader, form: Form, shift: int, room: int, before: int) -> _Class:
        """The next class, of at most ``room`` elements; ``before`` is the least of the last."""
        least = 0
        if before >= 0:
            least = frame.number((1 << 63) - 1) << shift
            if not before < least < 1 << (8 * form.bytes - 1):
                raise Damaged("the classes of a frame are not in order")
        elements = frame.number(room)
        ones = frame.number(elements)
        how = frame.number(_LONGEST_LOW << 3 | 7)
        mode, paired, low = how & 3, bool(how & 4), how >> 3
        gaps = positions = rest = rest_stored = symbols = 0
        if mode == _BITS:
            positions = frame.number(-(-elements // 8))
        elif mode == _GAPS:
            gaps = frame.number(FRAME_LANES // 4)
            positions = frame.number(gaps)
        elif ones != (elements if mode == _FULL else 0):
            raise Damaged("a class of a frame contradicts itself")
        if (low and mode != _GAPS) or (paired and not ones):
            raise Damaged("a class of a frame contradicts itself")
        if ones:
            symbols = frame.number(-(-ones // 2) if paired else ones)
        if paired:
            rest = frame.number(ones)
            rest_stored = frame.number(rest)
        return cls(
            least, elements, ones, mode, paired, low, gaps, positions, symbols, rest, rest_stored
        )


class FrameDecoder:
    """Reads frames, whatever is in them. One for each thread."""

    def __init__(self, *, portable: bool = False) -> None:
        self._variant = " portable" if portable else ""
        self._zstd = zstandard.ZstdDecompressor()
        self._bits = np.empty((MOST_CLASSES, FRAME_LANES // 8 + _SLACK), np.uint8)
        self._symbols = np.empty((MOST_CLASSES, FRAME_LANES + _SLACK), np.uint8)
        self._low = np.empty(FRAME_LANES // 4 + _SLACK, np.uint8)
        self._extra = np.empty(FRAME_BYTES + _SLACK, np.uint8)
        self._scratch = np.zeros((3, LANES * 8), np.uint8)

    def decode(self, form: Form, frame: memoryview, base: int, nbytes: int, out: int) -> int:
        """Write the tuned window to ``out``; gives the changed lanes. Raises Damaged.

        ``base`` and ``out`` are addresses of ``nbytes`` bytes, which must not overlap.
        """
        reader = self._begin(form, frame, _CHANGES, nbytes)
        words = -(-nbytes // (LANES * form.bytes))
        count = reader.number(MOST_CLASSES)
        shift = reader.number(63)
        extra = reader.number(8 * FRAME_BYTES)
        classes, left = list[_Class](), words * LANES
        for _ in range(count):
            before = classes[-1].least if classes else -1
            classes.append(_Class.read(reader, form, shift, left, before))
            left -= classes[-1].elements
        if left or not classes:
            raise Damaged("the classes of a frame are not all of it")
        _put(self._extra, np.frombuffer(reader.take(-(-extra // 8)), np.uint8))
        for c, one in enumerate(classes):
            self._read_class(reader, one, self._bits[c], self._symbols[c])
        reader.finish()
        self._merge(form, classes, extra, base, nbytes, out)
        return sum(one.ones for one in classes)

    def decode_whole(self, form: Form, frame: memoryview, out: Bytes) -> None:
        """Write a window that has no base to ``out``. Raises Damaged."""
        reader = self._begin(form, frame, _WHOLE, len(out))
        lanes = len(out) // form.bytes
        sizes = [reader.number(lanes) for _ in range(form.bytes)]
        planes = out.reshape(-1, form.bytes)
        for i, size in enumerate(sizes):
            planes[:, i] = self._stream(reader.take(size), lanes)
        reader.finish()

    # inside

    def _begin(self, form: Form, frame: memoryview, kind: int, nbytes: int) -> FrameReader:
        """The reader of a frame, past its kind."""
        if not 0 < nbytes <= form.frame or nbytes % form.bytes:
            raise Damaged("a window of a size that no frame has")  # buffers are made for those
        reader = FrameReader(frame)
        if reader.number(0xFF) != kind:
            raise Damaged("a frame of another kind")
        return reader

    def _read_class(self, reader: FrameReader, one: _Class, bits: Bytes, symbols: Bytes) -> None:
        if one.mode == _BITS:
            _put(bits, self._stream(reader.take(one.positions), -(-one.elements // 8)))
            if one.elements % 8:
                bits[one.elements // 8] &= (1 << one.elements % 8) - 1
            found = self._count(bits, one.elements)
        elif one.mode == _GAPS:
            found = self._read_gaps(reader, one, bits)
        else:
            bits[: one.elements // 8 + 1] = 0xFF if one.mode == _FULL else 0
            found = one.ones
        if found != one.ones:
            raise Damaged("a class of a frame contradicts itself")
        if not one.ones:
            return
        stored = reader.take(one.symbols)
        if not one.paired:
            _put(symbols, self._stream(stored, one.ones))
            return
        pairs = self._stream(stored, -(-one.ones // 2))
        rest = self._stream(reader.take(one.rest_stored), one.rest)
        used = c_function("unpair").ctypes(
            pairs.ctypes.data, one.ones, rest.ctypes.data, len(rest), symbols.ctypes.data
        )
        if used != len(rest):
            raise Damaged("the symbols of a frame do not add up")

    def _read_gaps(self, reader: FrameReader, one: _Class, bits: Bytes) -> int:
        """Make the bits from gaps; gives how many are set."""
        rarer = min(one.ones, one.elements - one.ones)
        flipped = one.ones != rarer
        data = self._stream(reader.take(one.positions), one.gaps)
        low_bits = rarer * one.low
        if low_bits > 8 * (len(self._low) - _SLACK):
            raise Damaged("the gaps of a frame are too long")
        _put(self._low, np.frombuffer(reader.take(-(-low_bits // 8)), np.uint8))
        found: int = c_function("ungaps").ctypes(
            data.ctypes.data, len(data), self._low.ctypes.data, low_bits, one.low,
            0xFFFFFFFFFFFFFFFF if flipped else 0, one.elements, bits.ctypes.data,
        )  # fmt: skip
        if found != rarer:
            raise Damaged("the gaps of a frame do not add up")
        return one.ones

    def _count(self, bits: Bytes, elements: int) -> int:
        """Set bits among the first ``elements``."""
        bits[-(-elements // 8) : -(-elements // 64) * 8] = 0
        found = np.zeros(2, np.int64)
        c_function("survey").ctypes(bits.ctypes.data, -(-elements // 64), found.ctypes.data)
        return int(found[0])

    def _merge(
        self, form: Form, classes: list[_Class], extra: int, base: int, nbytes: int, out: int
    ) -> None:
        state = _state([one.least for one in classes], self._bits, self._symbols)
        state[DELTA_EXTRA] = self._extra.ctypes.data
        rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
        rows[:, CLASS_TOTAL] = [one.elements for one in classes]
        merge = c_function("merge", form.kind + self._variant).ctypes
        scratch, at = self._scratch[0].ctypes.data, state.ctypes.data
        words = nbytes // (LANES * form.bytes)
        bad = merge(base, out, words, len(classes), at, extra, scratch)
        done = words * LANES * form.bytes
        if done < nbytes and not bad:
            self._scratch[1:] = 0
            end, target = self._scratch[1].ctypes.data, self._scratch[2].ctypes.data
            ctypes.memmove(end, base + done, nbytes - done)
            bad = merge(end, target, 1, len(classes), at, extra, scratch)
            ctypes.memmove(out + done, target, nbytes - done)
        if bad or state[DELTA_AT] != extra or (rows[:, CLASS_AT] != rows[:, CLASS_TOTAL]).any():
            raise Damaged("a frame does not fit the base")

    def _stream(self, stored: memoryview, size: int) -> Bytes:
        """The bytes of a stream that has ``size`` of them."""
        if len(stored) == size:
            return np.frombuffer(stored, np.uint8)
        try:
            if zstandard.frame_content_size(stored) != size:  # before it is allocated
                raise Damaged("a stream of a frame has another size")
            return np.frombuffer(self._zstd.decompress(stored, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError:
            raise Damaged("a stream of a frame is damaged") from None


def _put(into: Bytes, data: Bytes) -> None:
    into[: len(data)] = data
