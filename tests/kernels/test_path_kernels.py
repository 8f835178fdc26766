"""How far elements went, and which way: the kernel against its naive twin."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import naive
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_timeline import ways

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi, paths


def added(dtype: str, sides: list[bytes], cuts: tuple[int, ...] = ()) -> npt.NDArray[np.float64]:
    """A row for each step of one tensor, handed over in jobs that begin at ``cuts``."""
    bits, count = DTYPES[dtype].bits, len(sides[0]) * 8 // DTYPES[dtype].bits
    held = [np.frombuffer(b"\x55" * 3 + side + b"\xaa" * 64, np.uint8) for side in sides]
    places = [array.ctypes.data + 3 for array in held]
    jobs = [
        [*(p + first * bits // 8 for p in (places[0], before, now)), stop - first, first, step]
        for first, stop in pairwise([0, *cuts, count])
        for step, (before, now) in enumerate(pairwise(places))
    ]
    into = np.zeros((len(sides) - 1, paths.COLUMNS))
    paths.add_paths(DTYPES[dtype], np.array(jobs, np.int64), into)
    return into


def drawn(dtype: str, count: int, steps: int, seed: int, share: float) -> list[bytes]:
    """A run in which some elements change at each step, and some return."""
    chance, width = random.Random(seed), DTYPES[dtype].bits // 8
    sides = [chance.randbytes(count * width)]
    for _ in range(steps):
        now = bytearray(sides[-1])
        for at in range(0, count * width, width):
            if chance.random() < share:
                back = chance.random() < 0.4
                now[at : at + width] = (
                    sides[0][at : at + width] if back else chance.randbytes(width)
                )
        sides.append(bytes(now))
    return sides


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(
        ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2FNUZ", "I8", "U8", "I64", "U32"]
    ),
    count=st.sampled_from([1, 63, 64, 512, 1100]),
    steps=st.integers(1, 4),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.02, 0.6]),
)
def test_twin(dtype: str, count: int, steps: int, seed: int, share: float) -> None:
    sides = drawn(dtype, count, steps, seed, share)
    found = added(dtype, sides, tuple(cut for cut in (512, 1024) if cut < count))
    for row, way in zip(found, ways(dtype, sides), strict=True):
        counts = row.view(np.int64)[paths.COUNTS :].tolist()
        assert counts == [way.onward, way.back, way.nonfinite]
        for value, exact in zip(row.tolist(), (way.step_length, way.distance), strict=False):
            if exact > Fraction(2) ** 1023:  # of float64: sums may be infinite
                continue
            assert value == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_sums_do_not_depend_on_how_much_is_looked_at_at_a_time() -> None:
    count = 3 * abi.PATHS_BLOCK + 700
    chance = np.random.default_rng(3)
    sides = [chance.standard_normal(count).astype("<f4").tobytes() for _ in range(4)]
    whole = added("F32", sides)
    parts = added("F32", sides, (abi.PATHS_BLOCK, 3 * abi.PATHS_BLOCK))
    assert whole.tobytes() == parts.tobytes()
    values = [np.frombuffer(side, "<f4").astype(np.float64) for side in sides]
    steps = [abs(b - a).sum() for a, b in pairwise(values)]
    assert whole[:, 0] == pytest.approx(steps, rel=1e-12)
    assert whole[:, 1] == pytest.approx([abs(v - values[0]).sum() for v in values[1:]], rel=1e-12)


def test_zeros_of_both_signs_and_subnormals() -> None:
    def bits(*values: int) -> bytes:
        return np.array(values, "<u2").tobytes()

    first, before, now = bits(0x8000, 1, 0x7F80), bits(0, 2, 0x7F80), bits(0x8001, 3, 0x7F80)
    found = added("BF16", [first, before, now])
    assert found[0].view(np.int64)[2:].tolist() == [0, 0, 1]
    assert found[1].view(np.int64)[2:].tolist() == [1, 0, 1]
    least = float(naive.value("BF16", 1))
    assert found[0, :2].tolist() == [least, least]
    assert found[1, :2].tolist() == [2 * least, 3 * least]


def test_what_does_not_fit_is_refused() -> None:
    into, jobs = np.zeros((1, paths.COLUMNS)), np.zeros((1, paths.JOB_COLUMNS), np.int64)
    with pytest.raises(ValueError, match="has no numbers"):
        paths.add_paths(DTYPES["BOOL"], jobs, into)
    jobs[0, abi.PATHS_OUT] = 1
    with pytest.raises(ValueError, match="reach"):
        paths.add_paths(DTYPES["BF16"], jobs, into)
    jobs[0, abi.PATHS_OUT], jobs[0, abi.PATHS_POSITION] = 0, 5
    with pytest.raises(ValueError, match="whole units"):
        paths.add_paths(DTYPES["BF16"], jobs, into)
    jobs[0, abi.PATHS_POSITION], jobs[0, abi.PATHS_ELEMENTS] = 0, -1
    with pytest.raises(ValueError, match="fewer than"):
        paths.add_paths(DTYPES["BF16"], jobs, into)
    with pytest.raises(ValueError, match="columns"):
        paths.add_paths(DTYPES["BF16"], jobs[:, :-1].copy(), into)
