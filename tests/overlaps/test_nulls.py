"""The nulls are what they say: for masks drawn independently under one, z is standard normal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mask_stores import make_base, make_store, random_base

import ckdiff
from ckdiff.overlaps.nulls import moments as nulls

Flags = npt.NDArray[np.bool_]
Rng = np.random.Generator

RUNS = 24  # stores: 276 pairs, of which 23 at a time are independent
SHAPES = {
    "layers.0.up.weight": ("BF16", (60, 90)),
    "layers.1.up.weight": ("BF16", (90, 61)),
    "layers.1.norm.weight": ("BF16", (700,)),
}


def choose(rng: Rng, size: int, changed: int) -> Flags:
    """A mask with exactly ``changed`` elements, all such masks alike."""
    mask = np.zeros(size, bool)
    mask[rng.choice(size, changed, replace=False)] = True
    return mask


def under_model(rng: Rng, base: Any) -> dict[str, Flags]:
    sizes = {name: math.prod(shape) for name, (_, shape, _) in base.items()}
    whole = choose(rng, sum(sizes.values()), int(rng.integers(1000, 3000)))
    cuts = np.cumsum([0, *sizes.values()])
    return {name: whole[a:b] for name, (a, b) in zip(sizes, itertools.pairwise(cuts), strict=True)}


def under_tensor(rng: Rng, base: Any) -> dict[str, Flags]:
    """Tensors differ in density, alike in every run."""
    densities = [0.4, 0.02, 0.9]
    return {
        name: choose(rng, math.prod(shape), int(math.prod(shape) * d * rng.uniform(0.8, 1.1)))
        for (name, (_, shape, _)), d in zip(base.items(), densities, strict=True)
    }


def under_magnitude(rng: Rng, base: Any) -> dict[str, Flags]:
    """The smaller the weight, the likelier it flips."""
    return {
        name: rng.random(bits.size) < np.exp2(-np.maximum(((bits >> 7) & 0xFF) - 112.0, 0) / 2)
        for name, (_, _, bits) in base.items()
    }


def under_rowcol(rng: Rng, base: Any) -> dict[str, Flags]:
    """Some rows and columns change far more than others, in every run."""
    masks = {}
    for name, (_, shape, bits) in base.items():
        if len(shape) < 2:
            masks[name] = choose(rng, bits.size, bits.size // 5)
            continue
        rows = np.where(np.arange(shape[0]) % 9 == 0, 2.0, -2.5)
        columns = np.where(np.arange(shape[1]) % 7 == 0, 1.5, -0.5)
        odds = np.exp(rows[:, None] + columns)
        masks[name] = (rng.random(shape) < odds / (1 + odds)).ravel()
    return masks


Draw = Callable[[Rng, Any], dict[str, Flags]]
DRAWS: dict[str, Draw] = {
    "model": under_model,
    "tensor": under_tensor,
    "magnitude": under_magnitude,
    "rowcol": under_rowcol,
}


def scores(folder: Path, draw: Draw, base: Any, names: list[str]) -> dict[str, list[float]]:
    """z of every pair of independent runs over the model, by null."""
    rng = np.random.default_rng(20250708)
    stores = [make_store(folder / f"{i}.zarr", base, draw(rng, base)).path for i in range(RUNS)]
    found = ckdiff.overlap(stores, by="model", nulls=names, base=make_base(folder / "base", base))
    pairs = found.rows()[0]["pairs"]
    return {name: [pair["nulls"][name]["z"] for pair in pairs] for name in names}


@pytest.mark.parametrize("null", list(DRAWS))
def test_z_is_standard_normal_under_its_own_null(null: str, tmp_path: Path) -> None:
    base = random_base(np.random.default_rng(1), SHAPES)
    z = np.array(scores(tmp_path, DRAWS[null], base, [null])[null])
    # Pairs are uncorrelated, though not independent: the mean of 276 has a deviation of about 0.06.
    assert abs(z.mean()) < 0.2
    assert 0.87 < z.std() < 1.13
    assert 0.005 < (np.abs(z) > 1.96).mean() < 0.11


@pytest.mark.parametrize(
    ("truth", "blind"),
    [("tensor", "model"), ("magnitude", "tensor"), ("rowcol", "tensor")],
)
def test_a_coarser_null_takes_structure_for_agreement(
    truth: str, blind: str, tmp_path: Path
) -> None:
    """What a null leaves out shows: independent runs look as if they agreed beyond chance."""
    base = random_base(np.random.default_rng(1), SHAPES)
    found = scores(tmp_path, DRAWS[truth], base, [truth, blind])
    assert np.mean(found[blind]) > 5
    assert abs(np.mean(found[truth])) < 0.3


def enumerate_cell(n: int, a: int, b: int) -> tuple[float, float]:
    """Mean and variance of |A and B| over all masks of the sizes, by counting them."""
    first = set(range(a))
    sizes = [len(first & set(other)) for other in itertools.combinations(range(n), b)]
    return float(np.mean(sizes)), float(np.var(sizes))


@pytest.mark.parametrize(("n", "a", "b"), [(1, 1, 1), (1, 0, 1), (5, 2, 3), (8, 4, 4), (9, 1, 8)])
def test_a_cell_is_hypergeometric(n: int, a: int, b: int) -> None:
    mean, variance = nulls.of_cells([n, 0], [[a, 0], [b, 0]])
    wanted = enumerate_cell(n, a, b)
    assert (mean[0], variance[0]) == pytest.approx(wanted)
    grouped = nulls.of_tensors(
        np.array([n, n, 0]), np.array([[a, a, 0], [b, b, 0]]), np.array([1, 1, 0]), 2
    )
    assert grouped.mean[:, 0].tolist() == pytest.approx([0, 2 * wanted[0]])
    assert grouped.variance[:, 0].tolist() == pytest.approx([0, 2 * wanted[1]])


def test_blocks_of_tensors_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n = rng.integers(1, 1000, 300)
    a = (n * rng.random((4, 300))).astype(np.int64)
    groups = rng.integers(0, 7, 300)
    whole = nulls.of_tensors(n, a, groups, 7)
    monkeypatch.setattr(nulls, "_BLOCK", 60)
    parts = nulls.of_tensors(n, a, groups, 7)
    assert np.array_equal(whole.mean, parts.mean)
    assert np.array_equal(whole.variance, parts.variance)
    for group in range(7):
        mine = groups == group
        mean, variance = nulls.of_cells(n[mine], a[:, mine])
        assert whole.mean[group] == pytest.approx(mean)
        assert whole.variance[group] == pytest.approx(variance)


def test_figures_without_a_value() -> None:
    assert nulls.figures(0, 0, 5, 0.0, 0.0) == {
        "expected": 0.0, "lift": None, "z": None, "expected_jaccard": 0.0,
    }  # fmt: skip
    found = nulls.figures(60, 100, 200, 20.0, 16.0)
    assert (found["lift"], found["z"]) == (3, 10)
    assert found["expected_jaccard"] == 20 / 280
