"""Which tensors of a run are compared: those that pair in all of its checkpoints."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ckdiff.checkpoints.pairing import Pairing
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.deltas.versions.version import Version
from ckdiff.diffs.comparison import Comparison, Selection
from ckdiff.diffs.sides import Side
from ckdiff.dtypes import common
from ckdiff.errors import PairingError, printable
from ckdiff.layout import Layout
from ckdiff.runs.timelines.versions import VersionSide


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """The checkpoints of a run, each against the first; columns have an entry for each tensor."""

    comparisons: list[Comparison]  #: of the first and each other one, all of one layout
    names: list[str]
    dropped: list[str]  #: paired with the first somewhere, but not everywhere

    @property
    def layout(self) -> Layout:
        """Where each tensor is, which is the same in all steps."""
        return self.comparisons[0].layout

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor."""
        return self.comparisons[0].shapes

    @property
    def sides(self) -> list[Side]:
        """What is read of each checkpoint, the first one's included."""
        return [self.comparisons[0].sides[0], *(each.sides[1] for each in self.comparisons)]

    def of(self, steps: Sequence[int]) -> MarchingPairs:
        """The pairs that are compared where the first side and those of ``steps`` are read."""
        sides = self.sides
        read = [sides[0], *(sides[step] for step in steps)]
        firsts = [dict(self.comparisons[step - 1].pairing.retyped) for step in steps]
        pairs = [(0, at) for at in range(1, len(read))] + list(pairwise(range(1, len(read))))
        wide = firsts + [_wide(read[a], read[b]) for a, b in pairs[len(steps) :]]
        folds = [_fold(sides[a + 1 : b + 1]) for a, b in pairwise([0, *steps])]
        return MarchingPairs(read, pairs, wide, [Fold([], sides[0]), *folds])


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Where the bytes of a side come from: what some versions, or none, make of another."""

    versions: list[Version]
    #: what is read for it: the side itself, or a full version that the others are made from. None
    #: where they are made from the side before
    start: Side | None


@dataclass(frozen=True, slots=True, eq=False)
class MarchingPairs:
    """The sides that are read together, and which two are compared, as the kernels have it."""

    sides: list[Side]
    pairs: list[tuple[int, int]]  #: of the first side, then of neighbours
    #: for each pair the dtype by whose values a tensor of two dtypes is compared, by position
    wide: list[dict[int, str]]
    folds: list[Fold]  #: for each side

    @property
    def read(self) -> list[Side]:
        """What is read: the sides, but of those that are made from others what these begin with."""
        return [fold.start for fold in self.folds if fold.start is not None]

    def folded(self) -> list[Fold]:
        """The versions that follow each other, and what the first of them is made from."""
        found: list[Fold] = []
        for fold in self.folds:
            if fold.start is not None:
                found.append(Fold([], fold.start))
            found[-1].versions.extend(fold.versions)
        return [fold for fold in found if fold.versions]

    def kinds(self, pair: int) -> list[str]:
        """The dtype by whose values each tensor is compared."""
        kinds = list(self.sides[self.pairs[pair][0]].dtypes)
        for tensor, kind in self.wide[pair].items():
            kinds[tensor] = kind
        return kinds


def pair_all(checkpoints: Sequence[Checkpoint], selection: Selection) -> Pairs:
    """Pair each checkpoint with the first, and keep what pairs in all of them.

    Raises PairingError where nothing does, and UsageError for what the selection cannot be.
    """
    first, *others = checkpoints
    pairings = [selection.pair(first.table, other.table) for other in others]
    shared = set(pairings[0].names).intersection(*(pairing.names for pairing in pairings[1:]))
    shared -= _unlike(checkpoints, pairings, shared)
    if not shared:
        raise PairingError(
            f"no tensor is in all {len(checkpoints)} checkpoints",
            hint="check that all are checkpoints of one run",
        )
    kept, comparisons, dropped = [n for n in pairings[0].names if n in shared], [], []
    for other, pairing in zip(others, pairings, strict=True):
        left_out = [name for name in pairing.names if name not in shared]
        dropped += left_out
        chosen = selection
        if left_out:
            globs = (*selection.exclude, *map(glob.escape, left_out))
            chosen, pairing = replace(selection, exclude=globs), _only(pairing, shared)
        comparisons.append(Comparison(first, other, chosen, (), pairing))
    assert all(each.pairing.names == kept for each in comparisons)
    return Pairs(comparisons, kept, list(dict.fromkeys(dropped)))


def _unlike(
    checkpoints: Sequence[Checkpoint], pairings: Sequence[Pairing], names: set[str]
) -> set[str]:
    """Of ``names`` those whose dtypes in two neighbours have none that holds both."""
    found = set()
    for (one, before), (other, after) in pairwise(zip(checkpoints[1:], pairings, strict=True)):
        if not before.retyped and not after.retyped:
            continue
        earlier, later = (
            {n: c.table.dtypes[i] for n, i in zip(p.names, p.tuned_index.tolist(), strict=True)}
            for c, p in ((one, before), (other, after))
        )
        for name in names:
            a, b = earlier[name], later[name]
            if a != b and common(a, b) is None:
                found.add(name)
    return found


def _only(pairing: Pairing, names: set[str]) -> Pairing:
    """What is left of a pairing where only ``names`` are compared."""
    keep = [i for i, name in enumerate(pairing.names) if name in names]
    at = {old: new for new, old in enumerate(keep)}
    index: IntArray = np.array(keep, np.int64)
    return replace(
        pairing,
        names=[pairing.names[i] for i in keep],
        base_index=pairing.base_index[index],
        tuned_index=pairing.tuned_index[index],
        excluded=pairing.excluded + len(pairing.names) - len(keep),
        retyped={at[i]: kind for i, kind in pairing.retyped.items() if i in at},
    )


def _fold(sides: Sequence[Side]) -> Fold:
    """How the last of some sides that follow each other comes from what is before them."""
    found = Fold([], None)
    for side in sides:
        if isinstance(side.checkpoint, VersionSide):
            found.versions.append(side.checkpoint.version)
        else:
            found = Fold([], side)
    return found


def _wide(one: Side, other: Side) -> dict[int, str]:
    """By position the dtype by whose values two sides are compared where theirs differ."""
    found = {}
    for i, (a, b) in enumerate(zip(one.dtypes, other.dtypes, strict=True)):
        if a != b:
            kind = common(a, b)
            assert kind is not None, "such tensors are left out"
            found[i] = kind
    return found


def left_out_note(pairs: Pairs) -> str | None:
    """What people are told of tensors that are in some checkpoints only, if there are any."""
    named = {u.name for each in pairs.comparisons for u in each.pairing.unpaired}
    lacking = sorted({*pairs.dropped, *named})
    if not lacking:
        return None
    many = "1 tensor is" if len(lacking) == 1 else f"{len(lacking):,} tensors are"
    return (
        f"warning: {many} not in all checkpoints with one shape, and left out, such as "
        f"{printable(lacking[0])}"
    )
