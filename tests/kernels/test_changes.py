"""What differs between two windows, against a naive twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.kernels.changes import ChangeFinder, Changes

WINDOW = 1 << 12


def naive_changes(old: np.ndarray, new: np.ndarray) -> Changes:
    kind = "<u1" if len(old) % 2 else "<u2"
    one, other = (array.view(kind).tolist() for array in (old, new))
    at = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    values = (np.array([side[i] for i in at], kind) for side in (one, other))
    return Changes(np.array(at, np.uint32), *values)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, WINDOW) | st.integers(0, 200),
    st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]), st.integers(0, 3),
)  # fmt: skip
def test_changes_are_those_of_the_twin(seed: int, size: int, share: float, offset: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = np.empty((2, WINDOW + 8), np.uint8)
    old[:] = rng.integers(0, 256, len(old))
    new[:] = old
    where = np.flatnonzero(rng.random(len(new)) < share)
    new[where] ^= rng.integers(1, 256, len(where), dtype=np.uint8)
    one, other = old[offset:][:size], new[offset:][:size]
    found = ChangeFinder(WINDOW).find(one, other)
    for mine, twin in zip(found, naive_changes(one, other), strict=True):
        assert mine.dtype == twin.dtype
        assert mine.tolist() == twin.tolist()


def test_windows_that_do_not_fit_are_refused() -> None:
    finder = ChangeFinder(64)
    for sizes in ((10, 12), (65, 65)):
        with pytest.raises(ValueError, match="one size"):
            finder.find(*(np.zeros(size, np.uint8) for size in sizes))
    with pytest.raises(TypeError):
        finder.find(np.zeros(8, np.int8), np.zeros(8, np.int8))
