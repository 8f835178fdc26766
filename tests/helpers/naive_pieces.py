"""What pieces and views of tables mean, element by element, on numpy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.pieces import Piece
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.unfusing import Part, SideView

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


def gather(
    pieces: Sequence[Piece], sources: Sequence[Array], shape: tuple[int, ...] | None = None
) -> Array:
    """The tensor that pieces make up; every element must be in exactly one of them."""
    if shape is None:
        ends = [[a + s for a, s in zip(p.at, p.shape, strict=True)] for p in pieces]
        shape = tuple(max(each) for each in zip(*ends, strict=True))
    dtype = sources[pieces[0].source].dtype
    result = np.zeros(shape, dtype)
    times = np.zeros(shape, np.int64)
    for piece in pieces:
        flat = np.ascontiguousarray(sources[piece.source]).reshape(-1)
        begin, odd = divmod(piece.begin, dtype.itemsize)
        assert odd == 0
        for index in itertools.product(*map(range, piece.shape)):
            place = tuple(a + i for a, i in zip(piece.at, index, strict=True))
            where = begin + sum(i * s for i, s in zip(index, piece.strides, strict=True))
            assert 0 <= where < flat.size
            result[place] = flat[where]
            times[place] += 1
    assert (times == 1).all()
    return result


def strided(part: Part, sources: Sequence[Array]) -> Array:
    """As ``gather``, by numpy's strides: for tensors that are too large to go one by one."""
    result = np.zeros(part.shape, sources[part.source].dtype)
    for piece in part.pieces:
        flat = np.ascontiguousarray(sources[piece.source]).reshape(-1)
        size = flat.dtype.itemsize
        box = np.lib.stride_tricks.as_strided(
            flat[piece.begin // size :], piece.shape, [size * s for s in piece.strides]
        )
        result[tuple(slice(a, a + s) for a, s in zip(piece.at, piece.shape, strict=True))] = box
    return result


def table_of(tensors: Tensors, dtype: str = "F32") -> TensorTable:
    """The table of a checkpoint that holds these arrays."""
    return TensorTable(
        list(tensors),
        [dtype] * len(tensors),
        [array.shape for array in tensors.values()],
        np.array([array.nbytes for array in tensors.values()], np.int64),
    )


def viewed(tensors: Tensors, view: SideView | None, *, slow: bool = True) -> Tensors:
    """What a view of a checkpoint holds; its names are unique."""
    if view is None:
        return dict(tensors)
    arrays = list(tensors.values())
    result = {name: arrays[i] for i, name in zip(view.kept, view.names, strict=True)}
    assert len(result) == len(view.kept)
    for part in view.parts:
        assert part.name not in result
        assert {piece.source for piece in part.pieces} == {part.source}
        assert part.source not in view.kept
        result[part.name] = (
            gather(part.pieces, arrays, part.shape) if slow else strided(part, arrays)
        )
        assert result[part.name].shape == part.shape
    return result
