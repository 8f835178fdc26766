"""What is compared of one checkpoint, and of both at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.layout import Spans, bits_of


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What is compared of one checkpoint; columns have an entry for each pair."""

    checkpoint: Checkpoint
    index: IntArray  #: position of the tensor in the checkpoint's table
    dtypes: list[str]
    bits: IntArray  #: of one element
    nbytes: IntArray

    @classmethod
    def of(cls, checkpoint: Checkpoint, index: IntArray, elements: IntArray) -> Side:
        """``elements`` are those that are compared of each tensor."""
        dtypes = [checkpoint.table.dtypes[i] for i in index.tolist()]
        bits = bits_of(dtypes)
        return cls(checkpoint, index, dtypes, bits, elements * bits // 8)


Wanted = tuple[IntArray, IntArray, IntArray]


@dataclass(slots=True)
class Window:
    """Some addresses of a chunk, and what has to be read for them."""

    first: int  #: element address
    stop: int
    spans: Spans
    rows: IntArray  #: of the spans in the chunk's results
    #: of base and tuned: positions in its table, first bytes inside the tensors, bytes
    wanted: tuple[Wanted, Wanted]

    @property
    def nbytes(self) -> int:
        """Bytes that are read, of both sides."""
        return sum(int(nbytes.sum()) for _, _, nbytes in self.wanted)
