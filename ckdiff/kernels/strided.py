"""Copying elements from one order to another: boxes of strided arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ckdiff.kernels import abi
from ckdiff.kernels.compiled import Function, c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room

WIDTHS = (1, 2, 4, 8, 16)  #: bytes of the elements that there are kernels for
_WORD = 8  # bytes of the widest elements that are more than short runs of bytes
_PICKED = 4  # bytes of the widest elements of which every second one is taken many at a time

_Dimension = tuple[
    int, int, int
]  # size, elements to the next in the source, and in what is written
_Numbers = tuple[int, ...]
_NONE = 1, 0, 0


def copy(
    source: Bytes,
    out: Bytes,
    shape: Sequence[int],
    source_strides: Sequence[int],
    out_strides: Sequence[int],
    width: int,
) -> None:
    """Copy a box of elements of ``width`` bytes; strides are elements from one to the next.

    Of both arrays of bytes the box takes the beginning: where strides are negative, the first
    element is so far in that the lowest one is at byte 0. Strides of 0 repeat what is read. The
    arrays do not overlap, and no two elements are written to one place. Nothing outside the box's
    lowest and highest element is touched on either side. Releases the GIL. Raises ValueError where
    the box is not inside the arrays, and TypeError for arrays of something else.
    """
    ready = copying(source, out, shape, source_strides, out_strides, width)
    if ready is not None:
        ready.make()


class Copying(NamedTuple):
    """A copy that can be made: of arrays that must stay until it is."""

    kernel: Function
    source: int
    out: int
    table: Int64  #: what the kernel walks by, once at a time

    def make(self) -> None:
        """Copy. Releases the GIL."""
        scratch = np.empty(abi.BOX_SCRATCH, np.uint8)
        places = self.source, self.out, place(self.table, I64), room(scratch, U8)
        self.kernel.ctypes(*places)


def copying(
    source: Bytes,
    out: Bytes,
    shape: Sequence[int],
    source_strides: Sequence[int],
    out_strides: Sequence[int],
    width: int,
) -> Copying | None:
    """The same copy, which somebody else makes; None of nothing. Raises what ``copy`` does."""
    plan = _plan(tuple(shape), tuple(source_strides), tuple(out_strides), width)
    if plan is None:
        return None
    begin = place(source, U8, plan.reach[0]) + plan.first[0]
    into = room(out, U8, plan.reach[1]) + plan.first[1]
    return Copying(c_function("strided", plan.kind), begin, into, np.array(plan.table, np.int64))


class _Plan(NamedTuple):
    """How boxes of one kind are copied; pairs are of the source and of what is written."""

    first: tuple[int, int]  #: the byte of the first element
    reach: tuple[int, int]  #: bytes from the lowest element to the highest
    kind: str  #: of the kernel
    table: tuple[int, ...]  #: what it walks by


@lru_cache(256)  # the parts of a stack of experts are all alike
def _plan(shape: _Numbers, strides: _Numbers, into: _Numbers, width: int) -> _Plan | None:
    if (
        width not in WIDTHS
        or not len(shape) == len(strides) == len(into)
        or any(size < 0 for size in shape)
    ):
        raise ValueError(f"{shape} elements of {width} bytes are no box that can be copied")
    if 0 in shape:
        return None
    if any(size > 1 and not step for size, step in zip(shape, into, strict=True)):
        raise ValueError(f"a box of {shape} would be written over itself")
    (first, reach), (to, room_) = (_ends(shape, steps, width) for steps in (strides, into))
    words = max(width // _WORD, 1)
    box = [(n, a * words, b * words) for n, a, b in zip(shape, strides, into, strict=True)]
    kind, table = _table(_merged([*box, (words, 1, 1)]), min(width, _WORD))
    return _Plan((first, to), (reach, room_), kind, table)


def _ends(shape: _Numbers, strides: _Numbers, width: int) -> tuple[int, int]:
    """The byte of the first element of a box, counted from the lowest, and bytes of them all."""
    away = [(size - 1) * step for size, step in zip(shape, strides, strict=True)]
    return -sum(min(far, 0) for far in away) * width, (1 + sum(map(abs, away))) * width


def _merged(box: list[_Dimension]) -> list[_Dimension]:
    """The same box in as few dimensions as can be, those written closest to each other last."""
    found: list[_Dimension] = []
    for size, step, into in sorted(box, key=lambda dimension: -abs(dimension[2])):
        if size == 1:
            continue
        if found and found[-1][1:] == (size * step, size * into):
            size *= found.pop()[0]
        found.append((size, step, into))
    return found


def _table(box: list[_Dimension], width: int) -> tuple[str, _Numbers]:
    """Which kernel copies a box, and what it takes."""
    columns = box[-1] if box else (1, 1, 1)
    rest = box[:-1]
    rows = rest[-1] if rest else _NONE
    size, step, into = columns
    turned = _turned(columns, rest, width)
    woven = (2, 1) if turned is not None and turned[1] == 2 else None
    twins = next((dimension for dimension in rest if dimension[:2] == woven), None)
    if turned is not None and twins is not None:
        kind, rows, columns = f"woven {width},1", turned, (size, step, twins[2])
        rest.remove(twins)
    elif turned is not None:
        kind, rows = f"tiles {width},{turned[1]}", turned
    elif step == into == 1:
        kind, columns = "runs", (size * width, 1, 1)
    else:
        picked = (step, into) == (2, 1) and width <= _PICKED
        kind = f"lines {width},{2 if picked else 0}"
    if rest:
        rest.remove(rows)
    head = rows[0], *_bytes(rows, width), columns[0], *_bytes(columns, width), len(rest), 0, 0
    outer = [(d[0], *_bytes(d, width), 0) for d in reversed(rest)]
    return kind, (*head, *(number for d in outer for number in d))


def _bytes(dimension: _Dimension, width: int) -> tuple[int, int]:
    return dimension[1] * width, dimension[2] * width


def _turned(columns: _Dimension, rest: list[_Dimension], width: int) -> _Dimension | None:
    """The dimension that is a row of the source where one of the others is a row of what is
    written, and there is a tile of both.
    """
    side, most = abi.BOX_TILE // width, 2 if width <= _PICKED else 1
    if columns[0] < side or columns[2] != 1 or 0 <= columns[1] <= 2:
        return None
    near = [d for d in rest if d[0] >= side and 1 <= d[1] <= most]
    return min(near, key=lambda d: d[1], default=None)
