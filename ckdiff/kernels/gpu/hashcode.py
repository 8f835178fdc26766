"""Content hashes on a device, in Triton: XXH3-128 of whole units, as :mod:`ckdiff.kernels.hashing`
adds them up. A unit has 256 bytes or more, in stripes of 64, of which XXH3 takes 16 into eight sums
before it scrambles these: in any order, so that lanes take them side by side.
"""

# as in fusedcode
from __future__ import annotations

import triton
import triton.language as tl

from ckdiff.kernels.hashing import START, UNIT, secret_words, starts

__all__ = ["digests", "ends", "words_of"]


def words_of(bits: int) -> tuple[int, ...]:
    """The numbers that ``digests`` takes for elements of so many bits.

    The secret by words, of which a stripe takes eight from its number on; then eight words for the
    last stripe, for the low half and for the high half of the result; what the sums begin with; and
    what both halves do.
    """
    last, halves = secret_words(121, 8), (secret_words(11, 8), secret_words(117, 8))
    low, high = starts(UNIT * bits // 8)
    return (*secret_words(0, 24), *last, *halves[0], *halves[1], *START, low, high)


@triton.jit  # type: ignore[untyped-decorator]
def digests(
    row: tl.tensor,
    unit: tl.tensor,
    sums: tl.tensor,
    step: tl.tensor,
    words: tl.tensor,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """Sums of the weighted digests of whole units of a row, UNITS of them from one on.

    ``row``: of a table. ``sums``: int64, each ``step`` after the one before: low and high half of
    the base, then of the tuned side. ``words``: see ``words_of``. Addresses are multiples of 8.
    """
    each = tl.arange(0, 2 * UNITS)  # of the base, then of the tuned side
    unit += each % UNITS
    whole = unit < tl.load(row + 2).to(tl.int32) // 512
    weight = tl.where(whole, _weight((tl.load(row + 5) + unit).to(tl.uint64)), 0)
    address = tl.load(row + each // UNITS) + unit.to(tl.int64) * (64 * BITS)
    data = address.to(tl.pointer_type(tl.uint64))
    found = _sums(data[:, None, None], whole[:, None, None], words, BITS, 2 * UNITS)
    out = sums + tl.arange(0, 2) * (2 * step)
    for half in tl.static_range(2):
        digest = _merged(found, words + 32 + 8 * half, _word(words + 56 + half), 2 * UNITS)
        total = tl.sum(tl.reshape(digest * weight, (2, UNITS)), axis=1)
        tl.store(out + half * step, total.to(tl.int64, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def _weight(unit: tl.tensor) -> tl.tensor:
    """:func:`ckdiff.kernels.hashing.weight`."""
    x = unit + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit  # type: ignore[untyped-decorator]
def _sums(
    data: tl.tensor,
    whole: tl.tensor,
    words: tl.tensor,
    STRIPES: tl.constexpr,
    UNITS: tl.constexpr,
) -> tl.tensor:
    """Eight sums over the stripes of each unit."""
    # a power of two: of 6 stripes there are 8, the last two of which add nothing
    SOME: tl.constexpr = 8 if STRIPES == 6 else min(STRIPES, 16)
    BLOCKS: tl.constexpr = (STRIPES + 15) // 16
    lane = tl.arange(0, 8)
    stripe, among = tl.arange(0, SOME)[None, :, None], lane[None, None, :]
    sums = tl.zeros((UNITS, 8), tl.uint64) + _word(words + 48 + lane)[None, :]
    for block in tl.static_range(BLOCKS):
        number = block * 16 + stripe
        there = number < STRIPES
        at = tl.where(number == STRIPES - 1, 24, stripe) + among
        secret = tl.load(words + at, mask=there, other=0).to(tl.uint64, bitcast=True)
        mixed = tl.load(data + number * 8 + among, mask=whole & there, other=0) ^ secret
        beside = tl.load(data + number * 8 + (among ^ 1), mask=whole & there, other=0)
        sums += tl.sum(beside + (mixed & 0xFFFFFFFF) * (mixed >> 32), axis=1)
        if block < BLOCKS - 1:
            sums = (sums ^ (sums >> 47) ^ _word(words + 16 + lane)[None, :]) * 0x9E3779B1
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _word(at: tl.tensor) -> tl.tensor:
    return tl.load(at).to(tl.uint64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _merged(sums: tl.tensor, words: tl.tensor, start: tl.tensor, UNITS: tl.constexpr) -> tl.tensor:
    """One half of the result from the sums: products of pairs, folded."""
    mixed = sums ^ _word(words + tl.arange(0, 8)[None, :])
    left, right = tl.split(tl.reshape(mixed, (UNITS, 4, 2)))
    found = tl.sum((left * right) ^ tl.umulhi(left, right), axis=1) + start
    found = (found ^ (found >> 37)) * 0x165667919E3779F9
    return found ^ (found >> 32)


@triton.jit  # type: ignore[untyped-decorator]
def ends(rows: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    """Copy some bytes of each row, (address, bytes), to N bytes of ``out`` for each."""
    row = tl.program_id(0)
    at = tl.arange(0, N)
    inside = at < tl.load(rows + 2 * row + 1)
    data = tl.load(rows + 2 * row).to(tl.pointer_type(tl.uint8))
    tl.store(out + row * N + at, tl.load(data + at, mask=inside, other=0), mask=inside)
