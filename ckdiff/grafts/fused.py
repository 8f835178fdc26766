"""The fused tensors of a base that a graft writes from masks of their parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from ckdiff.checkpoints.pieces import Contents, Piece
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.checkpoints.views.unfusing import Part
from ckdiff.dtypes import DTYPES
from ckdiff.errors import printable
from ckdiff.grafts.blending import Kinds, can_take
from ckdiff.grafts.weaving import NOTHING, Lying, contents, woven
from ckdiff.stores.matching import Matched, misfit


@dataclass(slots=True)
class Fused:
    """Fused tensors of the base with ones in the masks of their parts, in columns."""

    index: IntArray  #: position in the base's table
    kinds: list[Kinds]
    rows: list[list[int]]  #: of each the parts with ones, by their rows in the matched store
    names: list[str]  #: of all these parts
    tuned: Contents  #: to be gathered from the tuned checkpoint's tensors
    flags: Contents  #: to be gathered from masks, by their positions in ``names``
    bytes_read: int  #: of the tuned side


@dataclass(slots=True)
class _Making:
    """What is known of the fused tensors so far."""

    matched: Matched
    base: TensorTable
    tuned: TensorTable
    in_tuned: dict[str, int]
    problems: list[str]
    index: list[int] = field(default_factory=list)
    kinds: list[Kinds] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tuned_boxes: list[list[tuple[int, Piece]]] = field(default_factory=list)
    flag_boxes: list[list[tuple[int, Piece]]] = field(default_factory=list)
    bytes_read: int = 0

    def add(self, position: int, parts: list[Part], row_of: dict[str, int]) -> None:
        """A fused tensor of which some parts are in ``row_of``."""
        table, dtype = self.base, self.base.dtypes[position]
        marked = [part for part in parts if part.name in row_of]
        problem = next(filter(None, (self._problem(part, row_of) for part in marked)), None)
        dtypes = {self.tuned.dtypes[self.in_tuned[p.name]] for p in marked if not problem}
        name = printable(table.names[position])
        if problem is None and len(dtypes) > 1:
            problem = f"the parts of {name} have several dtypes in tuned: {', '.join(dtypes)}"
        kinds = dtype, next(iter(dtypes), dtype)
        if problem is None and not can_take(kinds):
            problem = f"{name} is {dtype} in base and its parts are {kinds[1]} in tuned"
        lying = [Lying(part.shape, part.pieces) for part in parts]
        elements, width = prod(table.shapes[position]), DTYPES[dtype].bits // 8
        found = woven(elements, width, lying)
        if problem is None and found is None:
            problem = (
                f"the parts of {name} lie in it in an order that ckdiff reads and does not write"
            )
        if problem is not None or found is None:
            self.problems.append(problem or "")
            return
        self.index.append(position)
        self.kinds.append(kinds)
        self.rows.append([row_of[part.name] for part in marked])
        self.shapes.append(found[0])
        self._add_boxes(parts, found[1], row_of)

    def _add_boxes(
        self, parts: list[Part], boxes: list[list[Piece]], row_of: dict[str, int]
    ) -> None:
        tuned, flags = list[tuple[int, Piece]](), list[tuple[int, Piece]]()
        for part, held in zip(parts, boxes, strict=True):
            source = NOTHING
            if part.name in row_of:
                source = len(self.names)
                self.names.append(part.name)
                at = self.in_tuned[part.name]
                tuned += [(at, box) for box in held]
                self.bytes_read += int(self.tuned.nbytes[at])
            flags += [(source, box) for box in held]
        self.tuned_boxes.append(tuned)
        self.flag_boxes.append(flags)

    def _problem(self, part: Part, row_of: dict[str, int]) -> str | None:
        wanted = self.matched.shapes[row_of[part.name]]
        at = self.in_tuned.get(part.name)
        held = None if at is None else self.tuned.shapes[at]
        return misfit("base", part.name, part.shape, wanted) or misfit(
            "tuned", part.name, held, wanted
        )

    def done(self) -> Fused:
        widths = [DTYPES[kinds[1]].bits // 8 for kinds in self.kinds]
        tuned = contents(self.shapes, [k[1] for k in self.kinds], widths, self.tuned_boxes)
        ones = [1] * len(self.kinds)
        flags = contents(self.shapes, ["U8"] * len(self.kinds), ones, self.flag_boxes)
        index = np.array(self.index, np.int64)
        return Fused(index, self.kinds, self.rows, self.names, tuned, flags, self.bytes_read)


def fused_of(
    matched: Matched,
    tables: tuple[TensorTable, TensorTable],
    whole: dict[int, list[Part]],
    problems: list[str],
) -> Fused:
    """Those among ``whole``, as ``seen_by`` lists them, that have ones, of the tables of base and
    tuned. What cannot be followed is added to ``problems``.
    """
    ones = np.flatnonzero(matched.changed[0]).tolist()
    row_of = {matched.names[row]: row for row in ones}
    in_tuned = {name: i for i, name in enumerate(tables[1].names)}
    making = _Making(matched, *tables, in_tuned, problems)
    for position, parts in sorted(whole.items()):
        if any(part.name in row_of for part in parts):
            making.add(position, parts, row_of)
    return making.done()
