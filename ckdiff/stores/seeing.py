"""A checkpoint under the names that a mask store has: where that has parts, of fused tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, TensorTable
from ckdiff.checkpoints.views.parts import PartsView
from ckdiff.checkpoints.views.unfusing import Part, SideView, unfuse
from ckdiff.dtypes import DTYPES
from ckdiff.stores.matching import Matched


@dataclass(slots=True)
class Seen:
    """A checkpoint by a store's names."""

    checkpoint: Checkpoint
    #: fused tensors whose parts lie strided in them, by their position in the checkpoint's table;
    #: they are seen whole, and so are not among its names for whoever looks for parts
    woven: dict[int, list[Part]]


def seen_by(
    matched: Matched,
    checkpoint: Checkpoint,
    other: TensorTable | None = None,
    *,
    whole: bool = False,
) -> Seen:
    """All of a checkpoint by the names of a store's tensors, as far as these can be told.

    A store may lack some parts of a tensor; ``other``, the other checkpoint's, may have them.
    With ``whole`` fused tensors whose parts are not each in one run stay whole, and are listed.
    """
    store = _table(matched, checkpoint.table, other)
    found = unfuse(store, checkpoint.table)
    view = found.tuned
    if found.base is not None:
        view = _named(found.base, view, store, checkpoint.table)
    if view is None:
        return Seen(checkpoint, {})
    if not whole:
        return Seen(PartsView(checkpoint, view), {})
    return _with_whole(checkpoint, view)


def _table(matched: Matched, table: TensorTable, other: TensorTable | None) -> TensorTable:
    """The store's tensors as a checkpoint would have them, and what else only the other one has."""
    held = dict(zip(table.names, table.shapes, strict=True))
    shapes = [
        held.get(name, shape) if row in matched.resized else shape
        for row, (name, shape) in enumerate(zip(matched.names, matched.shapes, strict=True))
    ]
    names, dtypes = list(matched.names), list(matched.dtypes)
    known = {*names, *table.names}
    for i, name in enumerate(() if other is None else other.names):
        if name not in known and other is not None:
            names.append(name)
            dtypes.append(other.dtypes[i])
            shapes.append(other.shapes[i])
    sizes = [prod(s) * DTYPES[d].bits // 8 for s, d in zip(shapes, dtypes, strict=True)]
    return TensorTable(names, dtypes, shapes, np.array(sizes, np.int64))


def _named(
    store: SideView, view: SideView | None, table: TensorTable, other: TensorTable
) -> SideView | None:
    """A view with the store's own names for what it only has under other ones."""
    if view is None:
        view = SideView(np.arange(len(other), dtype=np.int64), list(other.names), [])
    own = {name: table.names[i] for i, name in zip(store.kept.tolist(), store.names, strict=True)}
    names = [own.get(name, name) for name in view.names]
    parts = [replace(part, name=own.get(part.name, part.name)) for part in view.parts]
    every = [*names, *(part.name for part in parts)]
    if len(set(every)) < len(every):
        return None
    return SideView(view.kept, names, parts)


def _with_whole(checkpoint: Checkpoint, view: SideView) -> Seen:
    parts: dict[int, list[Part]] = {}
    for part in view.parts:
        parts.setdefault(part.source, []).append(part)
    table = checkpoint.table
    # what does not have all of a tensor cannot be written to it as its parts
    whole = {
        source
        for source, found in parts.items()
        if not all(map(_in_one_run, found)) or _size(table, found) != table.nbytes[source]
    }
    kept = [*view.kept.tolist(), *sorted(whole)]
    names = [*view.names, *(table.names[source] for source in sorted(whole))]
    rest = [part for part in view.parts if part.source not in whole]
    every = [*names, *(part.name for part in view.parts)]
    if len(set(every)) < len(every):
        return Seen(checkpoint, {})
    woven = {kept.index(s): parts[s] for s in whole if _size(table, parts[s]) == table.nbytes[s]}
    seen = SideView(np.array(kept, np.int64), names, rest)
    return Seen(PartsView(checkpoint, seen) if rest or names != table.names else checkpoint, woven)


def _in_one_run(part: Part) -> bool:
    piece = part.pieces[0]
    return len(part.pieces) == 1 and piece.packed and piece.shape == part.shape


def _size(table: TensorTable, parts: list[Part]) -> int:
    """Bytes of the parts of one tensor."""
    return sum(prod(p.shape) * DTYPES[table.dtypes[p.source]].bits // 8 for p in parts)
