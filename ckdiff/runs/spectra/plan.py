"""The plan of a spectrum: which matrices, and what the largest takes, before any is read."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ckdiff import budget
from ckdiff.checkpoints.opening import (
    Given,
    bytes_to_download,
    open_for_planning,
    open_sides,
)
from ckdiff.diffs.comparison import Comparison, Selection, side_by_side
from ckdiff.diffs.result import asked_for
from ckdiff.errors import BudgetError, UsageError, printable
from ckdiff.options import checked_int, several_texts
from ckdiff.running.memory import PROCESS
from ckdiff.runs.spectra.matrix import Shape, values_memory, vectors_memory
from ckdiff.runs.structures.result import as_matrix
from ckdiff.runs.values import has_numbers
from ckdiff.stores.summaries import module_of

#: rows x columns x the fewer of both, over all matrices: above it a model is sampled
LARGE = 5e11
SAMPLE = 3  #: matrices of each group that are looked at then


@dataclass(slots=True)
class Options:
    """What a spectrum can be asked for; the command line's options have the same names."""

    tensors: Sequence[str] = ()  #: globs of names
    exclude: Sequence[str] = ()
    rename: Sequence[str] = ()
    key: str | None = None
    common_rows: bool = False
    unfuse: bool = True
    dequantize: bool = False
    angles: int | None = None  #: how many principal angles; None: the sides are not decomposed
    sample: int | None = None  #: matrices of each group; by default 3 where a model is large
    all: bool = False
    device: str = "cpu"
    memory: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("tensors", "exclude", "rename"):
            setattr(self, name, several_texts(name, getattr(self, name)))
        for name in ("angles", "sample"):
            value = getattr(self, name)
            if value is not None and checked_int(name, value) < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.all and self.sample is not None:
            raise UsageError("--all and --sample contradict each other: give one of them")
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device must be cpu or cuda, not {printable(repr(self.device))}")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that is looked at."""

    pair: int  #: position in the comparison
    shape: Shape
    group: str  #: its module
    sampled: bool  #: whether it stands for others of its group that are not looked at


@dataclass(slots=True, eq=False)
class SpectrumPlan:
    """Both sides, open and paired, and the matrices that are looked at. A context manager."""

    options: Options
    comparison: Comparison
    matrices: list[Matrix]
    groups: list[dict[str, Any]]  #: ``group``, ``shape``, ``matrices``, ``taken``
    without: list[str]  #: matrices whose elements are no numbers
    asked: tuple[str, str]
    needed: int  #: bytes of memory
    allowed: int
    stack: ExitStack = field(repr=False)

    def __enter__(self) -> SpectrumPlan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def largest(self) -> Matrix:
        """The matrix that takes the most memory."""
        return max(self.matrices, key=lambda matrix: _memory(matrix.shape, self.options))

    def refusal(self) -> BudgetError | None:
        """Why the plan cannot be carried out, or None."""
        if self.needed <= self.allowed:
            return None
        name = self.comparison.pairing.names[self.largest.pair]
        return BudgetError(
            f"{budget.format_size(self.allowed)} of memory is too little: with "
            f"{printable(name)}, {list(self.largest.shape)}, this needs "
            f"{budget.format_size(self.needed)}",
            hint="raise --memory, or leave the matrix out with --exclude",
        )

    def estimate(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        names, refused = self.comparison.pairing.names, self.refusal()
        return {
            "base": self.asked[0],
            "tuned": self.asked[1],
            "matrices": [names[matrix.pair] for matrix in self.matrices],
            "groups": self.groups,
            "largest": names[self.largest.pair],
            "memory": self.allowed,
            "memory_needed": self.needed,
            "bytes_to_download": bytes_to_download((self.comparison.base, self.comparison.tuned)),
            "refusal": None if refused is None else refused.one_line(),
        }


def plan(base: Given, tuned: Given, options: Options) -> SpectrumPlan:
    """Open both sides by their headers, and choose matrices. Raises a CkdiffError."""
    options = replace(options)  # whoever asked may change it
    with ExitStack() as stack:
        sides = open_sides(stack, (base, tuned), open_for_planning, options.key)
        selection = Selection(
            rename=tuple(options.rename),
            common_rows=options.common_rows,
            unfuse=options.unfuse,
            dequantize=options.dequantize,
        )
        comparison = side_by_side(sides[0], sides[1], selection)
        found, without = _matrices(comparison, options)
        if not found:
            raise UsageError(
                "none of the chosen tensors is a matrix of numbers",
                hint="see ckdiff info for names and shapes",
            )
        matrices, groups = _sampled(found, options)
        reading = sum(side.checkpoint.reader_memory(8 << 20) for side in comparison.sides)
        tables = 2000 * len(matrices) + 400 * len(comparison.pairing)
        most = max(_memory(matrix.shape, options) for matrix in matrices)
        return SpectrumPlan(
            options, comparison, matrices, groups, without,
            (asked_for(base, sides[0]), asked_for(tuned, sides[1])),
            PROCESS + tables + reading + most, allowed_memory(options.memory), stack.pop_all(),
        )  # fmt: skip


def allowed_memory(memory: str | int | None) -> int:
    """Bytes of anonymous memory that may be used.

    One matrix has to fit, so that the default is not that of other commands: half of what the
    machine has, or the cgroup.
    """
    if memory is not None:
        return budget.parse_size(memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = budget.cgroup_limit()
    return (machine if limit is None else min(machine, limit)) // 2


def _memory(shape: Shape, options: Options) -> int:
    return values_memory(shape) if options.angles is None else 2 * vectors_memory(shape)


def _matrices(comparison: Comparison, options: Options) -> tuple[list[Matrix], list[str]]:
    found, without = [], []
    for i, (name, shape) in enumerate(
        zip(comparison.pairing.names, comparison.shapes, strict=True)
    ):
        if len(shape) < 2 or 0 in shape or _matches(name, options.exclude):
            continue
        if options.tensors and not _matches(name, options.tensors):
            continue
        if all(has_numbers(side.dtypes[i]) for side in comparison.sides):
            found.append(Matrix(i, as_matrix(shape), module_of(name), sampled=False))
        else:
            without.append(name)
    return found, without


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _sampled(found: list[Matrix], options: Options) -> tuple[list[Matrix], list[dict[str, Any]]]:
    """What is looked at: all, or of each group of like matrices some, evenly spaced."""
    most = options.sample
    work = sum(rows * width * min(rows, width) for rows, width in (m.shape for m in found))
    if most is None and not options.all and work > LARGE:
        most = SAMPLE
    groups: dict[tuple[str, Shape], list[Matrix]] = {}
    for matrix in found:
        groups.setdefault((matrix.group, matrix.shape), []).append(matrix)
    taken, said = [], []
    for (group, shape), members in groups.items():
        some = members
        if most is not None and len(members) > most:
            at = np.linspace(0, len(members) - 1, most).round().astype(int).tolist()
            some = [replace(members[i], sampled=True) for i in at]
        taken += some
        said.append(
            {"group": group, "shape": list(shape), "matrices": len(members), "taken": len(some)}
        )
    return sorted(taken, key=lambda matrix: matrix.pair), said
