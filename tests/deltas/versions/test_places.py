"""Where bytes changed, against the naive way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.deltas.versions.places import nonzero


@given(
    size=st.integers(0, 200),
    share=st.sampled_from([0, 0.01, 0.3, 1]),
    seed=st.integers(0, 99),
)
def test_nonzero_is_flatnonzero(size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 256, size).astype(np.uint8) * (rng.random(size) < share)
    found = nonzero(data.astype(np.uint8))
    np.testing.assert_array_equal(found, np.flatnonzero(data))
    assert found.dtype == np.int64


@pytest.mark.parametrize("at", range(17))
def test_each_byte_is_seen(at: int) -> None:
    data = np.zeros(17, np.uint8)
    data[at] = 128
    assert nonzero(data).tolist() == [at]
