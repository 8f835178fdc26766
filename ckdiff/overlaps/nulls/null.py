"""What a null is, and what it is given to say what chance would do.

Some nulls need only what the tables of the stores count. Others look at the masks while they pass
by: a *collector* sees the windows of a chunk; what it found out about a tensor is *evidence*, and
evidence of the parts of a tensor can be joined. Only a whole tensor's evidence says what chance
would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ckdiff.overlaps.nulls.base import Base
from ckdiff.overlaps.nulls.moments import FloatArray, IntArray, Moments
from ckdiff.stores.maskwalk import MaskSpans


class Evidence(Protocol):
    """What is known of some elements of one tensor, next to each other."""

    elements: int

    def join(self, later: Evidence) -> Evidence:
        """Evidence of these elements and the ones right after them."""

    def moments(self, tensor: int, base: Base | None) -> tuple[FloatArray, FloatArray]:
        """(mean, variance) of each pair's intersection; the evidence must be of the whole tensor.

        Raises CheckpointError where what was read of the base is not the stores' base.
        """


class Collector(Protocol):
    """Counts what one null needs. For one chunk and one thread."""

    def add(self, window: MaskSpans) -> None:
        """Look at a window; windows come in order."""

    def finish(self) -> dict[int, Evidence]:
        """Evidence by tensor (position in the layout)."""

    def close(self) -> None:
        """Let go of what is held."""


class Inputs(NamedTuple):
    """What a collector is made for."""

    dtypes: Sequence[str]  #: of the layout's tensors
    shapes: Sequence[tuple[int, ...]]
    stores: int
    base: Base | None  #: given where the null reads it


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What is known without a look at the masks: of every tensor, and of every row shown."""

    elements: IntArray  #: (tensors,)
    changed: IntArray  #: (stores, tensors)
    groups: IntArray  #: the group of each tensor
    number: int  #: of groups
    row_elements: IntArray  #: (rows,)
    row_changed: IntArray  #: (stores, rows)
    shown: Callable[[Moments], Moments]  #: from moments of the groups to those of the rows


@dataclass(frozen=True, slots=True)
class Null:
    """One notion of chance. It has either ``moments`` or ``collector``."""

    given: str  #: what it takes as given, a sentence
    rules_out: str  #: what a lift above 1 cannot be blamed on
    leaves: str  #: what it still can be blamed on
    moments: Callable[[Counts], Moments] | None = None  #: of the rows, where counts say enough
    collector: Callable[[Inputs], Collector] | None = None  #: where masks have to be looked at
    reads_base: bool = False
