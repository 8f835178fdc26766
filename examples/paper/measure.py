"""What ckdiff says of the runs: of each one, and of how far they agree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ckdiff
from paper.build import Build
from paper.runs import Run

STORED = ("exact", "atol=1e-5")
TRAINED = ("exact", "atol=1e-8", "atol=1e-5", "atol=1e-4", "exact@bf16")
NULLS = ("model", "tensor", "magnitude", "rowcol")


def measure_run(build: Build, run: Run) -> dict[str, Any]:
    """Density, timeline, structure and rank of a finished run, from all its checkpoints."""
    name = run.name
    result = ckdiff.diff(
        build.base, build.tuned(name), build.store(name), rules=STORED, workers=1, overwrite=True
    )
    trained = ckdiff.diff(build.base, build.masters(name), rules=TRAINED, stats=True, workers=1)
    store = ckdiff.open_store(build.store(name))
    steps = [build.checkpoint(name, step) for step in run.checkpoints]
    course = ckdiff.timeline(
        [build.base, *steps], build.timeline(name), workers=1, overwrite=True
    ).to_dict()
    out = {
        "density": densities(result),
        "density_f32": densities(trained),
        "mean_move": mean_move(trained),
        "layers": groups(store, "layer"),
        "modules": groups(store, "module"),
        "timeline": {key: course[key] for key in ("elements", "never", "returned", "final")},
        "steps": [
            {key: step[key] for key in ("density", "density_since_previous", "coverage")}
            for step in course["steps"]
        ],
        "structure": shape_of(build, name),
        "digest": digest(store),
    }
    if run.mask:
        out["like_full"] = likeness(build, run)
    return out


def densities(result: ckdiff.DiffResult) -> dict[str, float]:
    return {rule: counted["density"] for rule, counted in result.rules.items()}


def mean_move(result: ckdiff.DiffResult) -> float:
    """Mean |Δ| of all weights."""
    total = sum(row["sum_abs_delta"] for row in result.to_dict()["statistics"])
    return float(total) / result.elements


def groups(store: ckdiff.MaskStore, by: Any) -> dict[str, float]:
    """Density of each layer or module."""
    return {row["group"]: row["rules"]["exact"]["density"] for row in store.summary(by=by)}


def digest(store: ckdiff.MaskStore) -> str:
    """One hash of the tuned model's bits: the same model has the same, whatever its file."""
    found = hashlib.sha256()
    for tensor in store.tensors:
        found.update(f"{tensor.name} {tensor.tuned_hash}\n".encode())
    return found.hexdigest()[:32]


def shape_of(build: Build, name: str) -> dict[str, float]:
    """Means over matrices: how much of rows, columns and blocks is touched, and the rank."""
    rows = ckdiff.structure(build.store(name), workers=1).to_dict()["rows"]
    shares = {
        "rows": _mean([row["rows_touched"] / row["rows"] for row in rows]),
        "columns": _mean([row["columns_touched"] / row["columns"] for row in rows]),
        "blocks16": _mean([row["blocks16_touched"] / row["blocks16"] for row in rows]),
    }
    spectra = {
        "stored": ckdiff.spectrum(build.base, build.tuned(name)).rows,
        "masters": ckdiff.spectrum(build.base, build.masters(name)).rows,
    }
    for kind, matrices in spectra.items():
        shares[f"rank_share_{kind}"] = _mean([row["rank_share"] for row in matrices])
        shares[f"rank99_share_{kind}"] = _mean(
            [row["rank99"] / min(row["shape"]) for row in matrices]
        )
    return shares


def _mean(values: list[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return sum(known) / max(1, len(known))


def likeness(build: Build, run: Run) -> dict[str, Any]:
    """Which share of the weights of a masked run equals the full run's, by rule."""
    stored = ckdiff.diff(build.tuned(run.of), build.tuned(run.name), workers=1)
    trained = ckdiff.diff(
        build.masters(run.of), build.masters(run.name), rules=TRAINED[:4], workers=1
    )
    return {
        "stored": {rule: 1 - value for rule, value in densities(stored).items()},
        "masters": {rule: 1 - value for rule, value in densities(trained).items()},
    }


def cosine(build: Build, first: str, second: str) -> float:
    """Of two runs' updates: ‖Δ₁ − Δ₂‖² = ‖Δ₁‖² + ‖Δ₂‖² − 2 Δ₁·Δ₂, and all three are distances."""
    pairs = [
        (build.base, build.masters(first)),
        (build.base, build.masters(second)),
        (build.masters(first), build.masters(second)),
    ]
    one, two, apart = (
        sum(row["l2_delta"] ** 2 for row in _statistics(base, tuned)) for base, tuned in pairs
    )
    return float((one + two - apart) / (2 * (one * two) ** 0.5)) if one * two > 0 else 0.0


def _statistics(base: Path, tuned: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ckdiff.diff(base, tuned, stats=True, workers=1).to_dict()[
        "statistics"
    ]
    return found
