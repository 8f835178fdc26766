"""Tensors that are spread over processes: which part of one this process holds.

Nothing here communicates, and torch.distributed is not imported: a DTensor is known by its mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ckdiff.errors import UsageError

_AT_ONCE = 1 << 26  # elements of a mask that are read together
#: a range of the flat mask of a whole tensor, given its start and stop
Read: TypeAlias = Callable[[int, int], torch.Tensor]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor in this process, sharing its memory; any other tensor itself."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    part: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of all parts together; DeepSpeed's ZeRO 3 leaves an empty tensor and a note."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def cut(read: Read, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a mask that belongs to ``local(tensor)``: bool, of the same shape.

    ``read(start, stop)`` gives a range of the flat mask of the whole tensor. It is asked for
    the rows that are held here only, and for not too many at a time. Raises UsageError for a
    layout that is not known.
    """
    shape = tuple(local(tensor).shape)
    if shape == tuple(tensor.shape):  # not sharded, or not here
        return read(0, tensor.numel()).view(shape)
    rows, *others = held_ranges(tensor, shape)
    mask = torch.empty(shape, dtype=torch.bool)
    if mask.numel() == 0:  # more processes than rows
        return mask
    inside = [slice(part.start, part.stop) for part in others]
    row = math.prod(tensor.shape[1:])
    step = max(1, _AT_ONCE // row)
    for at in range(rows.start, rows.stop, step):
        stop = min(at + step, rows.stop)
        block = read(at * row, stop * row).view(stop - at, *tensor.shape[1:])
        mask[at - rows.start : stop - rows.start] = block[(slice(None), *inside)]
    return mask


def held_ranges(tensor: torch.Tensor, shape: tuple[int, ...]) -> list[range]:
    """Which positions along each dimension this process holds; ``shape`` is what it holds.

    Raises UsageError for a layout that is not known.
    """
    held = [_held(tensor, dim) for dim in range(tensor.ndim)]
    if math.prod(shape) and tuple(map(len, held)) != shape:
        raise UsageError(
            f"a shard is {list(shape)}, by its placements {list(map(len, held))}",
            hint="only layouts made by fully_shard, parallelize_module and distribute_tensor",
        )
    return held


def _held(tensor: Any, dim: int) -> range:
    """Which of the positions along a dimension this process holds: always without gaps.

    The mesh's dimensions cut from left to right, as ``torch.chunk`` does. ``_StridedShard`` says
    that its dimension cut after those to its right: FSDP takes what tensor parallelism left.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # a process outside of the mesh holds nothing
        return range(0)
    early: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []
    parts = 1  # that those to the right have made
    for axis in reversed(range(len(coordinate))):
        placement = tensor.placements[axis]
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            raise UsageError(f"a parameter is sharded as {placement}, which is not a weight")
        if placement.dim % tensor.ndim != dim:
            continue
        size = tensor.device_mesh.size(axis)
        factor = getattr(placement, "split_factor", 1)
        if factor == 1:
            early.insert(0, (size, coordinate[axis]))
        elif factor == parts:
            late.append((size, coordinate[axis]))
        else:
            raise UsageError(f"a parameter is sharded as {placement}, which is not supported")
        parts *= size
    held = range(tensor.shape[dim])
    for size, index in (*early, *late):
        length = -(-len(held) // size)
        held = held[index * length : (index + 1) * length]
    return held
