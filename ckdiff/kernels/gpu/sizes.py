"""How large pieces may be, so that all stages of all workers fit into the device memory allowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ckdiff.budget import MIB, format_size
from ckdiff.dtypes import DType
from ckdiff.errors import BudgetError
from ckdiff.kernels import BLOCK
from ckdiff.kernels.binding import bind
from ckdiff.kernels.gpu import changes
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["LARGEST_SIDE", "SMALLEST_SIDE", "STAGES", "Sizes", "out_bytes", "staging_memory"]

COUNT = 4  #: bytes: the number of ones in a unit
LARGEST_SIDE = 4 * MIB  #: bytes of one side of a piece
SMALLEST_SIDE = BLOCK * 8  #: of the widest elements a block
STAGES = 2  #: of each worker: one is filled while the device works on the other
_SLACK = 32 * MIB  # what is small: tables, sums, and torch's blocks for them

# torch's allocator takes memory for large blocks 20 MiB at a time, or, from 10 MiB on, alone and
# rounded up to 2 MiB
_SHARED, _ALONE, _ROUNDED = 20 * MIB, 10 * MIB, 2 * MIB


def out_bytes(elements: int, rules: int) -> int:
    """Bytes of the masks and counts of so many elements, a multiple of UNIT."""
    return rules * (elements // 8 + elements // UNIT * COUNT)


def largest_side(window: int, bits: int) -> int:
    """Bytes of one side of the largest piece of a window, in elements of so many bits."""
    return min(LARGEST_SIDE, max(SMALLEST_SIDE, window * bits // 8))


def staging_memory(window: int, rules: int, bits: int) -> int:
    """Bytes of host memory, pinned on a GPU, that the stages of one worker take at most.

    ``bits`` are those of the widest dtype. torch rounds pinned memory up to a power of two.
    """
    into, out = 2 * largest_side(window, bits), out_bytes(window, rules)
    return sum(1 << (STAGES * size - 1).bit_length() for size in (into, out))


class Sizes:
    """Sizes of pieces for some dtypes and rules. ``window`` is in elements.

    ``eager`` are the dtypes that need memory for intermediate results.
    """

    def __init__(
        self,
        dtypes: Sequence[DType],
        rules: Sequence[Rule],
        window: int,
        eager: Collection[DType],
    ) -> None:
        self._rules, self._window = len(rules), window
        self._largest = largest_side(window, max((dtype.bits for dtype in dtypes), default=8))
        self._dtypes = dtypes
        self._scratch = {
            dtype: max(changes.scratch_bytes(bind(rule, dtype), dtype) for rule in rules)
            for dtype in eager
        }

    def elements(self, dtype: DType, side: int) -> int:
        """Elements of a piece of ``side`` bytes, a multiple of BLOCK."""
        return max(min(side * 8 // dtype.bits, self._window) // BLOCK, 1) * BLOCK

    def out(self, side: int) -> int:
        """Bytes of the masks and counts of a piece of whatever dtype."""
        most = max((self.elements(dtype, side) for dtype in self._dtypes), default=BLOCK)
        return out_bytes(most, self._rules)

    def scratch(self, side: int) -> int:
        """Bytes of intermediate results, which exist once."""
        # the result under exact is kept while the other rules are evaluated
        return max(
            (self.elements(dtype, side) * (each + 1) for dtype, each in self._scratch.items()),
            default=0,
        )

    def needed(self, side: int, workers: int) -> int:
        """Bytes of device memory, as torch takes them."""
        stages = STAGES * (2 * side + self.out(side))  # in one block
        return _taken(stages, workers) + _taken(self.scratch(side), 1) + _SLACK

    def side(self, workers: int, memory: int) -> int:
        """The largest side, in bytes, with which everything fits. Raises BudgetError."""
        side = self._largest
        while self.needed(side, workers) > memory and side > SMALLEST_SIDE:
            side = max(side // 2, SMALLEST_SIDE)
        needed = self.needed(side, workers)
        if needed > memory:
            raise BudgetError(
                f"{format_size(memory)} of device memory is too little: with {workers} "
                f"worker{'s' if workers > 1 else ''} this needs {format_size(needed)}",
                hint="raise --device-memory" + (" or lower --workers" if workers > 1 else ""),
            )
        return side


def _taken(size: int, blocks: int) -> int:
    """Bytes that torch's allocator takes for so many blocks of a size above 1 MiB."""
    if size >= _ALONE:
        return blocks * -(-size // _ROUNDED) * _ROUNDED
    return -(-blocks // (_SHARED // size)) * _SHARED if size else 0
