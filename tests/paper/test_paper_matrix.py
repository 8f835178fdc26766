"""The matrix of runs, and the order in which they are done."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import example_programs  # makes the programs importable
import pytest
from paper.__main__ import main
from paper.build import Build, write_json
from paper.retrain import EARLY, MASKS, again, counterpart, early_step, lenders
from paper.runs import ALGORITHMS, MATRICES, chosen, matrix, needs, of
from paper.schedule import Crew, Mismatch, compare, run_all, settle
from paper.tickets import TICKETS
from paper.work import Job, alone, jobs_of


@pytest.mark.parametrize("name", MATRICES)
def test_every_run_has_a_name_of_its_own_and_what_it_needs(name: str) -> None:
    runs = MATRICES[name]()
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(runs):
        assert set(needs(run)) <= set(names[:place]), run.name
        assert run.mask in {"", *MASKS, *TICKETS}
        assert all(part not in run.name for part in "/ *")


def test_the_matrix_has_what_the_claims_are_about() -> None:
    runs = matrix()
    seeds = Counter(run.algorithm for run in runs if run.group == "main" and run.task == "sort")
    assert seeds == dict.fromkeys(ALGORITHMS, 3)
    other = {run.algorithm for run in runs if run.task == "sum" and run.optimizer == "adamw"}
    assert len(other) >= 3
    grpo = [run for run in runs if run.algorithm == "grpo" and not run.mask]
    arms = {(run.optimizer, run.precision) for run in grpo}
    assert arms == {(o, p) for o in ("adamw", "sgd") for p in ("f32", "mixed", "bf16")}
    full = {run.of for run in runs if run.mask == "own"}
    for name in full - {run.of for run in runs if run.mask == "own" and "-2" in run.of}:
        assert {run.mask for run in runs if run.of == name} >= MASKS.keys()


def test_counterparts() -> None:
    assert counterpart("grpo-sort-1-sgd-f32", seed=2) == "grpo-sort-2-sgd-f32"
    assert counterpart("dpo-sort-1", task="sum") == "dpo-sum-1"
    assert lenders(again(of("grpo", "main"), "seed")) == ["grpo-sort-1", "grpo-sort-2"]
    assert lenders(again(of("grpo", "main"), "low")) == ["grpo-sort-1"]


def test_early_masks_are_of_the_checkpoint_within_that_part() -> None:
    for steps, wanted in ((100, (1, 3)), (120, (1, 4)), (20, (1, 1))):
        full = of("grpo", "main", steps=steps)
        assert tuple(early_step(again(full, kind)) for kind in EARLY) == wanted


def test_what_is_asked_for_brings_what_it_needs() -> None:
    names = [run.name for run in chosen(matrix(), "grpo-sort-1+task")]
    assert names == ["grpo-sort-1", "grpo-sum-1", "grpo-sort-1+task"]
    jobs = jobs_of("full", "dpo-sort-3")
    assert [job.name for job in jobs] == ["base", "pool-sort-3", "dpo-sort-3", "agreement"]


def test_a_build_folder_is_for_one_setting(tmp_path: Path) -> None:
    settle(Build(tmp_path), {"scale": "small"})
    settle(Build(tmp_path), {"scale": "small"})
    with pytest.raises(Mismatch, match="another --build"):
        settle(Build(tmp_path), {"scale": "large"})


class Pretending(Crew):
    """Processes that only write a result, or fail, and note when they were at work."""

    failing: tuple[str, ...] = ()

    def start(self, job: Job) -> None:
        result = self.build.result(job.name)
        result.parent.mkdir(exist_ok=True, parents=True)
        code = f"open({str(result)!r}, 'w').write('{{}}')"
        if job.name in self.failing:
            code = "raise SystemExit(1)"
        process = subprocess.Popen([sys.executable, "-S", "-c", code])
        self.at_work[job.name] = process, time.monotonic()
        assert len(self.at_work) <= self.limit


def test_jobs_wait_for_what_they_need_and_go_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paper.schedule.Crew", Pretending)
    jobs = [
        Job("base"),
        Job("a", ("base",)),
        Job("b", ("base",)),
        Job("c", ("b",)),
        Job("d", ("c",)),
    ]
    said: list[str] = []
    monkeypatch.setattr(Pretending, "failing", ("b",))
    assert run_all(Build(tmp_path), jobs, say=said.append) == ["b", "c", "d"]
    assert any("not done: c (needs b" in line for line in said)
    first = (tmp_path / "results" / "a.json").stat().st_mtime_ns
    monkeypatch.setattr(Pretending, "failing", ())
    assert run_all(Build(tmp_path), jobs, say=said.append) == []
    assert (tmp_path / "results" / "a.json").stat().st_mtime_ns == first, "done once"


def result(**changed: Any) -> dict[str, Any]:
    found = {
        "run": {"name": "x", "lr": 1.0},
        "measured": {"digest": "aa"},
        "end": {"stored": {"reward": 0.5}},
    }
    return found | changed


def test_a_rerun_is_held_against_stored_results(tmp_path: Path) -> None:
    build, stored = Build(tmp_path / "build"), tmp_path / "stored"
    for name in "abcde":
        write_json(stored / f"{name}.json", result())
    write_json(stored / "base.json", {"parameters": 1})
    write_json(build.result("a"), result())
    write_json(build.result("b"), result(measured={"digest": "bb"}))
    write_json(build.result("c"), result(run={"name": "x", "lr": 2.0}))
    found = compare(build, stored, [Job(name) for name in "abcd"])
    assert [line.partition(":")[0] for line in found] == ["b", "c", "d"]
    assert "other weights" in found[0]


def test_json_is_whole_and_has_no_infinities(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"a": None, "b": [None, 1.5]}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]


def test_one_process_at_a_time_does_a_job(tmp_path: Path) -> None:
    """A scheduler that was killed leaves its processes at work; the next one's wait for them."""
    build = Build(tmp_path)
    with (
        alone(build, "x"),
        (tmp_path / "locks" / "x").open("w") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with alone(build, "x"):
        pass


def test_the_command_line_lists_jobs_and_knows_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = subprocess.run(
        [sys.executable, "examples/paper", "run", "--list", "--only", "sft-sum-2"],
        cwd=example_programs.ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.split() == ["base", "sft-sum-2", "agreement"]
    write_json(tmp_path / "setting.json", {"matrix": "full", "recipe": {}})
    monkeypatch.setattr(sys, "argv", ["paper", "work", "nonsense", "--build", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the program changes it
    assert main() == 2
    assert capsys.readouterr().err == "error: no job is called nonsense: see run --list\n"
