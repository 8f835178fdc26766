"""How large pieces may be, so that all stages of all workers fit into the device memory allowed."""

from __future__ import annotations

from ckdiff.budget import MIB, format_size
from ckdiff.errors import BudgetError
from ckdiff.kernels import BLOCK
from ckdiff.kernels.gpu.tables import PROGRAM, table_bytes
from ckdiff.kernels.hashing import UNIT

__all__ = ["LARGEST_SIDE", "SMALLEST", "STAGES", "Sizes", "staging_memory"]

LARGEST_SIDE = 32 * MIB  #: bytes of one side of a piece
SMALLEST = BLOCK  #: elements of a piece
STAGES = 2  #: of each worker: one is filled while the device works on the other
_SLACK = 32 * MIB  # what is small: tables of pairs, sums, and torch's blocks for them

# torch's allocator takes memory for large blocks 20 MiB at a time, or, from 10 MiB on, alone and
# rounded up to 2 MiB
_SHARED, _ALONE, _ROUNDED = 20 * MIB, 10 * MIB, 2 * MIB


class Sizes:
    """Of the buffers for one piece of so many elements, which a piece of any dtype fits into.

    ``bits`` are those of the widest dtype.
    """

    def __init__(self, window: int, rules: int, bits: int) -> None:
        self._rules, self._bits = rules, bits
        most = min(window, LARGEST_SIDE * 8 // bits)
        self.largest = max(SMALLEST, most // BLOCK * BLOCK)  #: elements of a piece

    def side(self, elements: int) -> int:
        """Bytes of one side."""
        return elements * self._bits // 8

    def tables(self, elements: int) -> int:
        """Bytes of the tables that say where elements are."""
        return table_bytes(elements)

    def out(self, elements: int) -> int:
        """Bytes of masks, digests and counts."""
        units, rules = elements // UNIT, self._rules
        return rules * elements // 8 + 32 * units + 4 * rules * (elements // PROGRAM + units)

    def pinned(self, elements: int) -> int:
        """Bytes of pinned memory of a worker: torch rounds it up to powers of two."""
        each = (2 * self.side(elements), self.tables(elements), self.out(elements))
        return sum(1 << (STAGES * size - 1).bit_length() for size in each)

    def there(self, elements: int) -> int:
        """Bytes of device memory of a stage."""
        return 2 * self.side(elements) + self.tables(elements) + self.out(elements)

    def needed(self, elements: int, workers: int) -> int:
        """Bytes of device memory, as torch takes them."""
        return _taken(STAGES * self.there(elements), workers) + _SLACK

    def fitting(self, workers: int, memory: int) -> int:
        """The elements of the largest piece with which everything fits. Raises BudgetError."""
        elements = self.largest
        while self.needed(elements, workers) > memory and elements > SMALLEST:
            elements = max(elements // 2 // BLOCK * BLOCK, SMALLEST)
        needed = self.needed(elements, workers)
        if needed > memory:
            raise BudgetError(
                f"{format_size(memory)} of device memory is too little: with {workers} "
                f"worker{'s' if workers > 1 else ''} this needs {format_size(needed)}",
                hint="raise --device-memory" + (" or lower --workers" if workers > 1 else ""),
            )
        return elements


def staging_memory(window: int, rules: int, bits: int) -> int:
    """Bytes of host memory, pinned on a GPU, that the stages of one worker take at most."""
    sizes = Sizes(window, rules, bits)
    return sizes.pinned(sizes.largest)


def _taken(size: int, blocks: int) -> int:
    """Bytes that torch's allocator takes for so many blocks of a size above 1 MiB."""
    if size >= _ALONE:
        return blocks * -(-size // _ROUNDED) * _ROUNDED
    return -(-blocks // (_SHARED // size)) * _SHARED
