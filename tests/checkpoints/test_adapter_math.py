"""The arithmetic of merging, against twins that look at one element at a time."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ckdiff.checkpoints.views.adaptermath import merged, product, rounded, runs, widened
from ckdiff.checkpoints.views.adaptersurvival import Survival, survival, survival_of_counts

Float32 = npt.NDArray[np.float32]
DTYPES = {"F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("f4")}


def nearest(exact: Fraction) -> np.float32:
    """The float32 nearest to a number, ties to even."""
    guess = np.float32(float(exact))
    near = [
        guess,
        np.nextafter(guess, np.float32(np.inf)),
        np.nextafter(guess, -np.float32(np.inf)),
    ]
    apart = [(abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1) for x in near]
    return near[apart.index(min(apart))]


def fused(left: Float32, right: Float32) -> np.float32:
    """A row times a column, one fused multiplication and addition after the other."""
    total = np.float32(0)
    for x, y in zip(left.tolist(), right.tolist(), strict=True):
        total = nearest(Fraction(x) * Fraction(y) + Fraction(float(total)))
    return total


_values = st.floats(-4, 4, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9))
def test_each_step_is_rounded_once(data: st.DataObject, rank: int) -> None:
    left = data.draw(arrays.arrays(np.float32, (2, rank), elements=_values))
    right = data.draw(arrays.arrays(np.float32, (rank, 3), elements=_values))
    found = product(left, right, 1.0)
    assert found.dtype == np.float32
    expected = [[fused(row, column) for column in right.T] for row in left]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_long_sums_are_sums_of_runs() -> None:
    assert [len(runs(rank)) for rank in (1, 192, 193, 384, 385, 576, 577)] == [1, 1, 2, 2, 3, 3, 4]
    for rank in (1, 192, 193, 384, 385, 1000):
        found = runs(rank)
        assert found[0][0] == 0
        assert found[-1][1] == rank
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(found))


def test_a_zero_keeps_its_sign_in_a_product_of_rank_one() -> None:
    left, right = np.array([[-1.0], [1.0]], np.float32), np.zeros((1, 2), np.float32)
    assert np.signbit(product(left, right, 1.0)).tolist() == [[True, True], [False, False]]
    wide = product(np.repeat(left, 2, 1), np.zeros((2, 2), np.float32), 1.0)
    assert not np.signbit(wide).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_others(dtype: str) -> None:
    random = np.random.default_rng(1)
    values = random.integers(0, 1 << 32, 200_000, np.uint32)
    values[::2] &= np.uint32(0xFFFF8000)  # ties of bfloat16
    values[1::4] &= np.uint32(0xFFFFF000)  # and of float16
    floats = values.view(np.float32)
    with np.errstate(all="ignore"):
        expected = floats.astype(DTYPES[dtype])
    found = rounded(floats, dtype).view(DTYPES[dtype])
    number = ~np.isnan(floats)
    np.testing.assert_array_equal(
        found.view(np.uint8).reshape(len(floats), -1)[number],
        expected.view(np.uint8).reshape(len(floats), -1)[number],
    )
    assert np.isnan(found[~number].astype(np.float32)).all()
    back = widened(found.view(np.uint8), dtype)
    np.testing.assert_array_equal(back[number], expected.astype(np.float32)[number])


def test_what_is_rounded_first_is_rounded_twice() -> None:
    """A layer's sum is rounded once; the change of an embedding is rounded before it is added."""
    weight = np.array([1.0], ml_dtypes.bfloat16).view(np.uint8)
    delta = np.array([2.0**-8 + 2.0**-20], np.float32)  # above half of the last place of 1.0
    once = merged(weight, "BF16", delta, round_first=False).view(ml_dtypes.bfloat16)
    twice = merged(weight, "BF16", delta, round_first=True).view(ml_dtypes.bfloat16)
    assert [float(x) for x in (*once, *twice)] == [1 + 2.0**-7, 1.0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), max_size=20))
def test_what_became_of_each_element(elements: list[tuple[int, int, int]]) -> None:
    base, expected, found = (
        np.array([row[i] for row in elements], np.uint16).view(np.uint8) for i in range(3)
    )
    counts = survival(base, expected, found, 2, asked=7)
    told = [
        "extra" if b == e != f else "" if b == e else
        "arrived" if e == f else "lost" if f == b else "other"
        for b, e, f in elements
    ]  # fmt: skip
    for name in ("arrived", "lost", "other", "extra"):
        assert getattr(counts, name) == told.count(name)
    assert counts.visible == counts.arrived + counts.lost + counts.other
    assert (counts.elements, counts.asked) == (len(elements), 7)
    both = sum(e not in (b, f) for b, e, f in elements)
    assert survival_of_counts(counts.visible, both) == (counts.arrived, counts.visible)
    assert (counts.share is None) == (counts.visible == 0)
    assert counts + Survival() == counts
    assert (counts + counts).arrived == 2 * counts.arrived
