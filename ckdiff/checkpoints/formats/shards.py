"""Which part of a tensor one process of a sharded run has: by its mesh, its placements, its shards.

A ``DTensor`` says how it is cut, and where in the mesh it was pickled; what that means for its
elements is what ``torch.chunk`` does with them, dimension after dimension of the mesh. A
``ShardedTensor`` of old says the places of its shards. What a file says is held against the local
tensor that it has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ckdiff.checkpoints.formats.covering import Shape, is_shape
from ckdiff.checkpoints.formats.pickledvalues import Record, Tensor, shown
from ckdiff.checkpoints.formats.torcharchive import unsupported

_MOST_RUNS = 1 << 8  # along one dimension of one shard, and boxes of it
_MOST_RANKS = 1 << 24
#: (first, count) of indices that lie one after the other; a few make what a rank has of a dimension
Runs = list[tuple[int, int]]


class Part(NamedTuple):
    """A box of a whole tensor, and the box of a local tensor that it is."""

    at: Shape  #: in the whole
    inner: Shape  #: in the local tensor
    shape: Shape


class Local(NamedTuple):
    """What one process has of a tensor."""

    shape: Shape  #: of the whole
    tensors: list[tuple[Tensor, list[Part]]]


def local_of(value: Any) -> Local | str:
    """What a value of a rank's state dict has of its tensor; or why that is not read.

    Raises ValueError, with a phrase, where what it says of itself does not fit together.
    """
    if type(value) is Tensor:
        reason = unsupported(value)
        if reason is not None:
            return reason
        whole = Part((0,) * len(value.shape), (0,) * len(value.shape), value.shape)
        return Local(value.shape, [(value, [whole])])
    kind = value.what.qualname
    if kind == "DTensor":
        return _of_dtensor(value)
    if kind == "ShardedTensor":
        return _of_shards(value)
    return unsupported(value) or "of a kind that ckdiff does not read"


def _of_dtensor(value: Record) -> Local | str:
    local, spec = value.field("_local_tensor"), value.field("_spec")
    shape = value.args[2] if len(value.args) > 2 else None
    if type(local) is not Tensor or type(spec) is not Record or not is_shape(shape):
        raise ValueError("does not say what it is a shard of")
    reason = unsupported(local)
    if reason is not None:
        return reason
    placements = spec.field("placements")
    if type(placements) not in (tuple, list) or len(placements) > 64:
        raise ValueError("does not say how it is cut")
    kinds = [p.what.qualname if type(p) is Record else "" for p in placements]
    for kind in kinds:
        if kind not in ("Shard", "Replicate", "_StridedShard"):
            return f"a DTensor whose placement is {shown(kind or 'not known', 40)}"
    mesh = spec.field("mesh")
    sizes, here = mesh_shape(mesh), _coordinate(mesh)
    if sizes is None or here is None or not len(sizes) == len(here) == len(placements):
        raise ValueError("does not say where in its mesh it is")
    if any(not 0 <= i < n for i, n in zip(here, sizes, strict=True)):
        raise ValueError("is outside of its mesh")
    cuts = _cuts(placements, kinds, sizes, here, len(shape))
    readings = [cuts, _inner_first(cuts)] if _strided_first(spec) else [_ordered(cuts, spec)]
    for reading in readings:
        runs = cut(shape, tuple(reading))
        if tuple(sum(n for _, n in along) for along in runs) == local.shape:
            return Local(shape, [(local, parts_of(runs))])
    raise ValueError(f"has a local tensor of shape {list(local.shape)}, which is not its shard")


class Cut(NamedTuple):
    """One dimension of a tensor, cut for the processes along one dimension of a mesh."""

    dim: int  #: of the tensor
    mesh_dim: int
    ranks: int  #: processes
    here: int  #: which of them this one is
    split: int  #: 1, or into how many it is cut first, each of which is then shared


def _cuts(
    placements: Sequence[Any], kinds: list[str], sizes: Shape, here: Shape, rank: int
) -> list[Cut]:
    found = []
    for i, (placement, kind) in enumerate(zip(placements, kinds, strict=True)):
        if kind == "Replicate":
            continue
        dim = placement.field("dim")
        split = placement.field("split_factor", 1) if kind == "_StridedShard" else 1
        if type(dim) is not int or type(split) is not int or not 0 < split <= _MOST_RUNS:
            raise ValueError("does not say how it is cut")
        if not 0 <= dim < rank:
            raise ValueError(f"is cut along dimension {dim}, which it does not have")
        found.append(Cut(dim, i, sizes[i], here[i], split))
    return found


def _strided_first(spec: Record) -> bool:
    """Whether strided placements say the order of the cuts, as they always did before."""
    return spec.field("use_strided_shard_as_shard_order", True) is not False


def _inner_first(cuts: list[Cut]) -> list[Cut]:
    """The same cuts as they were made: what strided placements stand for comes last.

    Where the sizes do not divide, it is not what the placements say.
    """
    plain = [one for one in cuts if one.split == 1]
    strided = [one._replace(split=1) for one in cuts if one.split > 1]
    return plain + strided[::-1]


def _ordered(cuts: list[Cut], spec: Record) -> list[Cut]:
    """The cuts in the order that a spec may give them, for each dimension of the tensor."""
    order = spec.field("shard_order")
    if type(order) is not tuple or any(one.split > 1 for one in cuts):
        return cuts
    ranks: dict[tuple[int, int], int] = {}
    for entry in order:
        args = entry.args if type(entry) is Record else entry
        match args:
            case (int(dim), tuple(mesh_dims)) if len(mesh_dims) <= 64:
                for place, mesh_dim in enumerate(mesh_dims):
                    if type(mesh_dim) is int:
                        ranks[dim, mesh_dim] = place
            case _:
                raise ValueError("has an order of its cuts that cannot be read")
    return sorted(cuts, key=lambda one: ranks.get((one.dim, one.mesh_dim), one.mesh_dim))


def mesh_shape(mesh: Any) -> Shape | None:
    """The sizes of a mesh; versions of torch keep them in one of three ways."""
    if type(mesh) is not Record:
        return None
    for name in ("mesh", "_mesh"):
        ranks = mesh.field(name)
        if type(ranks) is Tensor:
            return ranks.shape
    layout = mesh.field("_layout")
    if type(layout) is not Record:
        return None
    axes = layout.field("axes")
    if type(axes) is tuple and len(axes) <= 64:
        sizes = [_total(axis.field("shape")) if type(axis) is Record else None for axis in axes]
    else:
        shape = layout.field("shape", layout.args[0] if layout.args else None)
        sizes = [_total(n) for n in (shape if type(shape) is tuple else (shape,))[:65]]
    return None if None in sizes else tuple(n for n in sizes if n is not None)


def _total(sizes: Any, depth: int = 0) -> int | None:
    """Processes along one dimension of a mesh, which may have been joined of several."""
    if type(sizes) is int:
        return sizes if 0 < sizes < _MOST_RANKS else None
    if type(sizes) is not tuple or len(sizes) > 64 or depth > 2:
        return None
    product = 1
    for size in sizes:
        inner = _total(size, depth + 1)
        if inner is None or (product := product * inner) >= _MOST_RANKS:
            return None
    return product


def _coordinate(mesh: Any) -> Shape | None:
    here = mesh.field("_coordinate_on_dim") if type(mesh) is Record else None
    if not isinstance(here, (list, tuple)) or len(here) > 64:
        return None
    return tuple(here) if all(type(i) is int for i in here) else None


@lru_cache(1 << 10)  # most tensors of a model are cut alike
def cut(shape: Shape, cuts: tuple[Cut, ...]) -> list[Runs]:
    """What is left of each dimension after some cuts, one after the other; ValueError."""
    runs: list[Runs] = [[(0, size)] if size else [] for size in shape]
    for dim, _, ranks, here, split in cuts:
        along = runs[dim]
        total = sum(n for _, n in along)
        outer = -(-total // split)
        found: Runs = []
        for piece in range(-(-total // outer) if outer else 0):
            begin = piece * outer
            size = min(outer, total - begin)
            inner = -(-size // ranks)
            low = min(here * inner, size)
            found += _slice(along, begin + low, begin + min(low + inner, size))
            if len(found) > _MOST_RUNS:
                raise ValueError("is cut into too many parts")
        runs[dim] = found
    return runs


def _slice(runs: Runs, begin: int, end: int) -> Runs:
    """The elements [begin, end) of some runs, as runs."""
    found, at = [], 0
    for first, count in runs:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            found.append((first + low - at, high - low))
        at += count
    return found


def parts_of(runs: list[Runs]) -> list[Part]:
    """The boxes of a whole tensor that a local one is made of; ValueError."""
    if math.prod(map(len, runs)) > _MOST_RUNS:
        raise ValueError("is cut into too many parts")
    sides = []
    for along in runs:
        inner = itertools.accumulate((count for _, count in along), initial=0)
        sides.append([(first, at, count) for (first, count), at in zip(along, inner, strict=False)])
    found = []
    for box in itertools.product(*sides):
        at, inner_at, extent = zip(*box, strict=True) if box else ((), (), ())
        found.append(Part(tuple(at), tuple(inner_at), tuple(extent)))
    return found


def _of_shards(value: Record) -> Local | str:
    state = value.state if type(value.state) is tuple else ()
    shards, metadata = (*state[:2], None, None)[:2]
    shape = metadata.field("size") if type(metadata) is Record else None
    if not isinstance(shards, (list, tuple)) or not is_shape(shape):
        raise ValueError("does not say what it is a shard of")
    found = []
    for shard in shards[: _MOST_RUNS + 1]:
        tensor, about = (
            shard.field(name) if type(shard) is Record else None for name in ("tensor", "metadata")
        )
        if type(tensor) is not Tensor or type(about) is not Record:
            raise ValueError("has a shard that cannot be read")
        reason = unsupported(tensor)
        if reason is not None:
            return reason
        at, sizes = about.field("shard_offsets"), about.field("shard_sizes")
        if type(at) not in (list, tuple) or type(sizes) not in (list, tuple):
            raise ValueError("has a shard that cannot be read")
        at, sizes = tuple(at), tuple(sizes)
        if not is_shape(at) or sizes != tensor.shape or not len(at) == len(sizes) == len(shape):
            raise ValueError(
                f"has a shard of shape {list(tensor.shape)}, which is not what it says"
            )
        found.append((tensor, [Part(at, (0,) * len(at), tensor.shape)]))
    if len(found) > _MOST_RUNS:
        raise ValueError("is cut into too many parts")
    return Local(shape, found)
