"""The benchmarks still run: small smoke runs, no timing asserts."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PAGE = BENCH.parent / "docs/performance.md"
SECONDS = 900  # kernels are compiled in them where nobody has yet, and others run beside


@pytest.mark.parametrize(
    "name",
    [
        "answers",
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
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "|---|" in run.stdout


def test_every_table_of_the_page_has_a_program() -> None:
    parts = re.split(r"<!-- (?:bench/(\w+\.py)([^>]*)|machine|end) -->\n", PAGE.read_text("utf-8"))
    texts, programs, options = parts[::3], parts[1::3], parts[2::3]
    assert programs.count("answers.py") == 1
    for text, program, asked in zip(texts, [None, *programs], ["", *options], strict=True):
        assert program is not None or "|---|" not in text, text[:300]
        if program is not None:
            source = (BENCH / program).read_text("utf-8") + (BENCH / "common.py").read_text("utf-8")
            for word in [*shlex.split(asked), "--quick"]:
                assert not word.startswith("--") or f'"{word}"' in source, (program, word)


def test_the_page_is_measured_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    parts = (
        "<!-- bench/codecs.py -->\nold\n<!-- end -->\nkept <!-- machine -->\nold\n<!-- end -->\n"
    )
    left = "<!-- bench/gpu.py -->\nof a card\n<!-- end -->\n"
    page.write_text(parts + left, "utf-8")
    command = [sys.executable, str(BENCH / "all.py"), "--quick", "--write", "--page", str(page)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stderr
    text = page.read_text("utf-8")
    assert text.startswith("<!-- bench/codecs.py -->\n\n**Random masks**\n\n| density |")
    assert "old" not in text
    assert " cores, " in text.partition("kept <!-- machine -->\n")[2]
    assert text.endswith(left)


def test_diff_benchmark_counts_like_its_rivals(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "diff.py"), "--quick", "--dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stderr  # it compares every count with the rivals'
    assert "torch exact" in run.stdout


def test_delta_benchmark_rebuilds_and_stays_above_the_floor(tmp_path: Path) -> None:
    tools = ["packed", "xor1"]
    options = ["--quick", "--json", "--only", *tools, "--dir", str(tmp_path)]
    command = [sys.executable, str(BENCH / "delta.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
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
