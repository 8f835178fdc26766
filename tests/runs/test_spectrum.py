"""Spectra of updates: what torch and whole decompositions say."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import error, ok
from support import write_safetensors
from test_structure_energy import NUMPY, write

import ckdiff
from ckdiff.runs.spectra import plan
from ckdiff.runs.spectrum import figures


def pair(root: Path, seed: int = 0) -> tuple[Path, Path, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    base: dict[str, tuple[str, Any]] = {}
    tuned: dict[str, tuple[str, Any]] = {}
    for i, dtype in enumerate(NUMPY):
        one = np.round(rng.standard_normal((24, 17 + i)) * 10)
        low = np.round(rng.standard_normal((24, 2)) @ rng.standard_normal((2, 17 + i)) * 10)
        base[f"layers.{i}.{dtype}.weight"] = dtype, one
        tuned[f"layers.{i}.{dtype}.weight"] = dtype, one + low * (1 if dtype != "F8_E4M3" else 0.1)
    base["conv.weight"] = "F32", rng.standard_normal((5, 3, 2, 2))
    tuned["conv.weight"] = (
        "F32",
        base["conv.weight"][1] + np.outer(np.ones(5), np.ones(12)).reshape(5, 3, 2, 2),
    )
    base["same.weight"] = tuned["same.weight"] = "BF16", rng.standard_normal((4, 9))
    base["bias"] = tuned["bias"] = "BF16", rng.standard_normal(9)
    paths = [
        write(root / f"{name}.safetensors", side) for name, side in (("b", base), ("t", tuned))
    ]
    deltas = {
        name: tuned[name][1].astype(NUMPY[dtype]).astype(np.float32)
        - values.astype(NUMPY[dtype]).astype(np.float32)
        for name, (dtype, values) in base.items()
    }
    return paths[0], paths[1], deltas


def test_figures_are_those_of_torch(tmp_path: Path) -> None:
    base, tuned, deltas = pair(tmp_path)
    found = ckdiff.spectrum(base, tuned).to_dict()
    assert [row["name"] for row in found["rows"]] == [n for n in sorted(deltas) if n != "bias"]
    assert found["matrices"] == len(deltas) - 1
    for row in found["rows"]:
        delta = torch.from_numpy(deltas[row["name"]].reshape(row["shape"][0], -1))
        values = torch.linalg.svdvals(delta.double()).numpy()
        assert row["rank"] == int(torch.linalg.matrix_rank(delta)), row["name"]
        assert row["rank_share"] == row["rank"] / min(delta.shape)
        assert row["norm2"] == pytest.approx(values[0], rel=1e-5, abs=1e-12)
        assert row["sampled"] is False
        if row["name"] == "same.weight":
            assert (row["rank"], row["stable_rank"], row["rank99"]) == (0, None, 0)
            continue
        squares = values**2
        assert row["stable_rank"] == pytest.approx(squares.sum() / squares[0], rel=1e-4)
        assert row["rank99"] == int(np.argmax(np.cumsum(squares) >= 0.99 * squares.sum())) + 1
    ranks = {row["name"]: row["rank"] for row in found["rows"]}
    assert ranks["conv.weight"] == 1


def test_what_singular_values_say_by_hand() -> None:
    found = figures(np.array([10.0, 1.0, 1e-9]), (5, 3))
    assert (found["rank"], found["rank99"], found["norm2"]) == (2, 1, 10)
    assert found["stable_rank"] == pytest.approx(1.01)
    assert found["rank_share"] == 2 / 3
    assert figures(None, (5, 3))["rank"] is None


def test_angles_and_shift(tmp_path: Path) -> None:
    base, tuned = np.diag([4.0, 2.0, 1.0]), np.diag([4.0, 2.0, 1.0])
    turn = 0.3
    rotation = np.array(
        [[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]]
    )
    paths = [
        write(tmp_path / f"{i}.safetensors", {"w": ("F64", matrix)})
        for i, matrix in enumerate((base, rotation @ tuned * 1.5))
    ]
    row = ckdiff.spectrum(*paths, angles=2).to_dict()["rows"][0]
    assert row["angles_k"] == 2
    assert row["angles"] == pytest.approx([0, turn], abs=1e-3)
    assert row["cosines"] == pytest.approx([1, np.cos(turn)], abs=1e-6)
    assert row["shift"] == pytest.approx(0.5, rel=1e-5)
    zero = write(tmp_path / "z.safetensors", {"w": ("F64", np.zeros((3, 3)))})
    row = ckdiff.spectrum(zero, paths[0], angles=9).to_dict()["rows"][0]
    assert (row["shift"], row["angles"], row["angles_k"], row["rank"]) == (None, None, 3, 3)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e300])
def test_what_is_not_finite_has_no_rank(tmp_path: Path, value: float) -> None:
    base, tuned = np.ones((3, 3)), np.ones((3, 3))
    tuned[1, 1] = value
    paths = [
        write(tmp_path / f"{i}.safetensors", {"w": ("F64", matrix)})
        for i, matrix in enumerate((base, tuned))
    ]
    row = ckdiff.spectrum(*paths, angles=1).to_dict()["rows"][0]
    assert row["finite"] is False
    assert row["rank"] is row["norm2"] is row["angles"] is None


def layers(path: Path, count: int, step: float) -> Path:
    rng = np.random.default_rng(3)
    return write(
        path,
        {
            f"m.layers.{i}.{part}.weight": ("F32", rng.standard_normal((6, 5)) + step * i)
            for i in range(count)
            for part in ("up", "down")
        }
        | {"head.weight": ("F32", rng.standard_normal((8, 5)))},
    )


def test_large_models_are_sampled_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = layers(tmp_path / "a.st", 9, 0), layers(tmp_path / "b.st", 9, 1)
    assert len(ckdiff.spectrum(base, tuned).rows) == 19
    monkeypatch.setattr(plan, "LARGE", 100)
    notes: list[str] = []
    found = ckdiff.spectrum(base, tuned, observer=ckdiff.Observer(note=notes.append))
    names = [row["name"] for row in found.rows if ".up." in row["name"]]
    assert names == [f"m.layers.{i}.up.weight" for i in (0, 4, 8)]
    assert {row["name"]: row["sampled"] for row in found.rows}["head.weight"] is False
    assert all(row["sampled"] for row in found.rows if "layers" in row["name"])
    assert "7 of 19 matrices" in notes[0]
    assert len(ckdiff.spectrum(base, tuned, all=True).rows) == 19
    assert len(ckdiff.spectrum(base, tuned, sample=2, tensors="*up*").rows) == 2


def test_the_plan_says_what_it_takes_and_refuses(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path)
    found = json.loads(ok("spectrum", str(base), str(tuned), "--dry-run", "--json").stdout)
    assert found["refusal"] is None
    assert 0 < found["memory_needed"] < found["memory"]
    assert "one matrix at a time" in ok("spectrum", str(base), str(tuned), "--dry-run").stdout
    said = error("spectrum", str(base), str(tuned), "--memory", "50MiB")
    assert "too little" in said
    assert "--exclude" in said
    with pytest.raises(ckdiff.UsageError, match="is a matrix of numbers"):
        ckdiff.spectrum(base, tuned, tensors="nothing")
    with pytest.raises(ckdiff.UsageError, match="no option"):
        ckdiff.spectrum(base, tuned, ranks=3)
    with pytest.raises(ckdiff.UsageError, match="give one of"):
        ckdiff.spectrum(base, tuned, all=True, sample=3)


def test_matrices_without_numbers_are_named(tmp_path: Path) -> None:
    flags = {"f": ("BOOL", (2, 2), bytes(4)), "w": ("F32", (1, 2), bytes(8))}
    paths = [write_safetensors(tmp_path / f"{i}.st", flags) for i in range(2)]
    found = ckdiff.spectrum(*paths)
    assert found.without == ["f"]
    assert [row["name"] for row in found.rows] == ["w"]


def test_common_rows_and_other_dtypes(tmp_path: Path) -> None:
    base = write(tmp_path / "a.st", {"w": ("BF16", np.ones((4, 3)))})
    tuned = write(tmp_path / "b.st", {"w": ("F32", np.full((6, 3), 1.25))})
    row = ckdiff.spectrum(base, tuned, common_rows=True).rows[0]
    assert (row["shape"], row["rank"]) == ([4, 3], 1)
    assert row["norm2"] == pytest.approx(0.25 * 12**0.5)


def test_the_command(tmp_path: Path) -> None:
    base, tuned, _ = pair(tmp_path)
    every = ok("spectrum", str(base), str(tuned), "--angles", "2", "--csv").stdout
    rows = list(csv.DictReader(io.StringIO(every)))
    said = json.loads(ok("spectrum", str(base), str(tuned), "--angles", "2", "--json").stdout)
    assert [row["name"] for row in rows] == [row["name"] for row in said["rows"]]
    for row, found in zip(rows, said["rows"], strict=True):
        assert set(found) - set(row) == {"cosines", "angles"}
        assert row["rank"] == ("" if found["rank"] is None else str(found["rank"]))
    text = ok("spectrum", str(base), str(tuned), "--angles", "2").stdout
    assert "8 of 8 matrices" in text
    assert "largest" in text
    found = json.loads(ok("spectrum", str(base), str(tuned), "--json").stdout)
    keys = {"name", "shape", "rank", "stable_rank", "rank99", "norm2", "sampled"}
    assert keys <= set(found["rows"][0])
    if not torch.cuda.is_available():
        assert "no CUDA device" in error("spectrum", str(base), str(tuned), "--device", "cuda")
