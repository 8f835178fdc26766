"""The flat address space: where each tensor's elements lie, and what a chunk covers.

Tensors lie in natural name order, each starting at a multiple of ALIGNMENT elements, so that its
mask is a whole-byte, 64-byte-aligned slice. The layout depends on names and sizes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES

ALIGNMENT = 512  #: elements; each tensor starts at a multiple of it
CHUNK = 1 << 26  #: elements of a chunk where nothing else is said: 8 MiB of mask, a stored object

IntArray = npt.NDArray[np.int64]


def bits_of(dtypes: Sequence[str]) -> IntArray:
    """Bits of an element of each dtype."""
    widths = {name: dtype.bits for name, dtype in DTYPES.items()}
    return np.fromiter(map(widths.__getitem__, dtypes), np.int64, len(dtypes))


@dataclass(frozen=True, slots=True)
class Spans:
    """Pieces of tensors that lie next to each other in the address space, in columns."""

    tensors: IntArray  #: positions in the layout
    starts: IntArray  #: first element, inside the tensor
    elements: IntArray
    addresses: IntArray  #: element address of the first element

    def __len__(self) -> int:
        return len(self.tensors)

    def without(self, tensors: npt.NDArray[np.bool_]) -> Spans:
        """The pieces but for those of some tensors; there is a flag for each of the layout."""
        leave_out = tensors[self.tensors]
        if not leave_out.any():
            return self
        columns = self.tensors, self.starts, self.elements, self.addresses
        return Spans(*(column[~leave_out] for column in columns))

    def cut(self, at: IntArray) -> Spans:
        """The same pieces, cut where one of the addresses ``at``, in order, is inside."""
        first = np.searchsorted(at, self.addresses, side="right")
        cuts = np.searchsorted(at, self.addresses + self.elements, side="left") - first
        if not cuts.any():
            return self
        of = np.repeat(np.arange(len(self)), cuts + 1)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1)
        begins = np.where(
            nth == 0, self.addresses[of], at[np.minimum(first[of] + nth, len(at)) - 1]
        )
        ends = np.where(nth == cuts[of], (self.addresses + self.elements)[of], np.r_[begins[1:], 0])
        starts = self.starts[of] + begins - self.addresses[of]
        return Spans(self.tensors[of], starts, ends - begins, begins)

    def byte_ranges(self, bits: IntArray) -> tuple[IntArray, IntArray]:
        """(first byte inside the tensor, bytes) of each piece, for readers.

        ``bits`` are those of one element, for each tensor of the layout.
        """
        width = bits[self.tensors]
        return self.starts * width // 8, self.elements * width // 8


class Layout:
    """Element counts in, addresses out.

    ``chunk`` is how many elements a chunk has. Stores need the default; results that are only added
    up are the same with any.
    """

    def __init__(self, elements: IntArray, chunk: int | None = None) -> None:
        self.chunk = CHUNK if chunk is None else chunk  #: elements
        assert self.chunk % ALIGNMENT == 0, "each chunk's mask begins with a whole word"
        self.elements = np.ascontiguousarray(elements, np.int64)
        padded = -(-self.elements // ALIGNMENT) * ALIGNMENT
        padded_ends = np.cumsum(padded)
        self.starts: IntArray = padded_ends - padded  #: element address of each tensor
        self._ends = self.starts + self.elements
        self.total = int(padded_ends[-1]) if len(padded_ends) else 0  #: padding included
        self.chunks = -(-self.total // self.chunk)  #: number of chunks

    def spans(self, first: int, stop: int) -> Spans:
        """What lies in the addresses [first, stop); tensors without elements lie nowhere."""
        low = int(np.searchsorted(self._ends, first, side="right"))
        high = int(np.searchsorted(self.starts, stop, side="left"))
        tensors = np.arange(low, max(low, high), dtype=np.int64)
        tensors = tensors[self.elements[tensors] > 0]
        begin = np.maximum(self.starts[tensors], first)
        end = np.minimum(self._ends[tensors], stop)
        keep = end > begin
        tensors, begin, end = tensors[keep], begin[keep], end[keep]
        return Spans(tensors, begin - self.starts[tensors], end - begin, begin)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """The addresses [first, stop) of a chunk."""
        first = chunk * self.chunk
        return first, min(first + self.chunk, self.total)
