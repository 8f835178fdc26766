"""Profiles of matrices: the kernel counts what numpy counts on the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_profile import shape_of

from ckdiff.kernels.profiles import MARGIN, Profile


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 300),
    columns=st.one_of(st.integers(1, 40), st.sampled_from([64, 511, 512, 513, 700, 1024, 1100])),
    density=st.sampled_from([0.0, 0.002, 0.3, 1.0]),
    before=st.integers(0, 200),
)
def test_a_profile_is_what_counting_gives(
    seed: int, rows: int, columns: int, density: float, before: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.random((rows, columns)) < density
    # what is around the matrix must not be counted
    around = rng.random(before) < 0.5, rng.random(8 * MARGIN + 600) < 0.5
    mask = np.packbits(np.concatenate([around[0], matrix.ravel(), around[1]]), bitorder="little")
    profile, counts, at = Profile(columns), np.zeros(rows, np.int64), 0
    while at < rows:
        step = min(rows - at, int(rng.integers(1, 290)))
        profile.add(mask, before + at * columns, at, counts[at : at + step])
        at += step
    expected = shape_of(matrix)
    assert counts.tolist() == expected.rows
    assert profile.columns().tolist() == expected.columns
    assert profile.finish() == (expected.blocks16, expected.blocks128)
    assert profile.fours() == [sum(expected.fours[k:]) for k in (1, 2, 3, 4)]


def test_more_rows_than_a_short_counter_counts() -> None:
    rows, columns = (1 << 16) + 70, 3
    mask = np.full(rows * columns // 8 + 1 + MARGIN, 255, np.uint8)
    profile, counts = Profile(columns), np.zeros(rows, np.int64)
    profile.add(mask, 0, 0, counts[: 1 << 16])
    profile.add(mask, columns << 16, 1 << 16, counts[1 << 16 :])
    assert profile.columns().tolist() == [rows] * columns
    assert (counts == columns).all()
    assert profile.finish() == (-(-rows // 16), -(-rows // 128))


def test_a_mask_without_the_margin_is_refused() -> None:
    profile = Profile(100)
    with pytest.raises(ValueError, match="needs"):
        profile.add(np.zeros(12 + MARGIN, np.uint8), 0, 0, np.zeros(1, np.int64))
