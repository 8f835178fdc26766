"""Two checkpoints -> what each tuned tensor is made from in a delta."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ckdiff.checkpoints.pairing import Matching, Pairing, pair
from ckdiff.checkpoints.pieces import told
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.checkpoints.views.unfusing import SideView, Unfused, unfuse
from ckdiff.deltas.ranges import Range
from ckdiff.dtypes import DTYPES


@dataclass(slots=True)
class Bases:
    """Where the base has what tuned tensors are made from; columns in the order of these."""

    index: IntArray  #: position in the base's table, or -1
    odd: dict[int, Range]  #: as in Ranges
    pairing: Pairing  #: of tuned names: its base's positions are those of ``seen``
    seen: TensorTable  #: the base, with the parts that tuned tensors are made from by their names
    #: how many tuned tensors have no base only because it has their parts one by one, or has them
    #: as parts that do not lie in one run
    whole: int

    def note(self) -> str | None:
        """Why a delta may be larger than the change."""
        if not self.whole:
            return None
        many = self.whole > 1
        tensors = f"{self.whole:,} tensors are" if many else "1 tensor is"
        return told(
            f"{tensors} stored whole, because the base has only {'their' if many else 'its'} "
            "parts, or"
            "has them inside others: save both sides alike for a small delta"
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor, or a part of one that lies in one run."""

    source: int  #: position in the base's table
    begin: int  #: byte
    shape: tuple[int, ...]


def find_bases(base: TensorTable, tuned: TensorTable) -> Bases:
    """Of each tuned tensor what it is made from. Raises PairingError where nothing pairs."""
    views = unfuse(base, tuned)
    places = _places(base, tuned, views)
    seen = _seen(base, places)
    pairing = pair(seen, tuned, matching=Matching(common_rows=True), options=False)
    index = np.full(len(tuned), -1, np.int64)
    odd: dict[int, Range] = {}
    found = list(places.values())
    columns = zip(pairing.base_index.tolist(), pairing.tuned_index.tolist(), strict=True)
    for i, j in columns:
        place = found[i]
        index[j] = place.source
        name, shape = base.names[place.source], base.shapes[place.source]
        if (name, shape) != (tuned.names[j], tuned.shapes[j]):
            first = place.begin * 8 // max(DTYPES[base.dtypes[place.source]].bits, 1)
            both = min(prod(place.shape), prod(tuned.shapes[j]))
            odd[j] = Range(name, shape, first, both)
    return Bases(index, odd, pairing, seen, _stored_whole(tuned, views, index))


def _stored_whole(tuned: TensorTable, views: Unfused, index: IntArray) -> int:
    """See Bases.whole."""
    fused = {part.source for part in views.tuned.parts} if views.tuned is not None else set()
    parts = {part.name for part in views.base.parts} if views.base is not None else set()
    names = dict(enumerate(tuned.names))
    if views.tuned is not None:
        names |= dict(zip(views.tuned.kept.tolist(), views.tuned.names, strict=True))
    return sum(at in fused or names[at] in parts for at in np.flatnonzero(index < 0).tolist())


def _places(base: TensorTable, tuned: TensorTable, views: Unfused) -> dict[str, _Place]:
    """What the base has, by the names that the tuned side has for it."""
    places = {
        name: _Place(i, 0, shape)
        for i, (name, shape) in enumerate(zip(base.names, base.shapes, strict=True))
    }
    if views.base is None and views.tuned is None:
        return places
    whole_base, whole_tuned = (
        SideView(np.arange(len(table), dtype=np.int64), table.names, []) for table in (base, tuned)
    )
    held = _held(base, views.base or whole_base)
    view = views.tuned or whole_tuned
    used = set[str]()
    # parts of tuned tensors are not made one by one: those tensors have no base
    for j, name in zip(view.kept.tolist(), view.names, strict=True):
        place = held.get(name)
        if place is not None and (place.source, tuned.names[j]) != (
            places.get(tuned.names[j], _NOWHERE).source,
            base.names[place.source],
        ):
            places[tuned.names[j]] = place
            used.add(base.names[place.source])
    for name in used.difference(tuned.names):
        del places[name]
    return places


_NOWHERE = _Place(-1, 0, ())


def _held(base: TensorTable, view: SideView) -> dict[str, _Place]:
    """What a view of the base has in one run, by the view's names."""
    held = {
        name: _Place(i, 0, base.shapes[i])
        for i, name in zip(view.kept.tolist(), view.names, strict=True)
    }
    for part in view.parts:
        piece = part.pieces[0]
        if len(part.pieces) == 1 and piece.packed and piece.shape == part.shape:
            held[part.name] = _Place(piece.source, piece.begin, part.shape)
    return held


def _seen(base: TensorTable, places: dict[str, _Place]) -> TensorTable:
    found = list(places.values())
    dtypes = [base.dtypes[place.source] for place in found]
    sizes = [
        prod(place.shape) * DTYPES[dtype].bits // 8
        for place, dtype in zip(found, dtypes, strict=True)
    ]
    shapes = [place.shape for place in found]
    return TensorTable(list(places), dtypes, shapes, np.array(sizes, np.int64), base.absent)
