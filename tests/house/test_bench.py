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


#: programs that import the same for longer than they run: one process for each line
TOGETHER = (
    "casting diff formats monitor sparse_step",  # torch
    "kernels mask_kernels overlap structure",  # numba
    "publisher sync timeline",
    "answers codecs many_tensors memory out_of_core report",
    "cluster",
)
RUN = """
import runpy, sys, traceback
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
failed = []
for name in names:
    print(f"=== {name}")
    sys.argv = [f"{folder}/{name}.py", "--quick"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:  # also the SystemExit of one that counted something else than its rivals
        traceback.print_exc()
        failed.append(name)
    sys.stdout.flush()
sys.exit(f"failed: {failed}" if failed else 0)
"""


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names.replace(" ", "-"))
def test_benchmarks_run(names: str, tmp_path: Path) -> None:
    """All that compare what several count end with an error where that differs."""
    command = [sys.executable, "-c", RUN, str(BENCH), *names.split()]
    if names == "cluster":  # it starts processes that import it again
        command = [sys.executable, str(BENCH / "cluster.py"), "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for said in run.stdout.split("=== ")[-len(names.split()) :]:
        assert "|---|" in said


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
