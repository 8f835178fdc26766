"""Where the parts of a fused tensor are in it, from nothing but shapes.

All numbers are elements of the fused tensor, which is packed in C order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ckdiff.checkpoints.pieces import packed_strides

Shape = tuple[int, ...]
#: how the parts of one expert lie: along its rows, or along its columns, which are then transposed
Style = Literal["rows", "columns"]


class Box(NamedTuple):
    """A part, in the tensor that holds it."""

    offset: int  #: of its first element
    shape: Shape
    strides: Shape  #: from one element to the next, along each dimension


def along_rows(
    fused: Shape, parts: Sequence[Shape | None], *, interleaved: bool = False
) -> list[Box] | None:
    """Boxes of parts that follow each other along the first dimension, or the second of three.

    None in ``parts`` is a part of unknown shape: the last two parts of several are of one size, as
    keys and values, gate and up are. Returns None where the shapes do not make up the fused one.
    """
    axes = (0, 1) if len(fused) == 3 else (0,) if fused else ()
    for axis in axes:
        sizes = _sizes(fused, parts, axis)
        if sizes is None or (interleaved and len(set(sizes)) != 1):
            continue
        strides = packed_strides(fused)
        boxes = []
        begin = 0
        for i, size in enumerate(sizes):
            shape = (*fused[:axis], size, *fused[axis + 1 :])
            if interleaved:
                every = len(sizes) * strides[axis]
                wide = (*strides[:axis], every, *strides[axis + 1 :])
                boxes.append(Box(i * strides[axis], shape, wide))
            else:
                boxes.append(Box(begin * strides[axis], shape, strides))
            begin += size
        return boxes
    return None


def _sizes(fused: Shape, parts: Sequence[Shape | None], axis: int) -> list[int] | None:
    """How long each part is along ``axis``; None where they do not make up the fused tensor."""
    sizes: list[int | None] = []
    for part in parts:
        if part is None:
            sizes.append(None)
            continue
        if len(part) != len(fused) or any(
            part[i] != fused[i] for i in range(len(fused)) if i != axis
        ):
            return None
        sizes.append(part[axis])
    return _completed(fused[axis], sizes)


def _completed(total: int, sizes: list[int | None]) -> list[int] | None:
    """The sizes with the missing ones filled in, all positive; None where that cannot be."""
    sizes = list(sizes)
    if len(sizes) > 1:  # keys and values, gate and up: the last two are of one size
        sizes[-1] = sizes[-2] if sizes[-1] is None else sizes[-1]
        sizes[-2] = sizes[-1] if sizes[-2] is None else sizes[-2]
    rest = total - sum(size or 0 for size in sizes)
    holes = [i for i, size in enumerate(sizes) if size is None]
    if not holes:
        filled = [size or 0 for size in sizes]
    elif len(holes) == 1:
        filled = [rest if size is None else size for size in sizes]
        rest = 0
    elif len(holes) == 2 and holes == [len(sizes) - 2, len(sizes) - 1] and rest % 2 == 0:
        filled = [rest // 2 if size is None else size for size in sizes]
        rest = 0
    else:
        return None
    return filled if rest == 0 and min(filled) > 0 else None


def styles(fused: Shape, parts: Sequence[Shape | None]) -> set[Style]:
    """How a stack of experts may hold the parts of each, given the shapes of one expert's parts.

    Roles without a part (None) have the shape of the others. Both styles where both fit; none where
    nothing does.
    """
    known = [part for part in parts if part is not None]
    if not known or len(fused) != len(known[0]) + 1 or fused[0] < 1:
        return set()
    if any(part != known[0] for part in known):
        return set()  # gate and up are of one shape
    part, each = known[0], fused[1:]
    count = len(parts)
    if not part:
        return {"rows"} if count == 1 else set()
    found: set[Style] = set()
    if each == (part[0] * count, *part[1:]):
        found.add("rows")
    if len(part) < 3 and each == (*part[1:], part[0] * count):
        found.add("columns")
    return found


def in_stack(
    fused: Shape, roles: int, role: int, style: Style, *, interleaved: bool = False
) -> Box:
    """The box of one role of expert 0; expert n's begins n experts further on.

    The style must be one of ``styles``.
    """
    each = fused[1:]
    strides = packed_strides(each)
    if not each:
        return Box(0, (), ())
    axis = len(each) - 1 if style == "columns" else 0
    size = each[axis] // roles
    step = strides[axis]
    offset = role * step if interleaved else role * size * step
    shape = (*each[:axis], size, *each[axis + 1 :])
    wide = (*strides[:axis], step * roles if interleaved else step, *strides[axis + 1 :])
    if style == "columns":
        return Box(offset, shape[::-1], wide[::-1])
    return Box(offset, shape, wide)
