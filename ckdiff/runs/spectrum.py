"""What an update looks like as a matrix: ranks, norms, and how far it turns the weights.

The rank is that of arXiv:2505.11711, the rank of 99 % of the energy that of arXiv:2602.07729, the
normalised spectral shift and the principal angles are those of arXiv:2511.08567. One matrix is in
memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import Given, fetch_all
from ckdiff.errors import UsageError, install
from ckdiff.figures.frames import Framed, Record
from ckdiff.options import Observer, checked_observer
from ckdiff.running.runners import Meter, interruptible
from ckdiff.runs.spectra.matrix import (
    FloatArray,
    finite,
    rank,
    rank_of_energy,
    read_matrix,
    singular_values,
)
from ckdiff.runs.spectra.plan import Matrix, Options, SpectrumPlan, plan
from ckdiff.runs.spectra.shown import SpectrumPlots, spectrum_html
from ckdiff.runs.values import FloatReader, Floats

MEASURES = ("rank", "rank_share", "stable_rank", "rank99", "norm2", "norm")
#: the singular values of a matrix, the largest first
Values = Callable[[Floats], FloatArray]


@dataclass(slots=True, eq=False)
class Spectrum(Framed):
    """The spectra of an update's matrices, and which checkpoints they come from."""

    base: str
    tuned: str
    device: str
    matrices: int  #: that there are; ``rows`` has those that were looked at
    groups: list[dict[str, Any]]  #: ``group``, ``shape``, ``matrices``, ``taken``
    without: list[str]  #: matrices whose elements are no numbers
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What ``ckdiff spectrum --json`` prints."""
        names = ("base", "tuned", "device", "matrices", "groups", "without", "seconds", "rows")
        return {name: getattr(self, name) for name in names}

    def records(self) -> list[Record]:
        """A dict for each matrix that was looked at: the rows of the JSON contract."""
        return [dict(row) for row in self.rows]

    @property
    def plot(self) -> SpectrumPlots:
        """Pictures: ``plot.ranks()``, ``plot.norms()``."""
        return SpectrumPlots(self.rows)

    def _columns(self) -> Sequence[str]:
        return ("name", "dtype", "shape", "group", "sampled", "finite", *MEASURES)

    def _repr_html_(self) -> str:
        return spectrum_html(self.to_dict())


def spectrum(
    base: Given, tuned: Given, *, observer: Observer | None = None, **options: Any
) -> Spectrum:
    """Summarise the singular values of the update of each matrix in a few numbers.

    ``options`` are those of ``ckdiff spectrum``: ``tensors`` and ``exclude`` (globs), ``rename``,
    ``key``, ``common_rows``, ``unfuse``, ``dequantize``, ``angles``, ``sample``, ``all``,
    ``device``, ``memory``. In a large model only a sample is taken, unless ``all`` is given. Raises
    a CkdiffError: UsageError, PairingError, CheckpointError, BudgetError, SourceChanged.
    """
    known = Options.__slots__
    if strange := sorted(options.keys() - set(known)):
        raise UsageError(f"spectrum has no option {strange[0]}", hint=f"it has {', '.join(known)}")
    with plan(base, tuned, Options(**options)) as planned:
        return run(planned, observer)


def run(planned: SpectrumPlan, observer: Observer | None = None) -> Spectrum:
    """Carry out a plan, one matrix after the other. Raises BudgetError where it does not fit."""
    observer, began = checked_observer(observer), time.perf_counter()
    if (refused := planned.refusal()) is not None:
        raise refused
    values = _on_device(planned.options.device)
    comparison = planned.comparison
    result = Spectrum(
        *planned.asked,
        planned.options.device,
        sum(group["matrices"] for group in planned.groups),
        planned.groups,
        planned.without,
    )
    if any(matrix.sampled for matrix in planned.matrices):
        observer.note(
            f"a sample: {len(planned.matrices):,} of {result.matrices:,} matrices, at most "
            f"{max(group['taken'] for group in planned.groups)} of each module and shape; --all "
            "takes all"
        )
    fetch_all([comparison.base, comparison.tuned])
    sizes = [matrix.shape[0] * matrix.shape[1] for matrix in planned.matrices]
    meter = Meter(observer, 8 * sum(sizes))
    readers = [FloatReader(side.checkpoint) for side in comparison.sides]
    try:
        with interruptible():
            for matrix, size in zip(planned.matrices, sizes, strict=True):
                meter.report()
                result.rows.append(_row(planned, matrix, readers, values))
                meter.add(8 * size)
    finally:
        for reader in readers:
            reader.close()
    meter.finish()
    result.seconds = time.perf_counter() - began
    return result


def _row(
    planned: SpectrumPlan, matrix: Matrix, readers: list[FloatReader], values: Values
) -> dict[str, Any]:
    comparison, i = planned.comparison, matrix.pair
    index = [int(side.index[i]) for side in comparison.sides]
    delta = read_matrix(readers[0], index[0], matrix.shape)
    delta = read_matrix(readers[1], index[1], matrix.shape, minus=delta)
    found = {
        "name": comparison.pairing.names[i],
        "dtype": comparison.dtypes[i],
        "shape": list(comparison.shapes[i]),
        "group": matrix.group,
        "sampled": matrix.sampled,
        "finite": finite(delta),
    }
    found |= figures(values(delta) if found["finite"] else None, matrix.shape)
    if planned.options.angles is not None:
        del delta
        sides = [
            read_matrix(reader, at, matrix.shape) for reader, at in zip(readers, index, strict=True)
        ]
        found |= turned(sides, planned.options.angles)
    return found


def figures(values: FloatArray | None, shape: tuple[int, int]) -> dict[str, Any]:
    """What the singular values of a difference say; None where it has elements that are not finite.

    ``rank`` as ``torch.linalg.matrix_rank`` counts it in float32, ``rank_share`` of the smaller
    dimension; ``stable_rank`` the sum of squares over the largest square, null without a change;
    ``rank99`` the fewest values with 99 % of the sum of squares; ``norm2`` the largest value;
    ``norm`` the root of the sum of squares.
    """
    if values is None:
        return dict.fromkeys(MEASURES)
    squares, largest = float((values**2).sum()), float(values[0])
    counted = rank(values, shape)
    return {
        "rank": counted,
        "rank_share": counted / min(shape),
        "stable_rank": squares / largest**2 if largest else None,
        "rank99": rank_of_energy(values, 0.99),
        "norm2": largest,
        "norm": squares**0.5,
    }


def turned(sides: list[Floats], angles: int) -> dict[str, Any]:
    """How far the tuned matrix is turned from the base's, and how far its spectrum has moved.

    ``shift`` is the norm of the difference of the singular values over that of the base's.
    ``cosines`` are those of the principal angles between the subspaces of the ``angles_k`` leading
    left singular vectors, the largest first; ``angles`` these in radians. They are null where a
    side is not finite, or zero. The matrices may not be used any more.
    """
    size = min(angles, *sides[0].shape)
    found: dict[str, Any] = {"shift": None, "angles_k": size, "cosines": None, "angles": None}
    if not all(map(finite, sides)):
        return found
    leading, spectra = [], []
    while sides:
        left, values, _ = np.linalg.svd(sides.pop(0), full_matrices=False)
        leading.append(left[:, :size].astype(np.float64))
        spectra.append(values.astype(np.float64))
        del left
    norms = [float(np.linalg.norm(values)) for values in spectra]
    if norms[0]:
        found["shift"] = float(np.linalg.norm(spectra[1] - spectra[0])) / norms[0]
    if all(norms):
        cosines = np.clip(np.linalg.svd(leading[0].T @ leading[1], compute_uv=False), 0, 1)
        found |= {"cosines": cosines.tolist(), "angles": np.arccos(cosines).tolist()}
    return found


def _on_device(device: str) -> Values:
    """How singular values are computed. Raises UsageError where there is no such device."""
    if device == "cpu":
        return singular_values
    try:
        import torch
    except ImportError:
        raise UsageError(
            "--device cuda takes torch, which is not installed",
            hint=f"{install('torch')}, or leave out --device",
        ) from None
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device that torch can use", hint="leave out --device")

    def values(matrix: Floats) -> FloatArray:
        there = torch.from_numpy(matrix).to("cuda")
        found: FloatArray = torch.linalg.svdvals(there).cpu().numpy().astype(np.float64)
        return found

    return values
