"""The base that the runs started from, for nulls that read its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, printable
from ckdiff.kernels import hashing
from ckdiff.overlaps.nulls.moments import IntArray
from ckdiff.stores.table import UNKNOWN


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The base checkpoint, and what its tensors must be."""

    checkpoint: Checkpoint
    index: IntArray  #: for each tensor of the layout, its position in the checkpoint
    bits: IntArray  #: of one element of each
    nbytes: IntArray  #: of each what the masks are of: the whole tensor, or its first rows
    hashes: Sequence[str]  #: content hashes that the stores recorded; UNKNOWN: none has read it
    names: Sequence[str]

    def verify(self, tensor: int, sums: npt.NDArray[np.uint64]) -> None:
        """Raise CheckpointError unless the content read is what the store was made from.

        ``sums`` are those of the content hash of all that the masks are of.
        """
        nbytes = int(self.nbytes[tensor])
        low, high = sums.tolist()
        wanted = self.hashes[tensor]
        if wanted != UNKNOWN and hashing.finish(low, high, nbytes) != wanted:
            raise CheckpointError(
                f"{self.checkpoint.label} is not the base of these stores: "
                f"{printable(self.names[tensor])} has other content",
                hint="give --base the checkpoint that the runs started from",
            )
