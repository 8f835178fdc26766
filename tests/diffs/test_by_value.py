"""Pairs of two float dtypes are compared by value, and with common rows what both sides have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from support import write_safetensors

import ckdiff
from ckdiff.dtypes import common

Array = npt.NDArray[Any]
KINDS: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def put(path: Path, tensors: dict[str, tuple[str, Array]]) -> Path:
    write_safetensors(path, {n: (d, a.shape, a.tobytes()) for n, (d, a) in tensors.items()})
    return path


def numbers(seed: int, size: int) -> Array:
    noise = np.random.default_rng(seed)
    found = noise.standard_normal(size) * np.exp(noise.uniform(-3, 3, size))
    found[:: max(1, size // 7)] = 0.0
    return found


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_counts_are_those_of_the_widened_bits(one: str, other: str, tmp_path: Path) -> None:
    if one == other:
        return
    values, size = numbers(1, 200_003), 200_003
    base = values.astype(KINDS[one])
    tuned = base.astype(np.float64).astype(KINDS[other])
    where = np.random.default_rng(2).integers(0, size, 5000)
    tuned[where] = (values[where] * 1.5).astype(KINDS[other])
    a = put(tmp_path / "a.safetensors", {"w": (one, base), "v": ("U8", np.arange(9, dtype="u1"))})
    b = put(
        tmp_path / "b.safetensors", {"w": (other, tuned), "v": ("U8", np.arange(9, dtype="u1"))}
    )
    found = ckdiff.diff(a, b, rules=["exact", "atol=0.25", "exact@bf16"])
    wide = KINDS[str(common(one, other))]
    words = f"u{np.dtype(wide).itemsize}"
    bits = base.astype(wide).view(words) != tuned.astype(wide).view(words)
    assert found.rules["exact"]["changed"] == int(bits.sum())
    assert found.unpaired["retyped"] == []
    # content hashes are of the bits as they are stored
    for side, path in (("base_hashes", a), ("tuned_hashes", b)):
        itself = ckdiff.diff(path, path, verify=True)
        assert getattr(found.table, side)[1] == itself.table.base_hashes[1]
    steps = [np.float32(x.astype(np.float64)) for x in (base, tuned)]
    if "F64" not in (one, other):
        moved = np.abs(steps[0] - steps[1]) > np.float32(0.25)
        assert found.rules["atol=0.25"]["changed"] == int(moved.sum())


@pytest.mark.parametrize(
    ("one", "other"), [("I8", "F32"), ("F32", "I32"), ("U8", "BF16"), ("F8_E8M0", "F32")]
)
def test_what_has_no_common_type_is_not_paired(one: str, other: str, tmp_path: Path) -> None:
    def some(dtype: str) -> Array:
        width = {"I8": 1, "U8": 1, "F8_E8M0": 1, "BF16": 2}.get(dtype, 4)
        return np.zeros(8 * width, np.uint8)

    for name, dtype in (("a", one), ("b", other)):
        tensors = {"w": (dtype, (8,), some(dtype).tobytes()), "v": ("U8", (1,), b"x")}
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    found = ckdiff.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.unpaired["retyped"] == ["w"]


@pytest.mark.parametrize("rows", [(8, 10), (10, 8), (1, 300)])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("BF16", "F32")])
def test_common_rows(rows: tuple[int, int], dtypes: tuple[str, str], tmp_path: Path) -> None:
    noise = np.random.default_rng(3)
    every = noise.standard_normal((300, 513)).astype(ml_dtypes.bfloat16)
    sides = [every[:count].astype(KINDS[dtype]) for count, dtype in zip(rows, dtypes, strict=True)]
    sides[1] = sides[1].copy()
    sides[1][0, 5] += 1
    sides[1][-1, 7] += 1  # beyond the common rows where the tuned side has more
    paths = [
        put(tmp_path / f"{i}.safetensors", {"e": (dtype, side), "x": ("U8", np.zeros(3, "u1"))})
        for i, (dtype, side) in enumerate(zip(dtypes, sides, strict=True))
    ]
    plain = ckdiff.diff(*paths)
    assert plain.unpaired["reshaped"] == ["e"]
    found = ckdiff.diff(*paths, common_rows=True)
    least = min(rows)
    one, other = (side[:least].astype(np.float32).view(np.uint32) for side in sides)
    assert found.rules["exact"]["changed"] == int((one != other).sum())
    assert found.table.shapes[0] == (least, 513)
    assert found.unpaired["reshaped"] == []


def test_one_dimension_has_rows_too_and_others_have_not(tmp_path: Path) -> None:
    one = {"bias": ("F32", np.zeros(4, "f4")), "m": ("F32", np.zeros((2, 3), "f4"))}
    other = {"bias": ("F32", np.ones(6, "f4")), "m": ("F32", np.zeros((2, 4), "f4"))}
    a, b = put(tmp_path / "a.safetensors", one), put(tmp_path / "b.safetensors", other)
    found = ckdiff.diff(a, b, common_rows=True)
    assert (found.table.names, found.rules["exact"]["changed"]) == (["bias"], 4)
    assert found.unpaired["reshaped"] == ["m"]
