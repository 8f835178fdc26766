"""What each rebuilt tensor is made from: a range of the elements of one of the base's tensors.

Mostly that is the tensor of the same name, all of it. Where rows came or went it is those that both
sides have, and where the base has a tensor fused it is the part in it. Behind what the range gives
the base goes on with zeros: new rows are changes of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.deltas.parts import called
from ckdiff.dtypes import DTYPES
from ckdiff.layout import bits_of

_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """What a tensor is made from, where that is not all of the tensor of its name."""

    base: str  #: the name of the base's tensor
    shape: tuple[int, ...]  #: of that
    first: int  #: element
    elements: int
    new: int = 0  #: changed elements behind these

    def to_dict(self, name: str) -> dict[str, Any]:
        """As the manifest has it, of the tensor called ``name``."""
        return {
            "name": name,
            "base": self.base,
            "base_shape": list(self.shape),
            "first": self.first,
            "elements": self.elements,
            "new": self.new,
        }


class Ranges:
    """What all tensors of a blueprint are made from, in columns."""

    def __init__(
        self, blueprint: Blueprint, based: npt.NDArray[np.bool_], odd: Mapping[int, Range]
    ) -> None:
        bits = bits_of(blueprint.dtypes)
        self.odd = odd  #: by position, those that are not simply all of the tensor of their name
        self.begin: IntArray = np.zeros(len(based), np.int64)  #: byte in the base's tensor
        #: bytes that the base's tensor gives, from the first on; none without a base
        self.nbytes: IntArray = np.where(based, blueprint.nbytes, 0)
        #: changed elements that have nothing in the base
        self.fresh: IntArray = np.zeros(len(based), np.int64)
        for at, found in odd.items():
            self.fresh[at] = found.new
            self.begin[at] = found.first * int(bits[at]) // 8
            self.nbytes[at] = found.elements * int(bits[at]) // 8
        #: elements that the base gives
        self.elements: IntArray = self.nbytes * 8 // np.maximum(bits, 1)
        #: whether a tensor has more elements than that
        self.grown: npt.NDArray[np.bool_] = based & (self.nbytes < blueprint.nbytes)


def to_list(ranges: Mapping[int, Range], names: Sequence[str]) -> list[dict[str, Any]]:
    """As the manifest has them, in the order of the tensors."""
    return [ranges[at].to_dict(names[at]) for at in sorted(ranges)]


def resized(ranges: Mapping[int, Range], blueprint: Blueprint) -> list[dict[str, Any]]:
    """The tensors of which both sides have rows: ``name``, the shapes ``base`` and ``tuned``, and
    ``rows``, how many both have.
    """
    found = []
    for at, one in sorted(ranges.items()):
        name, shape = blueprint.names[at], blueprint.shapes[at]
        rows = len(one.shape) == len(shape) > 0 and one.shape[1:] == shape[1:]
        if one.base == name and rows and one.first == 0:
            sides = {"base": list(one.shape), "tuned": list(shape)}
            found.append({"name": name, **sides, "rows": one.elements // max(prod(shape[1:]), 1)})
    return found


def parts(ranges: Mapping[int, Range], blueprint: Blueprint) -> list[dict[str, str]]:
    """The tensors that the base has under another name, or inside another one."""
    listed = {item["name"] for item in resized(ranges, blueprint)}
    return [
        {"name": blueprint.names[at], "base": one.base}
        for at, one in sorted(ranges.items())
        if blueprint.names[at] not in listed
    ]


def read_ranges(
    manifest: Mapping[str, Any], blueprint: Blueprint, based: npt.NDArray[np.bool_]
) -> Ranges:
    """What a manifest says, held against the tensors; its values have their types already.

    Raises ValueError.
    """
    where = {name: i for i, name in enumerate(blueprint.names)}
    found: dict[int, Range] = {}
    before = -1
    for item in manifest.get("ranges", []):
        name = item["name"]
        at = where.get(name, -1)
        if at <= before:
            raise ValueError(f"{called(name)} is not there, or the ranges are in another order")
        before = at
        one = Range(
            item["base"], tuple(item["base_shape"]), item["first"], item["elements"], item["new"]
        )
        fault = _fault(one, name, blueprint, at) if based[at] else "has no base"
        if fault is not None:
            raise ValueError(f"{called(name)} {fault}")
        found[at] = one
    return Ranges(blueprint, based, found)


def _fault(found: Range, name: str, blueprint: Blueprint, at: int) -> str | None:
    """Why a tensor cannot be made from a range, or None."""
    bits, shape = DTYPES[blueprint.dtypes[at]].bits, blueprint.shapes[at]
    elements, held = prod(shape), prod(found.shape)
    if (found.base, found.shape) == (name, shape):
        return "is made from what it says anyway"
    if not 0 < found.elements <= elements or held * bits > _MAX:
        return "is made from more than there is, or from nothing"
    if found.first + found.elements > held:
        return "is made from what its base does not have"
    if found.first * bits % 8 or found.elements * bits % 8:
        return "is made from what does not end where bytes do"
    if found.new > elements - found.elements:
        return "has more new elements than it can"
    return None
