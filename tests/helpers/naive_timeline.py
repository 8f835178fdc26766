"""What a timeline is, again: slow, obvious, one element at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import naive


@dataclass
class Told:
    """One tensor over a run; steps count from 1, and position 0 is step 1."""

    masks: list[list[bool]]  #: against the first, for each step
    first: list[int]
    previous: list[int]
    kept: list[int]  #: marked in a step and in the last
    moves: list[int]  #: the first step at which each element is marked, or 0

    @property
    def final(self) -> int:
        return sum(self.masks[-1])

    @property
    def moved(self) -> int:
        return sum(step > 0 for step in self.moves)


def tell(rule: str, dtype: str, sides: Sequence[bytes]) -> Told:
    """The sides are the bytes of one tensor in each checkpoint, of one dtype."""
    masks = [naive.mask(rule, dtype, sides[0], side) for side in sides[1:]]
    moves = [
        next((t for t, mark in enumerate(marks, 1) if mark), 0)
        for marks in zip(*masks, strict=True)
    ]
    return Told(
        masks,
        [sum(mask) for mask in masks],
        [sum(naive.mask(rule, dtype, one, other)) for one, other in pairwise(sides)],
        [sum(a and b for a, b in zip(mask, masks[-1], strict=True)) for mask in masks],
        moves,
    )


@dataclass
class Way:
    """How one tensor went at one step; sums are exact."""

    step_length: Fraction = Fraction(0)  #: sum of |now - before|
    distance: Fraction = Fraction(0)  #: sum of |now - first|
    onward: int = 0  #: moved further from the first, on the side where it was
    back: int = 0  #: moved the other way
    nonfinite: int = 0


def ways(dtype: str, sides: Sequence[bytes]) -> list[Way]:
    """Of each step; sides as for ``tell``, whose elements are numbers."""
    values = [[naive.value(dtype, bits) for bits in naive.elements(dtype, side)] for side in sides]
    found = []
    for before, now in pairwise(values):
        way = Way()
        for f, p, n in zip(values[0], before, now, strict=True):
            if not all(isinstance(x, Fraction) for x in (f, p, n)):
                way.nonfinite += 1
                continue
            moved, was = Fraction(n) - Fraction(p), Fraction(p) - Fraction(f)
            way.step_length += abs(moved)
            way.distance += abs(Fraction(n) - Fraction(f))
            way.onward += moved * was > 0
            way.back += moved * was < 0
        found.append(way)
    return found
