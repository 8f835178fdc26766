"""Content hashes on a device, in Triton: XXH3-128 of whole units, as :mod:`ckdiff.kernels.hashing`
adds them up. A unit has 256 bytes or more, of which XXH3 takes 64 at a time into eight sums.
"""

# as in fusedcode
from __future__ import annotations

import triton
import triton.language as tl

from ckdiff.kernels.hashing import START, secret_words, starts

__all__ = ["WORDS", "digest", "ends", "starts"]


#: the secret by words, of which a stripe takes eight from its number on; then eight words for the
#: last stripe, for the low half and for the high half of the result; and what the sums begin with
WORDS = (
    *secret_words(0, 24), *secret_words(121, 8), *secret_words(11, 8), *secret_words(117, 8),
    *START,
)  # fmt: skip


# as in fusedcode
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["programs"], do_not_specialize_on_alignment=["rows", "owners", "sums"]
)
def digest(
    rows: tl.tensor,
    owners: tl.tensor,
    sums: tl.tensor,
    words: tl.tensor,
    programs: tl.tensor,
    SIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sums of the weighted digests of whole units of both sides; UNITS a program, of SIZE bytes.

    ``sums``: int64 (4, programs), low and high half of the base, then of the tuned side. ``words``:
    WORDS. LOW and HIGH: see ``starts``. Addresses are multiples of 8.
    """
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * COLUMNS
    unit = (program - tl.load(row + 4).to(tl.int32)) * UNITS + tl.arange(0, UNITS)
    whole = unit < tl.load(row + 2).to(tl.int32) // 512
    weight = tl.where(whole, _weight((tl.load(row + 5) + unit).to(tl.uint64)), 0)
    for side in tl.static_range(2):
        data = tl.load(row + side).to(tl.pointer_type(tl.uint64))
        found = _sums(
            data + (unit.to(tl.int64) * (SIZE // 8))[:, None], whole[:, None], words, SIZE
        )
        for half in tl.static_range(2):
            half_digest = _merged(found, words + 32 + 8 * half, HIGH if half else LOW, UNITS)
            total = tl.sum(half_digest * weight, axis=0).to(tl.int64, bitcast=True)
            tl.store(sums + (2 * side + half) * programs + program, total)


@triton.jit  # type: ignore[untyped-decorator]
def _weight(unit: tl.tensor) -> tl.tensor:
    """:func:`ckdiff.kernels.hashing.weight`."""
    x = unit + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit  # type: ignore[untyped-decorator]
def _sums(data: tl.tensor, whole: tl.tensor, words: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Eight sums over the stripes of each unit."""
    lane = tl.arange(0, 8)[None, :]
    sums = _word(words + 48 + lane)
    for stripe in tl.static_range((SIZE - 1) // 64):
        sums = _added(sums, data + stripe * 8, whole, words + stripe % 16)
        if stripe % 16 == 15:
            sums = (sums ^ (sums >> 47) ^ _word(words + 16 + lane)) * 0x9E3779B1
    return _added(sums, data + (SIZE // 8 - 8), whole, words + 24)


@triton.jit  # type: ignore[untyped-decorator]
def _added(sums: tl.tensor, data: tl.tensor, whole: tl.tensor, words: tl.tensor) -> tl.tensor:
    """The sums and one stripe more."""
    lane = tl.arange(0, 8)[None, :]
    mixed = tl.load(data + lane, mask=whole, other=0) ^ _word(words + lane)
    beside = tl.load(data + (lane ^ 1), mask=whole, other=0)
    return sums + beside + (mixed & 0xFFFFFFFF) * (mixed >> 32)


@triton.jit  # type: ignore[untyped-decorator]
def _word(at: tl.tensor) -> tl.tensor:
    return tl.load(at).to(tl.uint64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _merged(
    sums: tl.tensor, words: tl.tensor, START: tl.constexpr, UNITS: tl.constexpr
) -> tl.tensor:
    """One half of the result from the sums: products of pairs, folded."""
    mixed = sums ^ _word(words + tl.arange(0, 8)[None, :])
    left, right = tl.split(tl.reshape(mixed, (UNITS, 4, 2)))
    found = tl.sum((left * right) ^ tl.umulhi(left, right), axis=1) + START
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
