"""Fused against per-part names: two tables of tensors -> views of both in which they pair.

Nothing is read here. A tensor that holds several of the other side's gives way to its parts, under
the names that the other side has for them; a tensor that is only named otherwise gets the name of
the side that has more parts. What pairs as it is stays as it is, and so does whatever cannot be
told apart safely: a note says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.pieces import Piece
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.checkpoints.views.arranging import Box
from ckdiff.checkpoints.views.claims import Claims, Split
from ckdiff.checkpoints.views.matching import Guess, Index, best_guess
from ckdiff.checkpoints.views.splitting import Splitter
from ckdiff.dtypes import DTYPES

#: spellings that may lie over each other, as a vision tower's in a language model's
_ROUNDS = 6
_SETTLES = 4
#: characters of the longest name that is looked at
_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a view that lies inside a tensor of the side it is a view of."""

    name: str  #: the per-part side's name
    source: int  #: position of the fused tensor in the side's table, whose dtype it has
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  #: each one's ``source`` is a position in the side's table too


@dataclass(frozen=True, slots=True)
class SideView:
    """What takes the place of a side's table: some tensors as they are, and parts of the rest."""

    kept: IntArray  #: positions in the side's table, in its order
    names: list[str]  #: of the kept ones, as long as ``kept``
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Unfused:
    """The views of both sides; None where a side stays as it is."""

    base: SideView | None
    tuned: SideView | None
    notes: tuple[str, ...]  #: one line each


def unfuse(base: TensorTable, tuned: TensorTable) -> Unfused:
    """Views of two checkpoints in which fused and per-part tensors have the same names.

    The names of ``tuned`` are those after every ``--rename``. Both views have unique names. Takes
    time and memory in proportion to the number of tensors, and never raises for what a file says.
    """
    tables = (base, tuned)
    claims = Claims(tables, _unpaired(base, tuned))
    tried: list[Guess] = []
    for _ in range(_ROUNDS):
        open_names = [claims.open_names(side) for side in (0, 1)]
        if not all(open_names):
            break
        sides = [Index(tables[side], open_names[side]) for side in (0, 1)]
        guess = best_guess(sides, tried)
        if guess is None:
            break
        _match(claims, sides, guess)
        tried.append(guess)
    return _finished(tables, claims)


def _unpaired(base: TensorTable, tuned: TensorTable) -> tuple[list[int], list[int]]:
    """The positions of each side that do not pair as they are and may be looked at."""
    found: list[list[int]] = []
    for one, other in ((base, tuned), (tuned, base)):
        shapes = dict(zip(other.names, other.shapes, strict=True))
        found.append(
            [
                i
                for i, (name, shape) in enumerate(zip(one.names, one.shapes, strict=True))
                if shapes.get(name) != shape
                and len(name) <= _LONGEST
                and one.nbytes[i] > 0
                and DTYPES[one.dtypes[i]].bits % 8 == 0
            ]
        )
    return found[0], found[1]


def _match(claims: Claims, sides: list[Index], guess: Guess) -> None:
    """Claim all that is found under a guess."""
    if guess.chain:
        old = sides[guess.old]
        renamed = {i: guess.name(name) for i, name in old.names.items()}
        sides = list(sides)
        sides[guess.old] = Index(old.table, renamed)
    splitter = Splitter(claims, sides)
    splitter.same_names()
    for side in (0, 1):
        splitter.fused(side)


def _finished(tables: tuple[TensorTable, TensorTable], claims: Claims) -> Unfused:
    """The views, without whatever would give two tensors one name."""
    claims.choose_keeper()
    for _ in range(_SETTLES):
        views = tuple(_view(tables, claims, side) for side in (0, 1))
        twice = [_twice(view) for view in views]
        if not any(twice):
            break
        claims.drop_named(twice)
    else:
        claims.drop_all()
        views = tuple(_view(tables, claims, side) for side in (0, 1))
    notes = claims.left_alone()
    if claims.splits or claims.renamed:
        notes.insert(0, _summary(tables, claims))
    changed = [
        bool(view.parts) or view.names != tables[side].names for side, view in enumerate(views)
    ]
    return Unfused(views[0] if changed[0] else None, views[1] if changed[1] else None, tuple(notes))


def _twice(view: SideView) -> set[str]:
    names = [*view.names, *(part.name for part in view.parts)]
    if len(set(names)) == len(names):
        return set()
    return {name for name, count in Counter(names).items() if count > 1}


def _view(tables: tuple[TensorTable, TensorTable], claims: Claims, side: int) -> SideView:
    table = tables[side]
    names = list(table.names)
    keeper = claims.keeper
    if side != keeper:
        for pair in claims.renamed:
            names[pair[side]] = tables[keeper].names[pair[keeper]]
    gone = {split.position for split in claims.splits if split.side == side}
    kept = [i for i in range(len(table)) if i not in gone]
    parts = [part for split in claims.splits if split.side == side for part in _parts(table, split)]
    return SideView(np.array(kept, np.int64), [names[i] for i in kept], parts)


def _parts(table: TensorTable, split: Split) -> list[Part]:
    size = DTYPES[table.dtypes[split.position]].bits // 8
    return [
        Part(
            part.name,
            split.position,
            part.shape,
            tuple(_piece(split.position, at, box, size) for at, box in part.boxes),
        )
        for part in split.parts
    ]


def _piece(source: int, at: tuple[int, ...], box: Box, size: int) -> Piece:
    return Piece(source, box.offset * size, at, box.shape, box.strides)


def _summary(tables: tuple[TensorTable, TensorTable], claims: Claims) -> str:
    """One line about all that is compared under other names than it has."""
    said = []
    words = ("base", "tuned")
    for side in (0, 1):
        splits = [split for split in claims.splits if split.side == side]
        if splits:
            parts = sum(len(split.parts) for split in splits)
            first = splits[0]
            said.append(
                f"{_count(len(splits), 'fused tensor')} of {words[side]} compared as "
                f"{_count(parts, 'part')}, for example "
                f"{shown(tables[side].names[first.position])} as "
                f"{shown(first.parts[0].name)}"
            )
    if claims.renamed:
        keeper = claims.keeper
        pair = claims.renamed[0]
        said.append(
            f"{_count(len(claims.renamed), 'tensor')} of {words[1 - keeper]} compared under "
            f"{words[keeper]}'s names, for example "
            f"{shown(tables[1 - keeper].names[pair[1 - keeper]])} as "
            f"{shown(tables[keeper].names[pair[keeper]])}"
        )
    return "; ".join(said)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
