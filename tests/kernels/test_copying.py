"""Runs of bytes that are copied by one call, held against copying them one after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.kernels.copying import copy_runs


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 40)), max_size=12))
def test_what_is_copied_and_what_is_left_alone(moves: list[tuple[bool, bool, int]]) -> None:
    """A gap may be on either side, or on both."""
    source = np.random.default_rng(len(moves)).integers(1, 256, 1000, np.uint8)
    out, expected = np.zeros((2, 1000), np.uint8)
    to = of = 0
    runs = []
    for gap_there, gap_here, size in moves:
        to, of = to + 3 * gap_there, of + 5 * gap_here
        runs.append((out.ctypes.data + to, source.ctypes.data + of, size))
        expected[to : to + size] = source[of : of + size]
        to, of = to + size, of + size
    copy_runs(np.array(runs, np.int64).reshape(-1, 3))
    assert out.tobytes() == expected.tobytes()


def test_what_is_no_table_of_runs_is_refused() -> None:
    for runs in (np.zeros(3, np.int64), np.zeros((3, 2), np.int64)):
        with pytest.raises(ValueError, match="runs have 3 columns"):
            copy_runs(runs)
    with pytest.raises(ValueError, match="contiguous"):
        copy_runs(np.zeros((3, 6), np.int64)[:, ::2])
    with pytest.raises(TypeError, match="int64"):
        copy_runs(np.zeros((1, 3), np.int32))
