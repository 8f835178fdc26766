"""Which way runs moved what they share: as numpy says, and only of the right checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cli_support import ok, run
from support import write_safetensors

import ckdiff
from ckdiff.overlaps import directions

NUMPY: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U64": np.uint64,
    "BOOL": np.bool_,
}


def write(path: Path, tensors: dict[str, Any]) -> Path:
    return write_safetensors(
        path, {n: (n.split(".")[-1], v.shape, v.tobytes()) for n, v in tensors.items()}
    )


def runs(root: Path, count: int = 3, rows: int = 300) -> tuple[list[Path], list[dict[str, Any]]]:
    """A base and some tuned checkpoints, in files, and their values."""
    rng = np.random.default_rng(5)
    base, sides = {}, [dict[str, Any]() for _ in range(count)]
    for i, (dtype, kind) in enumerate(NUMPY.items()):
        name = f"layers.{i}.{dtype}"
        values = (
            rng.integers(1, 100, (rows, 11))
            if dtype[0] in "IU"
            else rng.standard_normal((rows, 11))
        )
        base[name] = (values > 0 if dtype == "BOOL" else values).astype(kind)
        for side in sides:
            moved = rng.random(values.shape) < 0.4
            step = rng.choice([-1, 1, 1], values.shape) * (1 if dtype[0] in "IU" else 0.5)
            tuned = values + moved * step
            side[name] = (tuned > 0 if dtype == "BOOL" else tuned).astype(kind)
    for side in sides:  # what moves neither way
        side["layers.1.F32"][:4] = -0.0
        side["layers.1.F32"][4] = np.nan
    base["layers.1.F32"][:4] = 0.0
    everything = [base, *sides]
    return [write(root / f"{i}.safetensors", side) for i, side in enumerate(everything)], everything


def expected(values: list[dict[str, Any]], name: str, a: int, b: int) -> list[int]:
    base, one, other = (values[i][name] for i in (0, a + 1, b + 1))

    def bits(array: Any) -> Any:
        return array.view(f"u{array.itemsize}")

    both = (bits(one) != bits(base)) & (bits(other) != bits(base))
    if name.endswith("BOOL"):
        return [0, 0, int(both.sum())]

    def sign(tuned: Any) -> Any:
        wide = np.float64 if base.dtype.kind not in "iu" else base.dtype
        low, high = base.astype(wide), tuned.astype(wide)
        return (high > low).astype(int) - (high < low).astype(int)

    product = (sign(one) * sign(other))[both]
    same, opposite = int((product == 1).sum()), int((product == -1).sum())
    return [same, opposite, int(both.sum()) - same - opposite]


@pytest.mark.parametrize("piece", [1 << 19, 512])
def test_directions_are_those_of_numpy(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "_PIECE", piece)
    paths, values = runs(tmp_path)
    stores = [tmp_path / f"{i}.zarr" for i in range(3)]
    for tuned, store in zip(paths[1:], stores, strict=True):
        ckdiff.diff(paths[0], tuned, store)
    found = ckdiff.overlap(stores, base=paths[0], tuned=paths[1:], by="tensor")
    total = np.zeros(3, np.int64)
    for row in found.rows()[1:]:
        for pair in row["pairs"]:
            counts = expected(values, row["group"], pair["a"], pair["b"])
            got = [pair[f"moved_{way}"] for way in ("same", "opposite", "neither")]
            assert got == counts, row["group"]
            moved = counts[0] + counts[1]
            assert pair["same_direction"] == (counts[0] / moved if moved else None)
            if (pair["a"], pair["b"]) == (0, 1):
                total += counts
    model = found.rows()[0]["pairs"][0]
    assert [model[f"moved_{way}"] for way in ("same", "opposite", "neither")] == total.tolist()
    one = ckdiff.overlap(stores, base=paths[0], tuned=paths[1:], by="model").rows()
    assert one[0]["pairs"][0]["moved_same"] == total[0]


def test_two_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    base = np.array([[1.0, 1.0, 1.0, 1.0]])
    tuned = np.array([[2.0, 0.5, 1.0000001, 3.0]]), np.array([[2.0, 2.0, 1.5, 1.0]])
    content: list[tuple[str, Any]] = [
        ("BF16", base.astype(NUMPY["BF16"])),
        ("F32", tuned[0].astype(np.float32)),
        ("BF16", tuned[1].astype(NUMPY["BF16"])),
    ]
    paths = [
        write_safetensors(tmp_path / f"{i}.st", {"w": (dtype, (1, 4), values.tobytes())})
        for i, (dtype, values) in enumerate(content)
    ]
    stores = [tmp_path / f"{i}.zarr" for i in range(2)]
    for side, store in zip(paths[1:], stores, strict=True):
        ckdiff.diff(paths[0], side, store)
    pair = ckdiff.overlap(stores, base=paths[0], tuned=paths[1:]).rows()[0]["pairs"][0]
    assert (pair["moved_same"], pair["moved_opposite"], pair["moved_neither"]) == (2, 1, 0)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    paths, _ = runs(tmp_path, 2, 20)
    stores = [tmp_path / f"{i}.zarr" for i in range(2)]
    for tuned, store in zip(paths[1:], stores, strict=True):
        ckdiff.diff(paths[0], tuned, store)
    with pytest.raises(ckdiff.CheckpointError, match="not the tuned side"):
        ckdiff.overlap(stores, base=paths[0], tuned=[paths[2], paths[1]])
    with pytest.raises(ckdiff.CheckpointError, match="not the base side"):
        ckdiff.overlap(stores, base=paths[1], tuned=paths[1:])
    with pytest.raises(ckdiff.UsageError, match="2 stores need 2 tuned"):
        ckdiff.overlap(stores, base=paths[0], tuned=paths[1:2])
    with pytest.raises(ckdiff.UsageError, match="needs the base that the runs"):
        ckdiff.overlap(stores, tuned=paths[1:])


def test_what_stores_name_is_found_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = runs(tmp_path, 2, 20)
    stores = [str(tmp_path / f"{i}.zarr") for i in range(2)]
    for tuned, store in zip(paths[1:], stores, strict=True):
        ckdiff.diff(paths[0], tuned, store)
    monkeypatch.chdir(tmp_path)
    said = ok("overlap", *stores, "--base", str(paths[0]), "--json")
    pair = json.loads(said.stdout)["rows"][0]["pairs"][0]
    assert pair["same_direction"] > 0.5
    assert "the same way" in ok("overlap", *stores, "--base", str(paths[0])).stdout
    paths[2].write_bytes(paths[1].read_bytes())
    result = run("overlap", *stores, "--base", str(paths[0]), "--json")
    assert result.exit_code == 0
    assert "has other content" in result.stderr
    assert "same_direction" not in json.loads(result.stdout)["rows"][0]["pairs"][0]
