"""The code of :mod:`ckdiff.kernels.gpu.compact`, in Triton: a mask's ones, moved together.

The masks are small beside what was compared, so that both sides are read once only: what is read
here is a bit of each element, and those elements that changed.
"""

# as in fusedcode
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["compact"]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize_on_alignment=["rows", "owners", "ends", "positions", "values"]
)
def compact(
    rows: tl.tensor,
    owners: tl.tensor,
    masks: tl.tensor,
    ends: tl.tensor,
    positions: tl.tensor,
    values: tl.tensor,
    ELEMENT: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Positions and values of changed elements.

    ``rows`` and ``owners`` are those of the comparison, ``masks`` what it wrote, as uint32.
    ``ends``: int64 (programs,), the number of changed elements of each program and all before it.
    ``positions``: int64, of an element in its row. ``values``: ELEMENT, of the tuned side.
    """
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * COLUMNS
    first = (program - tl.load(row + 4).to(tl.int32)) * N
    n = tl.load(row + 2).to(tl.int32)
    tuned = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    at = tl.arange(0, N // 32)
    there = at < (n - first + 511) // 512 * 16
    words = tl.load(masks + tl.load(row + 3) * 16 + first // 32 + at, mask=there, other=0)
    words = words.to(tl.uint32, bitcast=True)
    ones = _population(words)
    until = tl.cumsum(ones, axis=0)
    place = tl.load(ends + program) - tl.sum(ones, axis=0) + until - ones
    # few elements change: from each word its lowest one is taken, until the fullest word has none
    for _ in range(tl.max(ones, axis=0)):
        lowest = words & (0 - words)
        changed = words != 0
        element = first + at * 32 + _population(lowest - 1)
        value = tl.load(tuned + element, mask=changed, other=0)
        tl.store(positions + place, element.to(tl.int64), mask=changed)
        tl.store(values + place, value, mask=changed)
        words = words ^ lowest
        place += 1


@triton.jit  # type: ignore[untyped-decorator]
def _population(words: tl.tensor) -> tl.tensor:
    """The ones of each uint32, as int32."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sums = (eights + (eights >> 8)).to(tl.int32)
    return (sums + (sums >> 16)) & 63
