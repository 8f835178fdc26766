"""How the energy of an update is spread over the elements of its matrices (arXiv:2606.13657).

Everything is of the difference of both sides in float32. A matrix is read twice, a window at a
time: first a histogram of magnitudes finds where the largest hundredth of them begins, then what is
above that is added up. Nothing is sorted, and nothing is estimated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.opening import Given, fetch_all, open_checkpoint, open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable
from ckdiff.kernels import hashing
from ckdiff.kernels.contents import ContentHasher
from ckdiff.running.memory import Need
from ckdiff.running.runners import Meter, run_chunks
from ckdiff.running.threads import PerThread, Stopped
from ckdiff.runs.structures.result import as_matrix
from ckdiff.runs.values import FloatReader, Floats, has_numbers
from ckdiff.stores.matching import Matched
from ckdiff.stores.seeing import seen_by
from ckdiff.stores.table import content_of, is_content_hash

if TYPE_CHECKING:
    from ckdiff.options import Observer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

THRESHOLDS = (1e-4, 1e-3, 1e-2)  #: relative to the RMS of the base's tensor
_WINDOW = 1 << 19  #: elements
_HIGH = 1 << 15  # magnitudes of float32 by their upper half
_LOW = 1 << 16
_MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(slots=True, eq=False)
class Spread:
    """The magnitudes of the differences of a tensor: first ``survey`` all of it, then ``weigh``."""

    elements: int
    energy: float = 0.0  #: sum of the squares of the differences
    base: float = 0.0  #: sum of the squares of the base's elements
    high: IntArray = field(default_factory=lambda: np.zeros(_HIGH, np.int64))
    low: IntArray = field(default_factory=lambda: np.zeros(_LOW, np.int64))
    largest: float = 0.0  #: energy of what is above the magnitudes in which the limit lies
    above: list[int] = field(default_factory=lambda: [0] * len(THRESHOLDS))
    _limit: int = -1  # upper half of the magnitudes in which the limit lies
    _within: int = 0  # how many of those are among the largest hundredth

    def survey(self, base: Floats, delta: Floats) -> None:
        """First pass."""
        self.base += _squares(base)
        self.energy += _squares(delta)
        self.high += np.bincount(_bits(delta) >> 16, minlength=_HIGH)

    def settle(self) -> bool:
        """Between the passes; False where there is nothing to find: no energy, or no number."""
        if not (np.isfinite(self.energy) and np.isfinite(self.base) and self.energy > 0):
            return False
        wanted = -(-self.elements // 100)
        from_top = np.cumsum(self.high[::-1])
        at = int(np.searchsorted(from_top, wanted))
        self._limit = _HIGH - 1 - at
        self._within = wanted - int(from_top[at] - self.high[self._limit])
        return True

    def weigh(self, delta: Floats) -> None:
        """Second pass, of the same differences."""
        bits = _bits(delta)
        high = bits >> 16
        self.largest += _squares(delta[high > self._limit])
        inside = bits[high == self._limit] & np.uint32(_LOW - 1)
        self.low += np.bincount(inside, minlength=_LOW)
        size = np.abs(delta)
        rms = (self.base / self.elements) ** 0.5
        for i, threshold in enumerate(THRESHOLDS):
            self.above[i] += int(np.count_nonzero(size > np.float64(threshold * rms)))

    def figures(self) -> list[float]:
        """The share of the energy that the largest 1 % have, and of elements above thresholds."""
        taken, left = self.largest, self._within
        found = np.flatnonzero(self.low)[::-1]
        for low, count in zip(found.tolist(), self.low[found].tolist(), strict=True):
            if not left:
                break
            value = np.array([self._limit << 16 | low], np.uint32).view(np.float32)[0]
            some = min(left, count)
            taken += some * float(value) ** 2
            left -= some
        return [taken / self.energy, *(count / self.elements for count in self.above)]


def _squares(values: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64)
        return float(wide @ wide)


def _bits(delta: Floats) -> npt.NDArray[np.uint32]:
    found: npt.NDArray[np.uint32] = delta.view(np.uint32) & _MAGNITUDE
    return found


class Energies:
    """Both checkpoints of a store, by the names of its matrices. A context manager."""

    def __init__(
        self, matched: Matched, chosen: IntArray, base: Given, tuned: Given, *, key: str | None
    ) -> None:
        self._matched, self._chosen = matched, chosen
        self._stack = ExitStack()
        try:
            opening = partial(open_checkpoint, key=key)
            sides = [open_in(self._stack, given, opening) for given in (base, tuned)]
            fetch_all(sides)
            self._sides = [seen_by(matched, side).checkpoint for side in sides]
        except BaseException:
            self._stack.close()
            raise
        self._index = [_positions(matched, chosen, side) for side in self._sides]
        table = matched.stores[0].table
        self._hashes = [
            [content_of(hashes[i]) for i in matched.positions[0][chosen].tolist()]
            for hashes in (table.base_hashes, table.tuned_hashes)
        ]

    def __enter__(self) -> Energies:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def need(self) -> Need:
        """What measuring takes of memory."""
        window = sum(side.reader_memory(8 * _WINDOW) for side in self._sides)
        return Need(tables=400 * len(self._chosen), worker=12 * 8 * _WINDOW + window)

    def measure(self, workers: int, observer: Observer) -> tuple[FloatArray, list[str]]:
        """(matrices, ENERGIES), and the names of matrices that have no numbers.

        Raises CheckpointError where a checkpoint is not the store's.
        """
        found = np.full((len(self._chosen), 1 + len(THRESHOLDS)), np.nan)
        shapes = [as_matrix(self._matched.shapes[i]) for i in self._chosen.tolist()]
        sizes = [rows * width for rows, width in shapes]
        known = [i for i in range(len(sizes)) if sizes[i] and self._measurable(i)]
        readers = PerThread(self._readers)
        meter = Meter(observer, 8 * sum(sizes[i] for i in known))

        def task(chunk: int, stop: threading.Event) -> list[float] | None:
            return self._measure(chunk, sizes[chunk], readers(), stop, meter)

        def done(chunk: int, figures: list[float] | None) -> None:
            if figures is not None:
                found[chunk] = figures

        workers = max(1, min(workers, len(known)))
        run_chunks(known, task, workers=workers, done=done, meter=meter)
        names = self._matched.names
        have = set(known)
        return found, [names[i] for at, i in enumerate(self._chosen.tolist()) if at not in have]

    def _readers(self) -> list[FloatReader]:
        """For one thread; closed with the rest."""
        readers = [FloatReader(side) for side in self._sides]
        for reader in readers:
            self._stack.callback(reader.close)
        return readers

    def _measurable(self, i: int) -> bool:
        places = [index[i] for index in self._index]
        return all(
            at >= 0 and has_numbers(side.table.dtypes[at])
            for at, side in zip(places, self._sides, strict=True)
        )

    def _measure(
        self, i: int, elements: int, readers: list[FloatReader], stop: threading.Event, meter: Meter
    ) -> list[float] | None:
        spread, hasher = Spread(elements), ContentHasher()
        sums = [np.zeros(2, np.uint64) for _ in readers]

        def windows(sums: list[npt.NDArray[np.uint64]]) -> Iterator[tuple[Floats, Floats]]:
            for start in range(0, elements, _WINDOW):
                if stop.is_set():
                    raise Stopped
                size = min(_WINDOW, elements - start)
                base, tuned = np.empty(size, np.float32), np.empty(size, np.float32)
                for side, out in enumerate((base, tuned)):
                    data = readers[side].read(self._index[side][i], start, out)
                    if sums:
                        hasher.add(sums[side], data, start * self._bits(side, i) // 8,
                                   self._bits(side, i))  # fmt: skip
                    readers[side].release()
                meter.add(4 * size)
                with np.errstate(over="ignore", invalid="ignore"):
                    yield base, tuned - base

        for base, delta in windows(sums):
            spread.survey(base, delta)
        self._verify(i, elements, sums)
        if not spread.settle():
            # of a matrix that did not move nothing is above a threshold; no energy has no share
            still = spread.energy == 0 and np.isfinite(spread.base)
            return [np.nan, *(0.0 for _ in THRESHOLDS)] if still else None
        for _, delta in windows([]):
            spread.weigh(delta)
        return spread.figures()

    def _bits(self, side: int, i: int) -> int:
        return DTYPES[self._sides[side].table.dtypes[self._index[side][i]]].bits

    def _verify(self, i: int, elements: int, sums: list[npt.NDArray[np.uint64]]) -> None:
        for side, name in enumerate(("base", "tuned")):
            wanted = self._hashes[side][i]
            checkpoint = self._sides[side]
            low, high = sums[side].tolist()
            digest = hashing.finish(low, high, elements * self._bits(side, i) // 8)
            if is_content_hash(wanted) and digest != wanted:
                tensor = printable(self._matched.names[int(self._chosen[i])])
                raise CheckpointError(
                    f"{printable(checkpoint.label)} is not the {name} side of this store: "
                    f"{tensor} has other content",
                    hint=f"give --{name} the checkpoint that the store was made from",
                )


def _positions(matched: Matched, chosen: IntArray, side: Checkpoint) -> list[int]:
    """Where a checkpoint has the matrices, -1 where it lacks one, or has it in another shape."""
    places = {name: i for i, name in enumerate(side.table.names)}
    found = []
    for i in chosen.tolist():
        at = places.get(matched.names[i], -1)
        shape, wanted = (side.table.shapes[at] if at >= 0 else ()), matched.shapes[i]
        fits = shape == wanted or (i in matched.resized and shape[1:] == wanted[1:])
        found.append(at if fits else -1)
    return found
