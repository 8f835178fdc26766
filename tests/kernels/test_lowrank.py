"""Products of thin matrices, against a twin that goes from element to element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.kernels.lowrank import multiply, padded


def twin(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The same in float64, in which products are exact, rounded to float32 after each step."""
    total = np.full((len(left), right.shape[1]), -0.0 if len(right) == 1 else 0.0, np.float32)
    for k in range(len(right)):
        exact = left[:, k, None].astype(np.float64) * right[k].astype(np.float64)
        total = (exact + total.astype(np.float64)).astype(np.float32)
    return total


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 200), st.integers(0, 1 << 30))
def test_any_shape(rows: int, rank: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    left = random.standard_normal((rows, rank)).astype(np.float32)
    right = np.zeros((rank, padded(columns)), np.float32)
    right[:, :columns] = random.standard_normal((rank, columns)) * (random.random() > 0.1)
    added = random.standard_normal((rows, padded(columns))).astype(np.float32)
    guarded = np.full((rows + 2, padded(columns)), 7, np.float32)
    out, scale = guarded[1:-1], np.float32(random.standard_normal())
    multiply(left, right, float(scale), out)
    expected = twin(left, right) * scale
    assert out.tobytes() == expected.tobytes()
    multiply(left, right, float(scale), out, added)
    assert out.tobytes() == (added + expected).tobytes()
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()


def test_denormals_are_kept() -> None:
    tiny = np.float32(2.0**-70)
    left, right = np.full((1, 2), tiny), np.full((2, 64), tiny)
    out = np.empty((1, 64), np.float32)
    multiply(left, right, 1.0, out)
    assert (out.view(np.uint32) == 1 << 149 - 139).all()


@pytest.mark.parametrize("wrong", ["rank", "columns", "rows", "dtype", "padding", "added"])
def test_arrays_that_do_not_fit(wrong: str) -> None:
    left, right, out = (np.zeros(s, np.float32) for s in ((2, 3), (3, 64), (2, 64)))
    added = None
    if wrong == "rank":
        left = np.zeros((2, 4), np.float32)
    elif wrong == "columns":
        out = np.zeros((2, 128), np.float32)
    elif wrong == "rows":
        out = np.zeros((3, 64), np.float32)
    elif wrong == "dtype":
        left = np.zeros((2, 3), np.float64)
    elif wrong == "padding":
        right, out = np.zeros((3, 65), np.float32), np.zeros((2, 65), np.float32)
    else:
        added = np.zeros((3, 64), np.float32)
    with pytest.raises((ValueError, TypeError)):
        multiply(left, right, 1.0, out, added)
