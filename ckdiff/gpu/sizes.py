"""How large pieces may be, so that all stages of all workers fit into the device memory allowed."""

from __future__ import annotations

from collections.abc import Sequence

from ckdiff.budget import MIB, format_size
from ckdiff.dtypes import DType
from ckdiff.errors import BudgetError
from ckdiff.gpu import changes
from ckdiff.kernels import BLOCK
from ckdiff.kernels.binding import bind
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["LARGEST_SIDE", "SMALLEST_SIDE", "STAGES", "Sizes", "out_bytes", "staging_memory"]

SUMS = 8  #: bytes: the number of ones in a unit, one byte for each of its 8 columns
LARGEST_SIDE = 4 * MIB  #: bytes of one side of a piece
SMALLEST_SIDE = BLOCK * 8  #: of the widest elements a block
STAGES = 2  #: of each worker: one is filled while the device works on the other
_SLACK = 32 * MIB  # what torch's allocator rounds up, and tables


def out_bytes(elements: int, rules: int) -> int:
    """Bytes of the masks and sums of so many elements, a multiple of UNIT."""
    return rules * (elements // 8 + elements // UNIT * SUMS)


def staging_memory(window: int, rules: int) -> int:
    """Bytes of host memory, pinned on a GPU, that the stages of one worker take at most."""
    return STAGES * (2 * LARGEST_SIDE + out_bytes(window, rules))


class Sizes:
    """Sizes of pieces for some dtypes and rules. ``window`` is in elements."""

    def __init__(self, dtypes: Sequence[DType], rules: Sequence[Rule], window: int) -> None:
        self._rules, self._window = len(rules), window
        self._scratch = {
            dtype: max(changes.scratch_bytes(bind(rule, dtype), dtype) for rule in rules)
            for dtype in dtypes
        }

    def elements(self, dtype: DType, side: int) -> int:
        """Elements of a piece of ``side`` bytes, a multiple of BLOCK."""
        return max(min(side * 8 // dtype.bits, self._window) // BLOCK, 1) * BLOCK

    def out(self, side: int) -> int:
        """Bytes of the masks and sums of a piece of whatever dtype."""
        most = max((self.elements(dtype, side) for dtype in self._scratch), default=BLOCK)
        return out_bytes(most, self._rules)

    def needed(self, side: int, workers: int) -> int:
        """Bytes of device memory."""
        # the result under exact is kept while the other rules are evaluated
        scratch = max(
            (self.elements(dtype, side) * (each + 1) for dtype, each in self._scratch.items()),
            default=0,
        )
        return workers * STAGES * (2 * side + self.out(side)) + scratch + _SLACK

    def side(self, workers: int, memory: int) -> int:
        """The largest side, in bytes, with which everything fits. Raises BudgetError."""
        side = LARGEST_SIDE
        while self.needed(side, workers) > memory and side > SMALLEST_SIDE:
            side //= 2
        needed = self.needed(side, workers)
        if needed > memory:
            raise BudgetError(
                f"{format_size(memory)} of device memory is too little: with {workers} "
                f"worker{'s' if workers > 1 else ''} this needs {format_size(needed)}",
                hint="raise --device-memory" + (" or lower --workers" if workers > 1 else ""),
            )
        return side
