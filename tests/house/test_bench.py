"""The benchmarks still run: small smoke runs, no timing asserts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    "name",
    [
        "casting",
        "codecs",
        "formats",
        "kernels",
        "mask_kernels",
        "many_tensors",
        "memory",
        "monitor",
        "out_of_core",
        "overlap",
        "cluster",
        "sparse_step",
        "structure",
        "publisher",
        "report",
        "sync",
        "timeline",
    ],
)
def test_benchmark_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / f"{name}.py"), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "|---|" in run.stdout


def test_diff_benchmark_counts_like_its_rivals(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "diff.py"), "--quick", "--dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr  # it compares every count with the rivals'
    assert "torch exact" in run.stdout


def test_delta_benchmark_rebuilds_and_stays_above_the_floor(tmp_path: Path) -> None:
    tools = ["packed", "xor1"]
    options = ["--quick", "--json", "--only", *tools, "--dir", str(tmp_path)]
    command = [sys.executable, str(BENCH / "delta.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    pairs = json.loads(run.stdout)["pairs"]
    assert [pair["kind"] for pair in pairs] == ["steps", "rl"]
    for pair in pairs:
        ours, xor = (pair["tools"][tool] for tool in tools)
        assert ours["rebuilt"] == xor["rebuilt"] == "files"
        assert pair["floor"]["given"] < ours["bytes"] < xor["bytes"]
    steps, rl = (pair["floor"] for pair in pairs)
    assert abs(steps["one_step"] - 0.5) < 0.01
    assert rl["given"] < 0.8 * rl["plain"]  # where changes are depends on the base
