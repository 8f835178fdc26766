"""How far a run went and which way, step by step: what ``--stats`` adds to a timeline.

A step is held against the checkpoint before it and against the first one: three checkpoints, so
that what is appended to a timeline costs no more than it does without. By value, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.dtypes import DTYPES, common
from ckdiff.kernels import paths as kernel
from ckdiff.kernels.abi import PATHS_ELEMENTS, PATHS_OUT, PATHS_POSITION, PATHS_SIDES
from ckdiff.runs.timelines.pairs import MarchingPairs
from ckdiff.runs.timelines.widening import Widening
from ckdiff.stores.table import number

Float64 = npt.NDArray[np.float64]
LENGTHS = 2  #: sums of a step: how far it went, and how far it is from the first
WAYS = 3  #: counts of a step: onward, back, not finite


class Paths:
    """What is summed of the sides that are read together. Shared by all threads."""

    def __init__(self, pairs: MarchingPairs, first: int) -> None:
        """``first`` is the first side whose step is wanted: 1, or 2 where that one is known."""
        self._sides = range(first, len(pairs.sides))
        self._steps = len(pairs.sides) - 1
        kinds = [path_kinds(pairs, side) for side in self._sides]
        self._names = sorted({kind for some in kinds for kind in some if kind})
        codes = {name: i for i, name in enumerate(self._names)} | {"": -1}
        self._codes = [np.array([codes[kind] for kind in some], np.int64) for some in kinds]
        self._wide = [
            wider(pairs, side, some) for side, some in zip(self._sides, kinds, strict=True)
        ]

    def add(self, spans: Widening, into: Float64) -> None:
        """Add a window to ``into``: (rows, steps, columns of a kernel's row)."""
        flat = into.reshape(-1, kernel.COLUMNS)
        for code, name in enumerate(self._names):
            parts = [
                self._jobs(spans, side, codes, wide, code)
                for side, codes, wide in zip(self._sides, self._codes, self._wide, strict=True)
            ]
            jobs = np.concatenate(parts)
            # of one place all steps after each other: they share what is in the cache
            order = np.argsort(jobs[:, PATHS_POSITION], kind="stable")
            kernel.add_paths(DTYPES[name], jobs[order], flat)

    def _jobs(
        self, spans: Widening, side: int, codes: IntArray, wide: dict[int, str], code: int
    ) -> IntArray:
        window = spans.window
        chosen = np.flatnonzero(codes[window.spans.tensors] == code)
        jobs = np.empty((len(chosen), kernel.JOB_COLUMNS), np.int64)
        for column, which in enumerate((0, side - 1, side), PATHS_SIDES):
            jobs[:, column] = spans.column(which, wide)[chosen]
        jobs[:, PATHS_ELEMENTS] = window.spans.elements[chosen]
        jobs[:, PATHS_POSITION] = window.spans.addresses[chosen] - window.first
        jobs[:, PATHS_OUT] = window.rows[chosen] * self._steps + side - 1
        return jobs


def path_kinds(pairs: MarchingPairs, side: int) -> list[str]:
    """The dtype by whose values each tensor's step to a side is taken; "" where it has none."""
    three = [pairs.sides[which].dtypes for which in (0, side - 1, side)]
    return [_kind(*dtypes) for dtypes in zip(*three, strict=True)]


def _kind(first: str, before: str, now: str) -> str:
    kind: str | None = first
    for other in (before, now):
        if kind is not None and kind != other:
            kind = common(kind, other)
    return kind if kind is not None and DTYPES[kind].numeric else ""


def wider(pairs: MarchingPairs, side: int, kinds: Sequence[str]) -> dict[int, str]:
    """By position those of ``kinds`` in which one of the three sides is not stored."""
    three = [pairs.sides[which].dtypes for which in (0, side - 1, side)]
    return {
        i: kind
        for i, (kind, *stored) in enumerate(zip(kinds, *three, strict=True))
        if kind and any(dtype != kind for dtype in stored)
    }


def arrays(sums: Float64, first: int) -> tuple[Float64, IntArray]:
    """(steps * LENGTHS, tensors) and (steps * WAYS, tensors) of what was summed of tensors.

    All rows of one kind come after each other; steps before ``first`` are left out.
    """
    wanted = np.ascontiguousarray(sums[:, first:].transpose(2, 1, 0))  # kinds, steps, tensors
    tensors = sums.shape[0]
    lengths = wanted[: kernel.COUNTS].reshape(-1, tensors)
    return lengths, wanted[kernel.COUNTS :].reshape(-1, tensors).view(np.int64)


def joined(
    known: tuple[Float64, IntArray], more: tuple[Float64, IntArray]
) -> tuple[Float64, IntArray]:
    """What ``arrays`` gives of some steps and, after them, of more."""
    lengths, ways = (
        np.concatenate(
            [one.reshape(kinds, -1, one.shape[1]), other.reshape(kinds, -1, one.shape[1])], 1
        )
        for one, other, kinds in zip(known, more, (LENGTHS, WAYS), strict=True)
    )
    tensors = known[0].shape[1]
    return lengths.reshape(-1, tensors), ways.reshape(-1, tensors)


def said(lengths: Float64, ways: IntArray) -> list[dict[str, Any]]:
    """Of each step what its sums say; ``lengths`` and ``ways`` are those of one group."""
    steps, onward, back, nonfinite = len(lengths) // LENGTHS, *ways.reshape(WAYS, -1).tolist()
    moved, distances = lengths.reshape(LENGTHS, steps).tolist()
    return [
        {
            "step_length": number(moved[i]),
            "distance": number(distances[i]),
            **_ratio(path, distances[i]),
            **_agreement(onward[i], back[i]),
            "nonfinite": nonfinite[i],
        }
        for i, path in enumerate(accumulate(moved))
    ]


def in_all(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the steps of a group say of the whole run."""
    onward, back = (sum(step[key] for step in steps) for key in ("onward", "back"))
    last = {key: steps[-1][key] for key in ("distance", "path_length", "path_ratio")}
    return last | _agreement(onward, back)


def _ratio(path: float, distance: float) -> dict[str, Any]:
    ratio = number(path / distance) if distance and np.isfinite(distance) else None
    return {"path_length": number(path), "path_ratio": ratio}


def _agreement(onward: int, back: int) -> dict[str, Any]:
    moved = onward + back
    return {
        "onward": onward,
        "back": back,
        "sign_agreement": onward / moved if moved else None,
    }
