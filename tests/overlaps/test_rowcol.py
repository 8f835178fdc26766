"""The null `rowcol`: fits reproduce margins, mean and variance are right, z is a standard normal.

Right is what listing every matrix with given margins says, what a sampler that keeps margins says,
and what masks drawn independently show. docs/design/0010-rowcol-null.md has larger simulations.
"""

from __future__ import annotations

import functools
import time
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from ckdiff.errors import UsageError
from ckdiff.overlaps.nulls import fitting
from ckdiff.overlaps.nulls.fitting import Fit, fit
from ckdiff.overlaps.nulls.grid import FloatArray
from ckdiff.overlaps.nulls.margins import expected, expected_pairs

BoolArray = npt.NDArray[np.bool_]


def margins(mask: BoolArray) -> Fit:
    return fit(mask.sum(1), mask.sum(0))


def logistic(x: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-x))


def uniform(rng: np.random.Generator, rows: int, columns: int) -> tuple[FloatArray, FloatArray]:
    return np.full((rows, columns), 0.1), np.full((rows, columns), 0.15)


def striped(rng: np.random.Generator, rows: int, columns: int) -> tuple[FloatArray, FloatArray]:
    """The same few columns are dense in both."""
    p = np.full((rows, columns), 0.02)
    p[:, rng.permutation(columns)[: max(2, columns // 20)]] = 0.6
    return p, 0.8 * p


def heavy(
    rng: np.random.Generator, rows: int, columns: int, level: float = -2.5
) -> tuple[FloatArray, FloatArray]:
    """Rows and columns with heavy tails, alike in both."""
    a, b = 0.8 * rng.standard_t(3, rows), 0.8 * rng.standard_t(3, columns) + level
    noise = 0.3 * rng.standard_normal(rows)[:, None] + 0.2 * rng.standard_normal(columns)
    return logistic(a[:, None] + b), logistic(0.8 * a[:, None] + 0.9 * b + noise)


sparse = functools.partial(heavy, level=-5.0)
MODELS = {"uniform": uniform, "striped": striped, "heavy": heavy, "sparse": sparse}


def draw(rng: np.random.Generator, p: FloatArray) -> BoolArray:
    return rng.random(p.shape) < p


# -- fits ------------------------------------------------------------------------------------------


def worst(found: Fit, mask: BoolArray) -> float:
    """The largest difference of a margin, relative."""
    p = found.probabilities()
    assert np.isfinite(p).all()
    assert p.min(initial=0) >= 0
    assert p.max(initial=0) <= 1
    differences = [
        np.abs(p.sum(axis) - mask.sum(axis)) / np.maximum(mask.sum(axis), 1) for axis in (0, 1)
    ]
    return float(max(difference.max(initial=0) for difference in differences))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(30, 20), (7, 90), (200, 150)])
def test_a_fit_reproduces_the_margins(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for p in MODELS[name](rng, *shape):
        mask = draw(rng, p)
        found = margins(mask)
        assert found.converged
        assert found.total == mask.sum()
        assert worst(found, mask) < 1e-9


def test_a_fit_with_many_distinct_counts_reproduces_the_margins() -> None:
    rng = np.random.default_rng(2)
    mask = draw(rng, heavy(rng, 2500, 1200)[0])
    assert min(np.unique(mask.sum(axis)).size for axis in (0, 1)) > fitting.FITTED
    found = margins(mask)
    assert found.converged
    assert worst(found, mask) < 1e-6


def test_every_small_matrix_can_be_fitted() -> None:
    seen = set()
    for rows, columns in ((2, 2), (2, 3), (3, 3), (3, 4)):
        for number in range(1 << (rows * columns)):
            mask = (number >> np.arange(rows * columns) & 1).astype(np.bool_)
            mask = mask.reshape(rows, columns)
            key = (tuple(sorted(mask.sum(1))), tuple(sorted(mask.sum(0))))
            if key not in seen:
                seen.add(key)
                found = margins(mask)
                assert found.converged
                assert worst(found, mask) < 1e-8
                assert np.isfinite(expected(found, found)).all()
    assert len(seen) > 100


@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (4, 6), (300, 2)]
)
@pytest.mark.parametrize("value", [False, True])
def test_constant_masks_leave_no_choice(shape: tuple[int, int], value: bool) -> None:
    mask = np.full(shape, value)
    found = margins(mask)
    assert found.converged
    assert np.array_equal(found.probabilities(), mask.astype(float))
    assert expected(found, found) == (mask.sum(), 0)


def test_one_row_or_column_leaves_no_choice() -> None:
    rng = np.random.default_rng(3)
    for shape in ((1, 50), (50, 1)):
        one, other = rng.random((2, *shape)) < 0.5
        assert expected(margins(one), margins(other)) == ((one & other).sum(), 0)


def test_full_and_empty_rows_and_columns_are_exact() -> None:
    rng = np.random.default_rng(4)
    mask = draw(rng, np.full((30, 20), 0.3))
    mask[3], mask[5:7], mask[:, 4], mask[:, 9] = True, False, True, False
    mask[3, 9], mask[5, 4] = True, False  # row 3 first, then column 4 ...
    mask[6, 4] = False
    found = margins(mask)
    assert found.converged
    assert worst(found, mask) < 1e-9
    p = found.probabilities()
    assert (p[3] == 1).all()
    assert (p[5:7] == 0).all()


def test_nested_masks_leave_no_choice() -> None:
    mask = np.arange(300)[:, None] > np.arange(300)
    found = margins(mask)
    assert np.array_equal(found.probabilities(), mask.astype(float))
    assert expected(found, found) == (mask.sum(), 0)


def test_margins_that_no_matrix_has() -> None:
    for rows, columns in (([4, 4, 0, 0], [4, 4, 0, 0]), ([3, 3, 1, 1], [4, 4, 0, 0])):
        found = fit(rows, columns)
        assert not found.converged
        assert np.isfinite(expected(found, found)).all()
    impossible = fit([4, 4, 4, 1, 1, 1], [5, 5, 2, 1, 1, 1])  # found out only by not converging
    assert not impossible.converged
    assert np.isfinite(expected(impossible, impossible)).all()


def test_margins_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="the rows hold 2 changed elements, the columns 1"):
        fit([1, 1], [1, 0])
    with pytest.raises(UsageError, match="not within 0 and 2"):
        fit([3, 0], [2, 1])
    with pytest.raises(UsageError, match="not within 0 and 2"):
        fit([-1, 1], [0, 0])
    with pytest.raises(UsageError, match="two lists"):
        fit(np.zeros((2, 2), int), [0, 0])
    with pytest.raises(UsageError, match="shape"):
        expected(fit([1, 1], [1, 1]), fit([1, 1], [1, 1, 0]))


# -- mean and variance -----------------------------------------------------------------------------


def test_constant_margins_have_a_known_variance() -> None:
    rows, columns = 40, 60
    one = (np.arange(rows)[:, None] * 3 + np.arange(columns)) % 20 < 5  # 15 a row, 10 a column
    other = (np.arange(rows)[:, None] + np.arange(columns)) % 20 < 3
    p, q = 5 / 20, 3 / 20
    mean, variance = expected(margins(one), margins(other))
    n = rows * columns
    exact = p * (1 - p) * q * (1 - q) * n**2 / ((rows - 1) * (columns - 1))
    hypergeometric = n * p * (1 - p) * q * (1 - q) * n / (n - 1)
    assert mean == pytest.approx(n * p * q, rel=1e-9)
    assert variance == pytest.approx(exact, rel=1e-9)
    assert variance == pytest.approx(hypergeometric, rel=0.05)
    big = [fit(np.full(8000, 40 * k), np.full(4000, 80 * k)) for k in (10, 30)]
    mean, variance = expected(big[0], big[1])
    n, p, q = 32_000_000, 0.1, 0.3
    assert mean == pytest.approx(n * p * q, rel=1e-9)
    assert variance == pytest.approx(n * p * (1 - p) * q * (1 - q), rel=1e-3)


def test_against_every_matrix_with_the_margins() -> None:
    numbers = np.arange(1 << 16)
    every = (numbers[:, None] >> np.arange(16) & 1).astype(np.int8).reshape(-1, 4, 4)
    sums = np.concatenate([every.sum(2), every.sum(1)], 1)

    def those_like(mask: BoolArray) -> FloatArray:
        wanted = np.concatenate([mask.sum(1), mask.sum(0)])
        return every[(sums == wanted).all(1)].reshape(-1, 16).astype(np.float64)

    rng = np.random.default_rng(5)
    shifts, ratios = [], []
    while len(shifts) < 60:
        a, b = rng.normal(0, 0.8, (2, 4))
        one = draw(rng, logistic(a[:, None] + b))
        other = draw(rng, logistic(0.5 * a[:, None] + 0.5 * b))
        both = those_like(one) @ those_like(other).T
        if both.std() > 0.3:
            mean, variance = expected(margins(one), margins(other))
            shifts.append((mean - both.mean()) / both.std())
            ratios.append(np.sqrt(variance) / both.std())
    assert np.abs(shifts).max() < 0.2  # 0.16 among classes of a handful of matrices
    assert np.std(shifts) < 0.06
    assert abs(np.mean(shifts)) < 0.02
    assert min(ratios) > 0.85
    assert max(ratios) < 1.15
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def shuffled(mask: BoolArray, chains: int, rng: np.random.Generator) -> FloatArray:
    """Masks with the same margins, one from each of independent chains of curveball trades."""
    rows, columns = mask.shape
    state = np.repeat(mask[None], chains, 0)
    for _ in range(12 * rows):
        i, j = rng.choice(rows, 2, replace=False)
        differ = state[:, i] != state[:, j]
        wanted = (state[:, i] & differ).sum(1)
        order = np.where(differ, rng.random((chains, columns)), 2.0).argsort(1).argsort(1)
        to_i = order < wanted[:, None]
        state[:, i] = np.where(differ, to_i, state[:, i])
        state[:, j] = np.where(differ, ~to_i, state[:, j])
    return state.reshape(chains, -1).astype(np.float64)


@pytest.mark.parametrize("name", ["striped", "heavy"])
def test_against_a_sampler_that_keeps_the_margins(name: str) -> None:
    rng = np.random.default_rng(6)
    one, other = (draw(rng, p) for p in MODELS[name](rng, 24, 14))
    a, b = shuffled(one, 1500, rng), shuffled(other, 1500, rng)
    assert (a.reshape(-1, *one.shape).sum(2) == one.sum(1)).all()
    assert (a.reshape(-1, *one.shape).sum(1) == one.sum(0)).all()
    both = a @ b.T  # every pair is a draw from the null
    mean, variance = expected(margins(one), margins(other))
    assert abs(mean - both.mean()) / both.std() < 0.06
    assert np.sqrt(variance) == pytest.approx(both.std(), rel=0.04)


# -- z ---------------------------------------------------------------------------------------------


def z_of(one: BoolArray, other: BoolArray) -> float:
    mean, variance = expected(margins(one), margins(other))
    return float(((one & other).sum() - mean) / np.sqrt(variance))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("uniform", (60, 50)),
        ("striped", (90, 60)),
        ("striped", (40, 120)),
        ("heavy", (60, 50)),
        ("heavy", (400, 30)),
        ("sparse", (150, 40)),
    ],
)
def test_z_of_independent_masks_is_a_standard_normal(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    p, q = MODELS[name](rng, *shape)
    z = np.array([z_of(draw(rng, p), draw(rng, q)) for _ in range(200)])
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std() < 1.15
    assert np.abs(z).max() < 4.5


def test_products_of_margins_would_not_do() -> None:
    rng = np.random.default_rng(8)
    p, _ = heavy(rng, 700, 500, level=-1.0)
    one, other = draw(rng, p), draw(rng, p)
    product = [m.sum(1)[:, None] * m.sum(0) / m.sum() for m in (one, other)]
    variance = expected(margins(one), margins(other))[1]
    naive = ((one & other).sum() - (product[0] * product[1]).sum()) / np.sqrt(variance)
    assert abs(naive) > 10
    assert abs(z_of(one, other)) < 3


def test_masks_that_depend_on_each_other_have_a_large_z() -> None:
    rng = np.random.default_rng(9)
    for model in MODELS.values():
        p, q = model(rng, 200, 150)
        common = draw(rng, np.full(p.shape, 0.3))  # these elements are decided by one draw for both
        chance = rng.random(p.shape)
        one = chance < p
        other = np.where(common, chance, rng.random(p.shape)) < q
        assert z_of(one, other) > 5
        assert z_of(one, one) > 20


# -- groups, cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_grouping_hardly_changes_anything(name: str) -> None:
    rng = np.random.default_rng(10)
    one, other = (margins(draw(rng, p)) for p in MODELS[name](rng, 900, 500))
    exact = expected(one, other, groups=1000, accuracy=0)
    for grouped, tolerance in (
        (expected(one, other), 2e-3),
        (expected(one, other, groups=128), 0.03),
    ):
        assert abs(grouped[0] - exact[0]) / np.sqrt(exact[1]) < tolerance
        assert np.sqrt(grouped[1]) == pytest.approx(np.sqrt(exact[1]), rel=2e-3)


def test_cost_does_not_grow_with_the_matrix() -> None:
    rng = np.random.default_rng(11)
    rows, columns = 128_256, 8192  # 10⁹ elements
    r = rng.binomial(columns, logistic(0.5 * rng.standard_normal(rows) - 2))
    c = rng.multinomial(r.sum(), rng.dirichlet(np.full(columns, 20.0)))
    assert c.max() < rows
    tracemalloc.start()
    start = time.perf_counter()
    one = fit(r, c)
    mean, variance = expected(one, one)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.converged
    assert mean > r.sum() ** 2 / (rows * columns)
    assert np.sqrt(variance) < mean / 1000
    assert peak < 96 << 20
    assert seconds < 20  # measured: about 1


def test_all_pairs() -> None:
    rng = np.random.default_rng(12)
    p, q = heavy(rng, 40, 30)
    fits = [margins(draw(rng, x)) for x in (p, q, p)]
    mean, variance = expected_pairs(fits)
    assert mean[2, 1] == mean[1, 2]
    assert (mean[0, 1], variance[0, 1]) == pytest.approx(expected(fits[0], fits[1]))
    assert list(mean.diagonal()) == [one.total for one in fits]
    assert (variance.diagonal() == 0).all()
