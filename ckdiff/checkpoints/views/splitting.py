"""Two sides under one spelling of their names -> claims: what holds what, and where in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckdiff.checkpoints.pieces import packed_strides
from ckdiff.checkpoints.views.arranging import (
    Box,
    Shape,
    Style,
    along_rows,
    in_stack,
    styles,
)
from ckdiff.checkpoints.views.claims import Claims, PlannedPart, Split
from ckdiff.checkpoints.views.fusions import INTERLEAVED, Reading, read
from ckdiff.checkpoints.views.matching import Found, Index, turned

#: leaves of stacks that are stored either way around
_EITHER_WAY = ("gate_up_proj", "down_proj")


class _Stacked(NamedTuple):
    """A stack of experts whose style is still to be decided."""

    position: int
    reading: Reading
    found: Found
    shapes: tuple[Shape | None, ...]  #: of one expert's part, for each role
    styles: set[Style]


class Splitter:
    """Claims what two sides hold of each other, under one spelling of their names."""

    def __init__(self, claims: Claims, sides: Sequence[Index]) -> None:
        self._claims = claims
        self._sides = sides

    def same_names(self) -> None:
        """Claim tensors that have one name in this spelling."""
        base, tuned = self._sides
        around: list[tuple[int, int]] = []
        for name, i in base.exact.items():
            j = tuned.exact.get(name, -1)
            if i < 0 or j < 0:
                continue
            one, other = base.table.shapes[i], tuned.table.shapes[j]
            if one == other:
                self._claims.rename(i, j)
            elif turned(one, other):
                around.append((i, j))
        for i, j in around:
            self._turn(i, j)

    def _turn(self, i: int, j: int) -> None:
        """Two stacks of matrices of which one is stored transposed, and their square siblings."""
        tables = self._claims.tables
        reading = self._sides[0].readings[i]
        if reading.leaf not in _EITHER_WAY or reading.tail != "weight":
            return
        self._transpose(i, j)
        for leaf in _EITHER_WAY:
            pair = [
                self._claims.names[side].get(_releafed(tables[side].names[k], reading.leaf, leaf))
                for side, k in enumerate((i, j))
            ]
            if pair[0] is None or pair[1] is None:
                continue
            one, other = tables[0].shapes[pair[0]], tables[1].shapes[pair[1]]
            if one == other and turned(one, other) and pair[1] not in self._claims.taken[1]:
                self._transpose(pair[0], pair[1])

    def _transpose(self, i: int, j: int) -> None:
        """Compare ``tuned[j]`` transposed with ``base[i]``."""
        tables = self._claims.tables
        shape = tables[0].shapes[i]
        strides = packed_strides(tables[1].shapes[j])
        box = Box(0, shape, (strides[0], strides[2], strides[1]))
        part = PlannedPart(tables[0].names[i], shape, (((0,) * len(shape), box),))
        self._claims.split(Split(1, j, [i], [part]))

    def fused(self, side: int) -> None:
        """Claim the tensors of a side that hold several of the other's."""
        one, other = self._sides[side], self._sides[1 - side]
        homes: dict[str, list[_Stacked]] = {}
        for position in one.names:
            if position in self._claims.taken[side]:
                continue
            reading = one.readings[position]
            if reading.leaf in INTERLEAVED and self._reordered(side, position, reading):
                continue
            found = other.find(reading)
            if found is None:
                continue
            problem = self._problem(side, position, found)
            if problem:
                self._claims.leave(side, position, problem)
            elif found.kind == "rows":
                self._rows(side, position, reading, found)
            elif found.kind == "shards":
                self._shards(side, position, found)
            else:
                stacked = self._stacked(side, position, reading, found)
                homes.setdefault(reading.home, []).append(stacked)
        for stacks in homes.values():
            self._home(side, stacks)

    def _problem(self, side: int, position: int, found: Found) -> str:
        """Why a tensor cannot be taken apart, as names and dtypes say; empty where it can."""
        other = 1 - side
        table, taken = self._claims.tables[other], self._claims.taken[other]
        if found.kind == "unsafe":
            return "the order of its rows is not the same in every model"
        positions = [p for row in found.parts for p in row.values()]
        if any(p < 0 for p in positions):
            return "two parts have one name"
        if any(p in taken for p in positions):
            return "a part is in another tensor too"
        if len({table.dtypes[p] for p in positions}) > 1:
            return "its parts are of several dtypes"
        mine, names = self._claims.names[side], table.names
        if any(names[p] in mine and mine[names[p]] != position for p in positions):
            return "a part has the name of another tensor"
        if found.kind == "rows" and found.keys[0][1] == "q_proj":
            return self._odd_attention(side, position)
        return ""

    def _odd_attention(self, side: int, position: int) -> str:
        """Families that store the rows of ``qkv_proj`` head by head, told by a neighbour's name."""
        name = self._claims.tables[side].names[position]
        home = read(name).home
        by_head = f"{home}.output_gate.weight" in self._claims.names[side]
        if by_head or (".h." in name and name.endswith(".attn.qkv_proj.weight")):
            return "the order of its rows is not the same in every model"
        return ""

    def _rows(self, side: int, position: int, reading: Reading, found: Found) -> None:
        table = self._claims.tables[1 - side]
        alone = [row.get(0) for row in found.parts]
        boxes = along_rows(
            self._claims.tables[side].shapes[position],
            [None if p is None else table.shapes[p] for p in alone],
            interleaved=reading.leaf in INTERLEAVED,
        )
        if boxes is None:
            self._claims.leave(side, position, "the shapes of its parts do not add up to it")
            return
        split = Split(side, position, [], [])
        for role, (partner, box) in enumerate(zip(alone, boxes, strict=True)):
            self._add(split, found, (role, 0), partner, box)
        self._claims.split(split)

    def _shards(self, side: int, position: int, found: Found) -> None:
        table, row = self._claims.tables[1 - side], found.parts[0]
        numbers = range(len(row))
        boxes = None
        if all(n in row for n in numbers):
            fused = self._claims.tables[side].shapes[position]
            boxes = along_rows(fused, [table.shapes[row[n]] for n in numbers])
        if boxes is None:
            self._claims.leave(side, position, "the shapes of its parts do not add up to it")
            return
        split = Split(side, position, [], [])
        for n, box in zip(numbers, boxes, strict=True):
            self._add(split, found, (0, n), row[n], box)
        self._claims.split(split)

    def _reordered(self, side: int, position: int, reading: Reading) -> bool:
        """Claim a stack of which the other side has the rows in order, if it has."""
        claims, key = self._claims, (reading.home, "gate_up_proj", reading.tail)
        other = self._sides[1 - side].keys.get(key, -1)
        if other < 0 or other in claims.taken[1 - side]:
            return False
        shape = claims.tables[side].shapes[position]
        if claims.tables[1 - side].shapes[other] != shape or len(shape) < 2 or shape[1] % 2:
            return False
        strides, half = packed_strides(shape), shape[1] // 2
        box_shape = (shape[0], half, *shape[2:])
        wide = (strides[0], 2 * strides[1], *strides[2:])
        zeros = (0,) * (len(shape) - 2)
        boxes = tuple(((0, i * half, *zeros), Box(i * strides[1], box_shape, wide)) for i in (0, 1))
        name = claims.tables[1 - side].names[other]
        claims.split(Split(side, position, [other], [PlannedPart(name, shape, boxes)]))
        return True

    def _stacked(self, side: int, position: int, reading: Reading, found: Found) -> _Stacked:
        """A stack with the shapes of its experts' parts, and the styles that these allow."""
        fused = self._claims.tables[side].shapes[position]
        shapes = tuple(self._one_shape(1 - side, row.values()) for row in found.parts)
        fits: set[Style] = set()
        known = [shape for shape, row in zip(shapes, found.parts, strict=True) if row]
        if None not in known and self._numbers_fit(fused, found):
            fits = styles(fused, shapes)
        return _Stacked(position, reading, found, shapes, fits)

    def _one_shape(self, side: int, positions: Iterable[int]) -> Shape | None:
        """The shape that all of these have; None where they differ, or there are none."""
        shapes = {self._claims.tables[side].shapes[p] for p in positions}
        return shapes.pop() if len(shapes) == 1 else None

    @staticmethod
    def _numbers_fit(fused: Shape, found: Found) -> bool:
        """Whether the numbers are those of the fused tensor's experts, and not too few of them."""
        if not fused:
            return False
        first = found.share.which * fused[0]
        last = found.share.of * fused[0]
        there = sum(first <= n < first + fused[0] for row in found.parts for n in row)
        return 2 * there >= fused[0] * len(found.parts) and all(
            n < last for row in found.parts for n in row
        )

    def _home(self, side: int, stacks: list[_Stacked]) -> None:
        """Claim the stacks of one set of experts: all are stored in one style."""
        common: set[Style] = {"rows", "columns"}
        for stack in stacks:
            if stack.reading.tail == "weight" and stack.styles:
                common &= stack.styles
        for stack in stacks:
            fits = stack.styles
            if len(fits) > 1 and len(self._shape(side, stack)) > 2:
                fits = fits & common
            if not stack.styles:
                reason = "the numbers or shapes of its parts do not add up to it"
                self._claims.leave(side, stack.position, reason)
            elif len(fits) != 1 and len(self._shape(side, stack)) > 2:
                reason = "its shape does not say whether it is transposed"
                self._claims.leave(side, stack.position, reason)
            else:
                style: Style = "rows" if "rows" in fits else "columns"
                self._stack(side, stack, style, common)

    def _shape(self, side: int, stack: _Stacked) -> Shape:
        return self._claims.tables[side].shapes[stack.position]

    def _stack(self, side: int, stack: _Stacked, style: Style, common: set[Style]) -> None:
        """Claim one stack, if it is known whether its roles alternate."""
        fused, found = self._shape(side, stack), stack.found
        roles = len(found.parts)
        interleaved = stack.reading.leaf in INTERLEAVED
        if roles > 1 and not interleaved and self._has_bias(side, stack.reading):
            # With biases, gate and up alternate along the columns in the one family that has them.
            if common != {"columns"} or any("score.weight" in n for n in self._claims.names):
                reason = "gate and up alternate in some models, and nothing tells"
                self._claims.leave(side, stack.position, reason)
                return
            interleaved = True
        split = Split(side, stack.position, [], [])
        count, each = fused[0], packed_strides(fused)[0]
        boxes = [in_stack(fused, roles, r, style, interleaved=interleaved) for r in range(roles)]
        for n in range(count):
            number = n + found.share.which * count
            for role, box in enumerate(boxes):
                here = Box(box.offset + n * each, box.shape, box.strides)
                self._add(split, found, (role, number), found.parts[role].get(number), here)
        self._claims.split(split)

    def _has_bias(self, side: int, reading: Reading) -> bool:
        keys = self._sides[side].keys
        return (reading.home, reading.leaf, "bias") in keys or (
            f"{reading.home}.{reading.leaf}_bias" in self._claims.names[side]
        )

    def _add(
        self, split: Split, found: Found, where: tuple[int, int], partner: int | None, box: Box
    ) -> None:
        """Add the part of a role and a number, under the other side's name for it."""
        names = self._claims.tables[1 - split.side].names
        if partner is None:
            name = _invented(names, found, *where)
        else:
            name = names[partner]
            split.partners.append(partner)
        split.parts.append(PlannedPart(name, box.shape, (((0,) * len(box.shape), box),)))


def _invented(names: Sequence[str], found: Found, role: int, number: int) -> str:
    """What the other side would call a part that it lacks, by its name for another one."""
    home, leaf, tail = found.keys[role]
    for other in found.parts[role]:  # the same role of another expert
        for mark in (".{}.", "_{}"):
            front, there, back = names[found.parts[role][other]].rpartition(mark.format(other))
            if there:
                return front + mark.format(number) + back
    for key, row in zip(found.keys, found.parts, strict=True):  # another role of the same expert
        if number in row:
            name = _releafed(names[row[number]], key[1], leaf)
            if name != names[row[number]]:
                return name
    inner = f"{home}.{number}" if found.kind == "stack" else home
    return f"{inner}.{leaf}.{tail}"


def _releafed(name: str, leaf: str, other: str) -> str:
    """A name with another leaf in the place of the last of that name."""
    front, there, back = name.rpartition(leaf)
    return front + other + back if there else name
