"""``ckdiff timeline`` on the command line, and the commands that know what it makes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from cli_support import run
from timelines import some_run, told, total, write_run


def test_table_json_and_csv(tmp_path: Path) -> None:
    made = some_run(1, 4)
    paths = list(map(str, write_run(tmp_path, made)))
    every, out = told(made, "exact"), str(tmp_path / "out")
    done = run("timeline", *paths, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["checkpoints"] == paths
    assert [step["checkpoint"] for step in found["steps"]] == paths[1:]
    assert [step["changed_since_first"] for step in found["steps"]] == total(every, "first")
    assert found["rule"] == "exact"
    done = run("timeline", *paths, "-o", out, "--overwrite", "--csv", "--by", "tensor")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 3 * len(made)
    for row in rows:
        step = int(row["step"]) - 1
        assert int(row["changed_since_previous"]) == every[row["tensor"]].previous[step]
    done = run("timeline", *paths, "-o", out, "--overwrite")
    assert "density by step" in done.stdout
    assert "never moved" in done.stdout


def test_a_glob_a_dry_run_and_going_on(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(2, 12))
    out, pattern = tmp_path / "out", str(tmp_path / "checkpoint-*")
    done = run("timeline", "--glob", pattern, "-o", str(out), "--dry-run", "--json")
    estimate = json.loads(done.stdout)
    assert estimate["checkpoints"] == list(map(str, paths))
    assert estimate["refusal"] is None
    assert not out.exists()
    assert run("timeline", *map(str, paths[:11]), "-o", str(out)).exit_code == 0
    done = run("timeline", "--glob", pattern, "-o", str(out), "--dry-run", "--json")
    going_on = json.loads(done.stdout)
    assert going_on["steps_known"] == 9
    assert going_on["bytes_to_read"] * 4 == estimate["bytes_to_read"]
    assert run("timeline", "--glob", pattern, "-o", str(out)).exit_code == 0
    done = run("timeline", "--glob", pattern, "-o", str(out), "--dry-run")
    assert done.exit_code == 2
    assert "of just these checkpoints" in done.stderr


def test_what_other_commands_say_of_it(tmp_path: Path) -> None:
    paths = list(map(str, write_run(tmp_path, some_run(3, 3))))
    out = str(tmp_path / "out")
    assert run("timeline", *paths, "-o", out).exit_code == 0
    done = run("info", out, "--json")
    assert json.loads(done.stdout)["kind"] == "timeline"
    assert "a timeline of 2 steps" in run("info", out).stdout
    done = run("check", out, "--json")
    assert json.loads(done.stdout)["ok"]
    assert "verified" in run("check", out).stdout
    done = run("check", out, "--base", paths[0])
    assert (done.exit_code, "a timeline is checked without --base" in done.stderr) == (2, True)
    done = run("show", out)
    assert (done.exit_code, "is a timeline" in done.stderr) == (2, True)
    stores = [f"{out}/masks/step-0000{step}.zarr" for step in (1, 2)]
    assert run("overlap", *stores).exit_code == 0


def test_it_is_no_checkpoint_and_no_delta(tmp_path: Path) -> None:
    paths = list(map(str, write_run(tmp_path, some_run(5, 3))))
    out = str(tmp_path / "out")
    assert run("timeline", *paths, "-o", out).exit_code == 0
    other = str(tmp_path / "other")
    for arguments in (
        ["diff", out, paths[0]],
        ["diff", paths[0], out],
        ["timeline", paths[0], out, "-o", other],
        ["convert", out, "-o", other],
        ["apply", paths[0], out, "-o", other],
        ["graft", paths[0], paths[1], "--mask", out, "-o", other],
        ["overlap", out, f"{out}/masks/step-00001.zarr"],
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        (error,) = (line for line in done.stderr.splitlines() if "error:" in line)
        assert "is a timeline" in error, arguments
        assert "masks/step-" in error, arguments
    assert not Path(other).exists()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    paths = list(map(str, write_run(tmp_path, some_run(4, 3))))
    out = str(tmp_path / "out")
    for arguments in (
        [paths[0]],
        [],
        [*paths, "--memory", "1MiB"],
        [*paths, "--rule", "nothing"],
        [*paths, "--json", "--csv"],
        [paths[0], str(tmp_path / "absent")],
        ["--glob", str(tmp_path / "no*")],
        [*paths, "--include", "no such tensor"],
    ):
        done = run("timeline", *arguments, "-o", out)
        assert done.exit_code == 2, arguments
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1, done.stderr
        assert "bug in ckdiff" not in errors[0]
    assert not Path(out).exists()
    done = run("timeline", *paths, "-o", f"{paths[1]}/inside")
    assert (done.exit_code, "lies inside the source" in done.stderr) == (2, True)
