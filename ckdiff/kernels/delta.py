"""Two windows into the streams of a packed delta, and back; what they mean: ckdiff.deltas.form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

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
)
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room

_ALL = 0xFFFFFFFFFFFFFFFF
_WORD, _LANES = 8, 64  # bytes that kernels read or write at a time, also past the end

#: bytes of a window that are made at a time: whoever takes them finds them in the cache of a core.
#: Whole units of content hashes for elements of any width, and whole words of any lane.
PIECE = 3 << 18

Ready = Callable[[int, Bytes], None]  #: told of a piece that was made, and where in the window


def no_one(start: int, piece: Bytes) -> None:
    """Whoever does not want to know; see Ready."""


class Streams(NamedTuple):
    """Buffers of one thread: rows for the classes, extra bits, and scratch of (3, LANES * 8).

    After what a window needs there are 72 more bytes in each row.
    """

    bits: Bytes
    symbols: Bytes
    extra: Bytes
    scratch: Bytes


class Split(NamedTuple):
    """What a class of a split window got; both lie in the buffers."""

    least: int
    elements: int
    bits: Bytes  #: whole words
    symbols: Bytes  #: one for each bit that is set


def split(
    kind: str, least: Sequence[int], base: Bytes, tuned: Bytes, into: Streams
) -> tuple[list[Split], Bytes, int]:
    """The classes from these magnitudes on; the extra bits; how many of those there are.

    ``kind`` is that of a form's lanes, which both windows are a multiple of.
    """
    state = _state(kind, least, len(base), into)
    if len(base) != len(tuned):
        raise ValueError("two windows of one size are split")
    room(into.extra, U8, len(base) + _WORD)
    run = c_function("split", kind).ctypes
    for a, b in _in_words(kind, base, tuned, into.scratch):
        run(
            place(a, U8), place(b, U8), len(a) // (LANES * _lane(kind)), len(least),
            place(state, I64), room(into.scratch[0], U8),
        )  # fmt: skip
    rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
    found = []
    for row, bits, symbols in zip(rows, into.bits, into.symbols, strict=False):
        elements, ones = int(row[CLASS_AT]), int(row[CLASS_SYMBOLS]) - place(symbols, U8)
        if elements % 64:
            bits.view(np.int64)[elements // 64] = row[CLASS_PENDING]
        found.append(Split(int(row[CLASS_LEAST]), elements, bits, symbols[:ones]))
    whole, rest = int(state[DELTA_EXTRA]) - place(into.extra, U8), int(state[DELTA_AT])
    into.extra[whole] = int(state[DELTA_PENDING]) & 0xFF
    return found, into.extra[: whole + (rest > 0)], 8 * whole + rest


def merge(
    kind: str,
    classes: Sequence[tuple[int, int]],
    extra: int,
    base: Bytes,
    out: Bytes,
    held: Streams,
    *,
    ready: Ready = no_one,
) -> bool:
    """Make the window that was split; whether the streams fit the base.

    ``classes`` are (least magnitude, elements), their bits and symbols in ``held``, with ``extra``
    bits. ``out`` must not overlap the base. ``ready`` is told of each piece of PIECE bytes as soon
    as it is made; of the last one where all streams fit, of none after the first that does not.
    """
    return Merging(kind, classes, extra, len(base), held).whole(base, out, ready)


class Merging:
    """A window that is made from its streams, at once or in parts as the base comes; see merge."""

    def __init__(
        self, kind: str, classes: Sequence[tuple[int, int]], extra: int, size: int, held: Streams
    ) -> None:
        """``size`` are the window's bytes. The streams must stay in ``held`` meanwhile."""
        self._state = _state(kind, [least for least, _ in classes], size, held)
        self._rows = self._state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
        self._rows[:, CLASS_TOTAL] = [elements for _, elements in classes]
        if sum(elements for _, elements in classes) > _padded(kind, size):
            raise ValueError("a window of another size is merged")
        place(held.extra, U8, extra // 8 + _WORD)
        self._kind, self._extra, self._held, self._left = kind, extra, held, size

    def whole(self, base: Bytes, out: Bytes, ready: Ready) -> bool:
        """Make all of it; whether the streams fit the base."""
        last = max(0, len(base) - 1) // PIECE * PIECE

        def told(at: int, piece: Bytes) -> None:
            if at < last:
                ready(at, piece)

        if self._left != len(base):
            raise ValueError("a window of another size is merged")
        if not self.add(base, out, told) or not self.finished():
            return False
        if len(out):
            ready(last, out[last:])
        return True

    def add(self, base: Bytes, out: Bytes, told: Ready = no_one) -> bool:
        """Make the next part; whether the streams fit the base so far.

        Parts are whole words of 64 lanes, the last one of the window apart.
        """
        word = LANES * _lane(self._kind)
        whole, rest = len(base) // word * word, len(base) % word
        if len(base) != len(out) or len(base) > self._left or (rest and len(base) < self._left):
            raise ValueError("a window of another size is merged")
        room(out, U8)
        run, scratch = c_function("merge", self._kind).ctypes, self._held.scratch
        for a, o, at in _in_pieces(base, out, word, scratch):
            if run(
                place(a, U8), place(o, U8), len(a) // word, len(self._rows),
                place(self._state, I64), self._extra, room(scratch[0], U8),
            ):  # fmt: skip
                return False
            told(at, o)
        out[whole:] = scratch[2][:rest]
        self._left -= len(base)
        return True

    def finished(self) -> bool:
        """Whether all of it is made, and nothing of the streams is left."""
        used = (self._rows[:, CLASS_AT] == self._rows[:, CLASS_TOTAL]).all()
        return not self._left and bool(self._state[DELTA_AT] == self._extra and used)


def tally(kind: str, base: Bytes, tuned: Bytes, every: int, shift: int, counts: Int64) -> int:
    """Add to ``counts`` each magnitude's elements and changed ones, of one in ``every`` words.

    The magnitudes are shifted to the right. Gives how many words there are.
    """
    words = min(len(base), len(tuned)) // (LANES * _lane(kind))
    c_function("tally", kind).ctypes(
        place(base, U8), place(tuned, U8), words, every, shift,
        room(counts, I64, 2 << (8 * _lane(kind) - 1 - shift)),
    )  # fmt: skip
    return words


class Gaps(NamedTuple):
    """Buffers of one thread: of gap bytes, of their low bits, and scratch of GAPS_SCRATCH."""

    high: Bytes
    low: Bytes
    scratch: Bytes


def gaps(
    bits: Bytes, elements: int, marked: int, low: int, into: Gaps, *, flip: bool
) -> tuple[Bytes, Bytes]:
    """High and low parts of the zeros before each one of ``elements`` bits; ``marked`` are ones.

    ``low`` is how many bits are in the low part. ``flip`` turns all bits around first.
    """
    sizes = np.zeros(2, np.int64)
    c_function("gaps").ctypes(
        place(bits, U8, -(-elements // 64) * 8), elements, _ALL if flip else 0, low,
        room(into.high, U8, marked + (elements >> low) // 255 + 1),
        room(into.low, U8, marked * low // 8 + _WORD),
        room(sizes, I64), room(into.scratch, U8, GAPS_SCRATCH),
    )  # fmt: skip
    high_bytes, low_bytes = sizes.tolist()
    return into.high[:high_bytes], into.low[:low_bytes]


def ungaps(
    high: Bytes, low_part: Bytes, low_bits: int, low: int, out: Bytes, *, elements: int, flip: bool
) -> int:
    """Make the bits again; how many gaps there were, or -1 where :func:`gaps` wrote none such."""
    return int(
        c_function("ungaps").ctypes(
            place(high, U8), len(high), place(low_part, U8, low_bits // 8 + _WORD), low_bits, low,
            _ALL if flip else 0, elements, room(out, U8, -(-elements // 64) * 8),
        )
    )  # fmt: skip


def pair(symbols: Bytes, count: int, pairs: Bytes, rest: Bytes) -> tuple[Bytes, Bytes]:
    """The first symbols two to a byte, and those by themselves that are too large for it.

    64 bytes after the symbols are cleared, which may lie past the buffer's end no more than they.
    """
    used = c_function("pair").ctypes(
        room(symbols, U8, count + _LANES), count, room(pairs, U8, -(-count // LANES) * LANES // 2),
        room(rest, U8, count + _LANES),
    )  # fmt: skip
    return pairs[: -(-count // 2)], rest[:used]


def unpair(pairs: Bytes, count: int, rest: Bytes, out: Bytes) -> bool:
    """Make the symbols again; whether that took all of the rest and no more."""
    used = c_function("unpair").ctypes(
        place(pairs, U8, -(-count // 2)), count, place(rest, U8), len(rest), room(out, U8, count)
    )
    return bool(used == len(rest))


def _lane(kind: str) -> int:
    """Bytes of a lane: ``16f portable`` has 2."""
    return int(kind.split()[0][:-1]) // 8


def _padded(kind: str, size: int) -> int:
    """Lanes of a window, the last word's all counted."""
    return -(-size // (LANES * _lane(kind))) * LANES


def _state(kind: str, least: Sequence[int], size: int, held: Streams) -> Int64:
    """The kernels' state at the start of a window of ``size`` bytes."""
    lanes = _padded(kind, size)
    if size % _lane(kind) or min(len(held.bits), len(held.symbols)) < len(least):
        raise ValueError("a window of half a lane, or more classes than buffers")
    room(held.scratch[0], U8, 8 * LANES)
    state = np.zeros(DELTA_HEAD + CLASS_COLUMNS * len(least), np.int64)
    state[DELTA_EXTRA] = room(held.extra, U8)
    rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
    rows[:, CLASS_LEAST] = least
    for row, bits, symbols in zip(rows, held.bits, held.symbols, strict=False):
        row[CLASS_BITS] = room(bits, U8, lanes // 8 + _WORD + 1)
        row[CLASS_SYMBOLS] = room(symbols, U8, lanes + _LANES)
    return state


def _in_pieces(
    base: Bytes, out: Bytes, word: int, scratch: Bytes
) -> Iterator[tuple[Bytes, Bytes, int]]:
    """Both windows in whole words of ``word`` bytes, a piece at a time, and where each begins; then
    what is left, as one word in the last rows of ``scratch``.
    """
    whole = len(base) // word * word
    for at in range(0, whole, PIECE):
        stop = min(at + PIECE, whole)
        yield base[at:stop], out[at:stop], at
    rest = len(base) - whole
    if rest:
        scratch[1:] = 0
        scratch[1][:rest] = base[whole:]
        yield scratch[1][:word], scratch[2][:word], len(base)


def _in_words(kind: str, one: Bytes, other: Bytes, scratch: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Both windows in whole words; what is left of them in the last rows of ``scratch``."""
    done = len(one) // (LANES * _lane(kind)) * LANES * _lane(kind)
    yield one[:done], other[:done]
    rest = len(one) - done
    if rest:
        scratch[1:] = 0
        scratch[1][:rest], scratch[2][:rest] = one[done:], other[done:]
        word = LANES * _lane(kind)
        yield scratch[1][:word], scratch[2][:word]
