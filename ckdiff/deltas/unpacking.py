"""Reading the frames of a packed delta; what is in them is said in :mod:`ckdiff.deltas.form`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from ckdiff.deltas.classes import MOST_CLASSES
from ckdiff.deltas.form import (
    BITS,
    CHANGES,
    FRAME_BYTES,
    FRAME_LANES,
    FULL,
    GAPS,
    LONGEST_LOW,
    SLACK,
    WHOLE,
    Bytes,
    Form,
)
from ckdiff.deltas.varints import Damaged, FrameReader
from ckdiff.kernels import delta as kernels
from ckdiff.kernels import entropy
from ckdiff.kernels.abi import LANES


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
        how = frame.number(LONGEST_LOW << 3 | 7)
        mode, paired, low = how & 3, bool(how & 4), how >> 3
        gaps = positions = rest = rest_stored = symbols = 0
        if mode == BITS:
            positions = frame.number(-(-elements // 8))
        elif mode == GAPS:
            gaps = frame.number(FRAME_LANES // 4)
            positions = frame.number(gaps)
        elif ones != (elements if mode == FULL else 0):
            raise Damaged("a class of a frame contradicts itself")
        if (low and mode != GAPS) or (paired and not ones):
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
        self._bits = np.empty((MOST_CLASSES, FRAME_LANES // 8 + SLACK), np.uint8)
        self._symbols = np.empty((MOST_CLASSES, FRAME_LANES + SLACK), np.uint8)
        self._low = np.empty(FRAME_LANES // 4 + SLACK, np.uint8)
        self._extra = np.empty(FRAME_BYTES + SLACK, np.uint8)
        self._scratch = np.zeros((3, LANES * 8), np.uint8)

    def decode(
        self,
        form: Form,
        frame: memoryview,
        base: Bytes,
        out: Bytes,
        *,
        ready: kernels.Ready = kernels.no_one,
    ) -> int:
        """Write the tuned window to ``out``; gives the changed lanes. Raises Damaged.

        ``base`` and ``out`` are of one size and must not overlap. ``ready`` is told of the pieces
        of ``out`` as they are made, also where Damaged is raised later.
        """
        merging, changed = self.begin(form, frame, len(base))
        if not merging.whole(base, out, ready):
            raise Damaged("a frame does not fit the base")
        return changed

    def begin(self, form: Form, frame: memoryview, size: int) -> tuple[kernels.Merging, int]:
        """What makes the window of a frame, of ``size`` bytes, and the changed lanes.

        It is gone when the next frame is read. Raises Damaged.
        """
        reader = self._begin(form, frame, CHANGES, size)
        words = -(-size // (LANES * form.bytes))
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
        sizes = [(one.least, one.elements) for one in classes]
        held = kernels.Streams(self._bits, self._symbols, self._extra, self._scratch)
        merging = kernels.Merging(form.kind + self._variant, sizes, extra, size, held)
        return merging, sum(one.ones for one in classes)

    def decode_whole(self, form: Form, frame: memoryview, out: Bytes) -> None:
        """Write a window that has no base to ``out``. Raises Damaged."""
        reader = self._begin(form, frame, WHOLE, len(out))
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
        if one.mode == BITS:
            _put(bits, self._stream(reader.take(one.positions), -(-one.elements // 8)))
            if one.elements % 8:
                bits[one.elements // 8] &= (1 << one.elements % 8) - 1
            found = self._count(bits, one.elements)
        elif one.mode == GAPS:
            found = self._read_gaps(reader, one, bits)
        else:
            bits[: one.elements // 8 + 1] = 0xFF if one.mode == FULL else 0
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
        if not kernels.unpair(pairs, one.ones, rest, symbols):
            raise Damaged("the symbols of a frame do not add up")

    def _read_gaps(self, reader: FrameReader, one: _Class, bits: Bytes) -> int:
        """Make the bits from gaps; gives how many are set."""
        rarer = min(one.ones, one.elements - one.ones)
        flipped = one.ones != rarer
        data = self._stream(reader.take(one.positions), one.gaps)
        low_bits = rarer * one.low
        if low_bits > 8 * (len(self._low) - SLACK):
            raise Damaged("the gaps of a frame are too long")
        _put(self._low, np.frombuffer(reader.take(-(-low_bits // 8)), np.uint8))
        found = kernels.ungaps(
            data, self._low, low_bits, one.low, bits, elements=one.elements, flip=flipped
        )
        if found != rarer:
            raise Damaged("the gaps of a frame do not add up")
        return one.ones

    def _count(self, bits: Bytes, elements: int) -> int:
        """Set bits among the first ``elements``."""
        bits[-(-elements // 8) : -(-elements // 64) * 8] = 0
        return entropy.survey(bits[: -(-elements // 64) * 8])[0]

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
