"""What the shape of an update is, in numbers: a row for each matrix of each store.

Row and column profiles and stripes follow arXiv:2511.08567; the share of the energy that few
elements have, and thresholds relative to the RMS of a tensor, arXiv:2606.13657.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.figures.frames import Framed, Record
from ckdiff.runs.structures.counting import Counts, Integers
from ckdiff.runs.structures.dealing import Shape
from ckdiff.runs.structures.shown import StructurePlots, structure_html
from ckdiff.stores.summaries import module_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

COUNTED = ("changed", "rows_touched", "columns_touched", "blocks16_touched", "blocks128_touched")
RATIOS = ("top1_rows", "top10_rows", "top1_columns", "top10_columns", "gini_rows", "gini_columns")
_TOPS = ("top10_rows", "top10_columns")
SHARED = ("rows", "columns")
_LENGTH = 1 << 16  # of a piece of a profile whose counts are counted
#: what is measured where the checkpoints are given
ENERGIES = ("energy_top1", "above_rms_1e-4", "above_rms_1e-3", "above_rms_1e-2")


@dataclass(eq=False)
class Structure(Framed):
    """Where in its matrices an update is, for each store.

    A tensor of more than two dimensions is a matrix of its first one and all others together;
    tensors with fewer are left out. Tables have a line for each store and each matrix.
    """

    stores: list[str]  #: as they were given
    rule: str
    names: list[str] = field(repr=False)  #: of the matrices
    dtypes: list[str] = field(repr=False)
    shapes: list[tuple[int, ...]] = field(repr=False)
    #: tensors that are not in all stores with one shape
    left_out: list[dict[str, Any]] = field(repr=False)
    not_matrices: int  #: tensors with fewer than two dimensions
    counted: IntArray = field(init=False, repr=False)  #: (stores, matrices, COUNTED)
    fours: IntArray = field(init=False, repr=False)  #: (stores, matrices, 5)
    ratios: FloatArray = field(init=False, repr=False)  #: (stores, matrices, RATIOS); NaN: none
    #: (pairs, matrices, SHARED); pairs of stores in row-major order
    shared: FloatArray = field(init=False, repr=False)
    #: (matrices, ENERGIES), where base and tuned were given; NaN: none
    energies: FloatArray | None = field(default=None, repr=False)
    #: matrices of which the checkpoints have no numbers, or not those of the store
    unmeasured: list[str] = field(default_factory=list, repr=False)
    profiles: str | None = None  #: the file that the profiles were written to
    seconds: float = 0.0

    def __post_init__(self) -> None:
        lines = len(self.stores), len(self.names)
        self.counted = np.zeros((*lines, len(COUNTED)), np.int64)
        self.fours = np.zeros((*lines, 5), np.int64)
        self.ratios = np.full((*lines, len(RATIOS)), np.nan)
        self.shared = np.full((len(self.pairs), len(self.names), len(SHARED)), np.nan)
        for i, (rows, width) in enumerate(map(as_matrix, self.shapes)):
            self.fours[:, i, 0] = rows * (width // 4)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of stores."""
        return [(a, b) for a in range(len(self.stores)) for b in range(a + 1, len(self.stores))]

    def take(self, counts: Counts) -> None:
        """Make the numbers of a whole matrix; on any thread, each matrix once."""
        i = counts.tensor
        both = counts.rows, counts.columns
        for store in range(len(self.stores)):
            rows, columns = (profile[store] for profile in both)
            small, large, *least = counts.totals[store].tolist()
            ranked = [Ranked(profile) for profile in (rows, columns)]
            touched = [line.touched for line in ranked]
            self.counted[store, i] = [ranked[0].total, *touched, small, large]
            exact = [n - more for n, more in zip(least, [*least[1:], 0], strict=True)]
            self.fours[store, i, 1:] = exact
            self.fours[store, i, 0] -= sum(exact)
            tops = [line.top_share(percent) for line in ranked for percent in (1, 10)]
            self.ratios[store, i] = [*tops, *(line.gini() for line in ranked)]
        for pair, (a, b) in enumerate(self.pairs):
            self.shared[pair, i] = [stripes(profile[a], profile[b]) for profile in both]

    def each_row(self) -> Iterator[dict[str, Any]]:
        """The rows of the JSON contract: for each store, those of all matrices."""
        for store in range(len(self.stores)):
            for i in range(len(self.names)):
                yield self.row(store, i)

    def row(self, store: int, i: int) -> dict[str, Any]:
        """One row: of a store by its position, and of a matrix."""
        rows, width = as_matrix(self.shapes[i])
        found: dict[str, Any] = {
            "store": store,
            "name": self.names[i],
            "dtype": self.dtypes[i],
            "shape": list(self.shapes[i]),
            "rows": rows,
            "columns": width,
            "elements": rows * width,
            **dict(zip(COUNTED, self.counted[store, i].tolist(), strict=True)),
            "blocks16": blocks(rows, width, 16),
            "blocks128": blocks(rows, width, 128),
            **_numbers(RATIOS, self.ratios[store, i]),
            "fours": self.fours[store, i].tolist(),
        }
        if self.energies is not None:
            found |= _numbers(ENERGIES, self.energies[i])
        return found

    def shared_rows(self) -> list[dict[str, Any]]:
        """How far the most changed 10 % of rows and columns are the same in two stores.

        ``rows`` and ``columns`` are the shares that both have; ``*_chance`` what chance would give.
        """
        found = []
        for pair, (a, b) in enumerate(self.pairs):
            for i, name in enumerate(self.names):
                chances = [chance(size) for size in as_matrix(self.shapes[i])]
                found.append(
                    {"name": name, "a": a, "b": b}
                    | _numbers(SHARED, self.shared[pair, i])
                    | dict(zip(("rows_chance", "columns_chance"), chances, strict=True))
                )
        return found

    def by_module(self) -> list[dict[str, Any]]:
        """For each store and kind of module: ``store``, ``module``, ``matrices``, ``changed``, and
        ``top10_rows`` and ``top10_columns``, the means over its changes (None without any).
        """
        modules = list(dict.fromkeys(map(module_of, self.names)))
        place = {module: k for k, module in enumerate(modules)}
        index = np.array([place[module_of(name)] for name in self.names], np.int64)
        matrices = np.bincount(index, minlength=len(modules)).tolist()
        rows = []
        for store in range(len(self.stores)):
            changed = self.counted[store, :, 0]
            totals = np.bincount(index, changed, minlength=len(modules))
            means = {}
            for key in _TOPS:
                shares = np.nan_to_num(self.ratios[store, :, RATIOS.index(key)])
                means[key] = np.bincount(index, shares * changed, minlength=len(modules))
            rows += [
                {"store": store, "module": module, "matrices": matrices[k]}
                | {"changed": int(totals[k])}
                | {key: float(means[key][k] / totals[k]) if totals[k] else None for key in _TOPS}
                for k, module in enumerate(modules)
            ]
        return rows

    def records(self) -> list[Record]:
        """A dict for each store and matrix: ``run``, the store as it was given, and a row of the
        JSON contract, whose ``fours`` are in ``fours_0`` to ``fours_4``.
        """
        found = []
        for row in self.each_row():
            fours = {f"fours_{k}": count for k, count in enumerate(row.pop("fours"))}
            found.append({"run": self.stores[row["store"]], **row, **fours})
        return found

    @property
    def plot(self) -> StructurePlots:
        """Pictures: ``plot.concentration()``."""
        return StructurePlots(self.stores, self.by_module())

    def _columns(self) -> Sequence[str]:
        return ("run", "store", "name", "dtype", "shape", "rows", "columns", "elements", *COUNTED)

    def _repr_html_(self) -> str:
        elements = sum(math.prod(shape) for shape in self.shapes)
        return structure_html(self.head(), self.by_module(), elements)

    def head(self) -> dict[str, Any]:
        """What ``to_dict`` gives, without the rows."""
        found = {
            "stores": self.stores,
            "rule": self.rule,
            "matrices": len(self.names),
            "not_matrices": self.not_matrices,
            "left_out": self.left_out,
            "unmeasured": self.unmeasured,
            "profiles": self.profiles,
            "seconds": self.seconds,
        }
        return found | ({"shared": self.shared_rows()} if len(self.stores) > 1 else {})

    def to_dict(self) -> dict[str, Any]:
        """What ``ckdiff structure --json`` prints."""
        return self.head() | {"rows": list(self.each_row())}


def _numbers(names: Sequence[str], values: FloatArray) -> dict[str, float | None]:
    plain = (None if math.isnan(value) else value for value in values.tolist())
    return dict(zip(names, plain, strict=True))


def as_matrix(shape: Sequence[int]) -> Shape:
    """Rows and columns: the first dimension, and all others together."""
    return shape[0], math.prod(shape[1:])


def blocks(rows: int, width: int, size: int) -> int:
    """How many blocks a matrix has, those at its edges included."""
    return -(-rows // size) * -(-width // size)


def top(size: int, percent: int) -> int:
    """How many rows or columns so many percent of ``size`` are: rounded up."""
    return -(-size * percent // 100)


class Ranked:
    """The counts of rows or columns by size: how many have each count.

    Counts are bounded by the other dimension, so that next to nothing has to be sorted.
    """

    def __init__(self, counts: Integers) -> None:
        self.size, most = len(counts), int(counts.max(initial=0))
        if most > _LENGTH:
            values, many = np.unique(counts, return_counts=True)
        else:
            found = np.zeros(most + 1, np.int64)
            for at in range(0, self.size, _LENGTH):  # numpy makes int64 of them
                found += np.bincount(counts[at : at + _LENGTH], minlength=most + 1)
            values = np.flatnonzero(found)
            many = found[values]
        self._values, self._many = values.astype(np.int64), many.astype(np.int64)
        #: from the largest down: how many there are, and how many changes they hold
        self._lines = np.cumsum(self._many[::-1])
        self._changes = np.cumsum((self._many * self._values)[::-1])
        self.total = int(self._changes[-1]) if self.size else 0
        self.touched = int(self._many[self._values > 0].sum())

    def top_share(self, percent: int) -> float:
        """The share of the changes that the most changed ``percent`` % hold; NaN without any."""
        if not self.total:
            return math.nan
        size = top(self.size, percent)
        at = int(np.searchsorted(self._lines, size))  # some lines of this count are in, or all
        beyond = int(self._lines[at]) - size
        return (int(self._changes[at]) - beyond * int(self._values[-1 - at])) / self.total

    def gini(self) -> float:
        """The Gini coefficient; NaN without changes.

        0 where all counts are equal; (n - 1) / n where one of n has everything.
        """
        if not self.total:
            return math.nan
        below = np.cumsum(self._many) - self._many
        weights = self._many.astype(np.float64) * (2 * below + self._many - self.size)
        return float(weights @ self._values.astype(np.float64)) / (self.size * self.total)


def stripes(one: Integers, other: Integers) -> float:
    """Which share of the most changed 10 % of one run are so in the other; NaN without changes.

    Where equals are at the limit, it is what drawing lots among them gives on average.
    """
    if not one.any() or not other.any():
        return math.nan
    size = top(len(one), 10)
    return float(_membership(one, size) @ _membership(other, size)) / size


def chance(size: int) -> float | None:
    """What ``stripes`` of two runs that have nothing to do with each other is on average."""
    return top(size, 10) / size if size else None


def _membership(counts: Integers, size: int) -> FloatArray:
    """1 for those among the ``size`` largest, 0 for others; equals at the limit share the rest."""
    limit = np.partition(counts, len(counts) - size)[len(counts) - size]
    found: FloatArray = (counts > limit).astype(np.float64)
    equal = counts == limit
    found[equal] = (size - found.sum()) / equal.sum()
    return found
