"""How the energy of an update is spread: two passes say what sorting all differences does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import write_safetensors

import ckdiff
from ckdiff.runs.structures import energy

NUMPY = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
}


def write(path: Path, tensors: dict[str, tuple[str, Any]]) -> Path:
    content = {
        name: (dtype, values.shape, values.astype(NUMPY[dtype]).tobytes())
        for name, (dtype, values) in tensors.items()
    }
    return write_safetensors(path, content)


def pair(root: Path, seed: int = 0) -> tuple[Path, Path, dict[str, tuple[Any, Any]]]:
    rng = np.random.default_rng(seed)
    sides: list[dict[str, tuple[str, Any]]] = [{}, {}]
    values = {}
    for i, dtype in enumerate(NUMPY):
        base = rng.standard_normal((37, 21 + i)) * 0.1
        if dtype == "I16":
            base = np.round(base * 1000)
        moved = rng.random(base.shape) < 0.3
        tuned = base + moved * rng.standard_normal(base.shape) * (20 if dtype == "I16" else 0.02)
        for side, array in zip(sides, (base, tuned), strict=True):
            side[f"{dtype}.weight"] = dtype, array
        values[f"{dtype}.weight"] = tuple(
            array.astype(NUMPY[dtype]).astype(np.float32) for array in (base, tuned)
        )
    base, tuned = (
        write(root / f"{name}.safetensors", side)
        for name, side in zip(("base", "tuned"), sides, strict=True)
    )
    return base, tuned, values


def two(root: Path, base: Any, tuned: Any) -> list[Path]:
    both = enumerate((base, tuned))
    return [write(root / f"{i}.safetensors", {"w": ("F32", values)}) for i, values in both]


def expected(base: Any, tuned: Any) -> list[float]:
    delta = (tuned - base).astype(np.float64).ravel()
    squares = np.sort(delta**2)[::-1]
    rms = np.sqrt((base.astype(np.float64) ** 2).mean())
    few = squares[: -(-len(squares) // 100)].sum() / squares.sum()
    return [few, *(float((np.abs(delta) > t * rms).mean()) for t in (1e-4, 1e-3, 1e-2))]


@pytest.mark.parametrize("window", [1 << 19, 512])
def test_shares_are_those_of_the_sorted_differences(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "_WINDOW", window)
    base, tuned, values = pair(tmp_path)
    ckdiff.diff(base, tuned, tmp_path / "s.zarr")
    found = ckdiff.structure(tmp_path / "s.zarr", base=base, tuned=tuned).to_dict()
    assert found["unmeasured"] == []
    assert len(found["rows"]) == len(NUMPY)
    for row in found["rows"]:
        keys = ("energy_top1", "above_rms_1e-4", "above_rms_1e-3", "above_rms_1e-2")
        assert [row[key] for key in keys] == pytest.approx(expected(*values[row["name"]]), rel=1e-9)


def test_equal_values_at_the_limit_are_counted_once(tmp_path: Path) -> None:
    base = np.zeros((10, 100))
    tuned = base.copy()
    tuned[0, :50] = 0.5  # ten of them are one hundredth
    sides = two(tmp_path, base, tuned)
    ckdiff.diff(*sides, tmp_path / "s.zarr")
    row = ckdiff.structure(tmp_path / "s.zarr", base=sides[0], tuned=sides[1]).to_dict()["rows"][0]
    assert row["energy_top1"] == pytest.approx(0.2)
    assert row["above_rms_1e-2"] == 0.05


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_without_a_number_there_is_no_share(tmp_path: Path, value: float) -> None:
    base = np.ones((4, 4))
    tuned = base.copy()
    tuned[0, 0] += value
    sides = two(tmp_path, base, tuned)
    ckdiff.diff(*sides, tmp_path / "s.zarr")
    row = ckdiff.structure(tmp_path / "s.zarr", base=sides[0], tuned=sides[1]).to_dict()["rows"][0]
    assert row["energy_top1"] is None
    shares = [row[key] for key in row if key.startswith("above_rms")]
    assert shares == [None if value else 0.0] * 3  # of nothing that moved nothing is above


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path)
    ckdiff.diff(base, tuned, tmp_path / "s.zarr")
    with pytest.raises(ckdiff.CheckpointError, match="not the base side of this store"):
        ckdiff.structure(tmp_path / "s.zarr", base=tuned, tuned=tuned)
    with pytest.raises(ckdiff.CheckpointError, match="not the tuned side of this store"):
        ckdiff.structure(tmp_path / "s.zarr", base=base, tuned=base)


def test_what_has_no_numbers_is_named(tmp_path: Path) -> None:
    sides = [
        write_safetensors(tmp_path / f"{i}.st", {"w": ("BOOL", (2, 2), bytes([0, i, 0, 1]))})
        for i in range(2)
    ]
    ckdiff.diff(*sides, tmp_path / "s.zarr")
    found = ckdiff.structure(tmp_path / "s.zarr", base=sides[0], tuned=sides[1])
    assert found.unmeasured == ["w"]
    assert found.to_dict()["rows"][0]["energy_top1"] is None
