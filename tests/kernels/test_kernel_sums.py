"""Statistics and content hashes against their twin, and their independence of windows."""

from __future__ import annotations

import math
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, run, some_elements

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import hashing, statistics

# -- statistics ------------------------------------------------------------------------------------


def read_statistics(row: npt.NDArray[np.float64]) -> dict[str, Any]:
    counts = row.view(np.int64)
    histogram = counts[statistics.HISTOGRAM :].tolist()
    while histogram and not histogram[-1]:
        histogram.pop()
    return {
        "sum_abs_delta": row[statistics.SUM_ABS],
        "l2_delta": math.sqrt(row[statistics.SUM_SQUARES]),
        "max_abs_delta": row[statistics.MAX_ABS],
        "l2_base": math.sqrt(row[statistics.BASE_SQUARES]),
        "l2_tuned": math.sqrt(row[statistics.TUNED_SQUARES]),
        "dot": row[statistics.DOT],
        "sign_flips": int(counts[statistics.SIGN_FLIPS]),
        "nonfinite": int(counts[statistics.NONFINITE]),
        "ulp_histogram": histogram,
    }


def same_statistics(found: dict[str, Any], expected: dict[str, Any]) -> None:
    # a dot product may cancel, so its error is measured by what was added up
    scale = {"dot": expected["l2_base"] * expected["l2_tuned"]}
    for key, want in expected.items():
        if key in ("max_abs_delta", "sign_flips", "nonfinite", "ulp_histogram"):
            assert found[key] == want, key
        else:
            assert found[key] == pytest.approx(want, rel=1e-12, abs=1e-12 * scale.get(key, 0)), key


def moderate(dtype: str, data: bytes) -> bytes:
    """F64 elements without the exponents whose squares overflow; anything else as it is."""
    if dtype != "F64":
        return data
    numbers = np.frombuffer(data, np.uint64).copy()
    exponent = numbers >> np.uint64(52) & np.uint64(0x7FF)
    wild = ((exponent > 1450) | (exponent < 600)) & (exponent != 0x7FF)
    numbers[wild] &= np.uint64(0x800FFFFFFFFFFFFF)
    numbers[wild] |= np.uint64(1023 << 52)
    return numbers.tobytes()


@pytest.mark.parametrize("dtype", [*naive.FLOATS, *naive.INTEGERS])
def test_statistics(dtype: str) -> None:
    for count in (1, 63, 64, 65, 700, 3000):
        base, tuned = (moderate(dtype, d) for d in some_elements(dtype, count, count))
        found = run(dtype, [], base, tuned, stats=True, offset=3)
        assert found.statistics is not None
        same_statistics(
            read_statistics(found.statistics), naive.statistics(dtype, base, tuned)
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8"])
def test_statistics_of_every_8_bit_pair(dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    base, tuned = np.repeat(every, 256).tobytes(), np.tile(every, 256).tobytes()
    found = run(dtype, [], base, tuned, stats=True)
    assert found.statistics is not None
    same_statistics(read_statistics(found.statistics), naive.statistics(dtype, base, tuned))


def test_statistics_of_signed_zeros_and_infinities() -> None:
    base = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-40], np.float32).tobytes()
    tuned = np.array([-0.0, 0.0, np.inf, np.inf, 1.0, -1.0, 1.0, -1e-40], np.float32).tobytes()
    found = run("F32", [], base, tuned, stats=True)
    assert found.statistics is not None
    got = read_statistics(found.statistics)
    same_statistics(got, naive.statistics("F32", base, tuned))
    assert (got["sign_flips"], got["nonfinite"], got["ulp_histogram"][0]) == (3, 3, 2)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "I64"])
def test_statistics_do_not_depend_on_windows(dtype: str) -> None:
    """Bit for bit, wherever a window ends: windows end at whole blocks of addresses."""
    base, tuned = (moderate(dtype, d) for d in some_elements(dtype, 5 * 65536 + 77, 3))
    rows = []
    for cuts in ([], [65536], [65536 * 2, 65536 * 3], [65536 * k for k in range(1, 6)]):
        found = run(dtype, [], base, tuned, stats=True, cuts=cuts, offset=len(cuts))
        assert found.statistics is not None
        rows.append(found.statistics.tobytes())
    assert len(set(rows)) == 1


# -- hashes ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES)), count=st.integers(1, 4000), seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 7)),
)  # fmt: skip
def test_hashes_do_not_depend_on_pieces(dtype: str, count: int, seed: int, cuts: set[int]) -> None:
    count = -(-count // naive.per_byte(dtype)) * naive.per_byte(dtype)
    base, tuned = some_elements(dtype, count, seed)
    found = run(dtype, [], base, tuned, cuts=[512 * c for c in sorted(cuts) if 512 * c < count])
    assert found.hashes == [naive.content_hash(dtype, base), naive.content_hash(dtype, tuned)]
    sums = hashing.add_units(memoryview(base), 0, 64 * DTYPES[dtype].bits)
    assert hashing.finish(*sums, len(base)) == found.hashes[0]


def test_hashes_of_equal_bytes_are_equal_and_of_others_not() -> None:
    base, _ = some_elements("BF16", 5000, 1)
    hashes = {run("BF16", [], base, base).hashes[1]}
    for byte in (0, 1, 1023, 1024, 5119, 9999):
        tuned = bytearray(base)
        tuned[byte] ^= 1
        found = run("BF16", [], base, bytes(tuned))
        assert found.hashes == [naive.content_hash("BF16", base),
                                naive.content_hash("BF16", bytes(tuned))]  # fmt: skip
        hashes.add(found.hashes[1])
    swapped = base[1024:2048] + base[:1024] + base[2048:]  # units that change places
    hashes.add(run("BF16", [], base, swapped).hashes[1])
    assert len(hashes) == 8


def test_hashing_without_the_library_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "xxh3_128_address", lambda: 0)
    kernels.cache_clear()
    try:
        for dtype in ("F4", "U8", "BF16", "F64"):
            base, tuned = some_elements(dtype, 1700, 5)
            found = run(dtype, [], base, tuned, cuts=[1024], offset=1)
            assert found.hashes == [
                naive.content_hash(dtype, base), naive.content_hash(dtype, tuned),
            ]  # fmt: skip
    finally:
        kernels.cache_clear()


def test_the_library_function_is_found() -> None:
    """Otherwise hashing runs at a hundredth of its speed."""
    assert hashing.xxh3_128_address() != 0
    assert xxhash.xxh3_128_hexdigest(b"") == "99aa06d3014798d86001c324468d497f"


@given(st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 2, st.integers(0, 2**62)), max_size=5))
def test_many_hashes_are_finished_as_one_is(tensors: list[tuple[int, int, int]]) -> None:
    sums = np.array([(low, high) for low, high, _ in tensors], np.uint64).reshape(-1, 2)
    nbytes = np.array([count for _, _, count in tensors], np.int64)
    wide = np.zeros((len(tensors), 4), np.uint64)
    wide[:, 2:] = sums  # as both sides lie in one table
    expected = [hashing.finish(*tensor) for tensor in tensors]
    assert hashing.finish_all(sums, nbytes) == expected
    assert hashing.finish_all(wide[:, 2:], nbytes) == expected
