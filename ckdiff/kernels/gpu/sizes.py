"""How large pieces may be, so that all stages of all workers fit into the device memory allowed."""

from __future__ import annotations

from ckdiff.budget import MIB, format_size
from ckdiff.errors import BudgetError
from ckdiff.kernels import BLOCK
from ckdiff.kernels.gpu.tables import PROGRAM, table_bytes
from ckdiff.kernels.hashing import UNIT

__all__ = ["LARGEST_SIDE", "SMALLEST", "STAGES", "Sizes", "staging_memory"]

LARGEST_SIDE = 32 * MIB  #: bytes of one side of a piece that is copied
SMALLEST = BLOCK  #: elements of a piece
STAGES = 2  #: of each worker: one is filled while the device works on the other
# what is small (tables of pairs, sums), and what torch's allocator rounds up
_SLACK = 34 * MIB


class Sizes:
    """Of the buffers for one piece of so many elements, which a piece of any dtype fits into.

    ``bits`` are those of the widest dtype. Without ``copied`` all is on the device already: there
    is no room for sides, and a piece may be a whole window.
    """

    def __init__(self, window: int, rules: int, bits: int, *, copied: bool = True) -> None:
        self._rules, self._bits = rules, bits if copied else 0
        most = min(window, LARGEST_SIDE * 8 // bits) if copied else window
        self.largest = max(SMALLEST, most // BLOCK * BLOCK)  #: elements of a piece

    def parts(self, elements: int) -> tuple[int, int, int]:
        """Bytes of both sides, of the tables that say where elements are, and of masks, sums of
        digests and counts. All are multiples of 16.
        """
        programs, rules = elements // PROGRAM + elements // UNIT, self._rules
        found = rules * elements // 8 + (32 + 4 * rules) * programs
        return 2 * elements * self._bits // 8, table_bytes(elements), found

    def pinned(self, elements: int) -> int:
        """Bytes of pinned memory of a worker: torch rounds it up to powers of two."""
        return sum(1 << (STAGES * size - 1).bit_length() for size in self.parts(elements))

    def needed(self, elements: int, workers: int) -> int:
        """Bytes of device memory."""
        return workers * STAGES * sum(self.parts(elements)) + _SLACK

    def fitting(self, workers: int, memory: int) -> int:
        """The elements of the largest piece with which everything fits. Raises BudgetError."""
        elements = self.largest
        while self.needed(elements, workers) > memory and elements > SMALLEST:
            elements = halved(elements)
        needed = self.needed(elements, workers)
        if needed > memory:
            raise BudgetError(
                f"{format_size(memory)} of device memory is too little: with {workers} "
                f"worker{'s' if workers > 1 else ''} this needs {format_size(needed)}",
                hint="raise --device-memory" + (" or lower --workers" if workers > 1 else ""),
            )
        return elements


def halved(elements: int) -> int:
    """Elements of a piece of half the size."""
    return max(elements // 2 // BLOCK * BLOCK, SMALLEST)


def staging_memory(window: int, rules: int, bits: int) -> int:
    """Bytes of host memory, pinned on a GPU, that the stages of one worker take at most."""
    sizes = Sizes(window, rules, bits)
    return sizes.pinned(sizes.largest)
