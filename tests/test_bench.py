"""The benchmarks still run: small smoke runs, no timing asserts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    "name",
    [
        "codecs",
        "kernels",
        "mask_kernels",
        "many_tensors",
        "memory",
        "out_of_core",
        "overlap",
        "cluster",
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
