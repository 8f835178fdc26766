"""What is claimed of two checkpoints: tensors of another name, and tensors that are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.arranging import Box, Shape

_WORDS = ("base", "tuned")


class PlannedPart(NamedTuple):
    """A part of a fused tensor."""

    name: str
    shape: Shape
    boxes: tuple[tuple[Shape, Box], ...]  #: where in the part each begins, and where it lies


@dataclass(slots=True)
class Split:
    """A tensor that gives way to its parts."""

    side: int  #: 0 base, 1 tuned
    position: int
    partners: list[int]  #: the other side's tensors of the same names
    parts: list[PlannedPart]


@dataclass(slots=True)
class Claims:
    """What is found so far; each tensor is claimed once."""

    tables: tuple[TensorTable, TensorTable]
    unpaired: tuple[list[int], list[int]]
    renamed: list[tuple[int, int]] = field(default_factory=list)  #: positions: base, tuned
    splits: list[Split] = field(default_factory=list)
    taken: tuple[set[int], set[int]] = field(default_factory=lambda: (set(), set()))
    #: why tensors are left as they are: side and position
    reasons: dict[str, dict[tuple[int, int], None]] = field(default_factory=dict)
    names: tuple[dict[str, int], dict[str, int]] = field(init=False)
    keeper: int = 0  #: the side whose names others get

    def __post_init__(self) -> None:
        self.names = tuple(  # type: ignore[assignment]
            {name: i for i, name in enumerate(table.names)} for table in self.tables
        )

    def open_names(self, side: int) -> dict[int, str]:
        """The names of what is not claimed, by position."""
        names, taken = self.tables[side].names, self.taken[side]
        return {i: names[i] for i in self.unpaired[side] if i not in taken}

    def rename(self, base: int, tuned: int) -> None:
        """Two tensors are one, under two names."""
        self.renamed.append((base, tuned))
        self.taken[0].add(base)
        self.taken[1].add(tuned)

    def split(self, split: Split) -> None:
        """A tensor holds others of the other side."""
        self.splits.append(split)
        self.taken[split.side].add(split.position)
        self.taken[1 - split.side].update(split.partners)

    def leave(self, side: int, position: int, reason: str) -> None:
        """A tensor stays as it is; once claimed by another guess, that is forgotten."""
        self.reasons.setdefault(reason, {})[side, position] = None

    def choose_keeper(self) -> None:
        """Choose the side whose names others get: that with more parts, else base."""
        counts = [0, 0]
        for split in self.splits:
            counts[1 - split.side] += len(split.parts)
        self.keeper = 1 if counts[1] > counts[0] else 0

    def drop_named(self, twice: Sequence[set[str]]) -> None:
        """Give up every claim that gives a side a name which it then has twice."""
        keeper = self.keeper
        names = self.tables[keeper].names
        kept_pairs = []
        for pair in self.renamed:
            if names[pair[keeper]] in twice[1 - keeper]:
                self.leave(1 - keeper, pair[1 - keeper], "its other name is taken")
            else:
                kept_pairs.append(pair)
        kept_splits = []
        for split in self.splits:
            if any(part.name in twice[split.side] for part in split.parts):
                self.leave(split.side, split.position, "the name of a part is taken")
            else:
                kept_splits.append(split)
        self.renamed, self.splits = kept_pairs, kept_splits

    def drop_all(self) -> None:
        """Give up every claim."""
        for split in self.splits:
            self.leave(split.side, split.position, "the name of a part is taken")
        self.renamed, self.splits = [], []

    def left_alone(self) -> list[str]:
        """One line for each reason why tensors stay as they are."""
        claimed = {(split.side, split.position) for split in self.splits}
        lines = []
        for reason, places in self.reasons.items():
            left = [place for place in places if place not in claimed]
            if left:
                side, position = left[0]
                many = f"{len(left):,} tensors" if len(left) > 1 else "1 tensor"
                lines.append(
                    f"{many} of {_WORDS[side]} left as stored: {reason}, for example "
                    f"{shown(self.tables[side].names[position])}"
                )
        return lines
