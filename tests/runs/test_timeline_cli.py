"""``ckdiff timeline`` on the command line, and the commands that know what it makes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from cli_support import run
from support import write_safetensors
from timelines import some_run, told, total, write_run

from ckdiff.runs.timelines.result import open_timeline


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
    assert (done.exit_code, "--base does not go with a timeline" in done.stderr) == (2, True)
    stores = [f"{out}/masks/step-0000{step}.zarr" for step in (1, 2)]
    assert run("overlap", *stores).exit_code == 0


def test_it_is_shown_again(tmp_path: Path) -> None:
    paths, out = list(map(str, write_run(tmp_path, some_run(4, 4)))), str(tmp_path / "out")
    made = run("timeline", *paths, "-o", out, "--stats", "--by", "module")
    shown = run("show", out, "--by", "module")
    assert shown.exit_code == 0, shown.output
    assert "density by step" in shown.stdout
    for path in paths:  # a timeline calls its checkpoints by as much of their paths as it takes
        made_as, shown_as = path, Path(path).name
        assert made_as in made.stdout
        assert shown_as in shown.stdout
    rows = made.stdout.splitlines()
    assert [line for line in rows if " %" in line and "/" not in line and "read" not in line] == [
        line for line in shown.stdout.splitlines() if " %" in line and "checkpoint-" not in line
    ]
    again = run("timeline", *paths, "-o", out, "--stats")
    assert (again.exit_code, "ckdiff show prints it" in again.stderr) == (2, True)
    said = json.loads(run("show", out, "--by", "tensor", "--json").stdout)
    whole = open_timeline(out)
    assert said == json.loads(
        json.dumps({**whole.to_dict(), "by": "tensor", "rows": whole.summary("tensor")})
    )
    rows = list(csv.DictReader(io.StringIO(run("show", out, "--top", "1", "--csv").stdout)))
    most = max(whole.summary("layer"), key=lambda row: row["final"] / max(row["elements"], 1))
    assert [row["layer"] for row in rows] == [most["group"]] * 3
    for row, step in zip(rows, most["steps"], strict=True):
        for key in ("lasting", "coverage", "density_since_previous"):
            assert float(row[key]) == step[key]
    done = run("show", out, "--sort", "density")
    assert (done.exit_code, "not sorted" in done.stderr) == (2, True)


def test_globs_add_what_is_not_there_yet(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(6, 4))
    every, late = str(tmp_path / "checkpoint-*"), str(tmp_path / "checkpoint-[23]00")
    for given in (
        [str(paths[0]), "--glob", every],  # the base is no step of itself
        [f"{tmp_path}/./checkpoint-0/", str(paths[1]), "--glob", every],
        [str(paths[0]), str(paths[1]), "--glob", late, "--glob", every],
    ):
        done = run("timeline", *given, "-o", str(tmp_path / "out"), "--dry-run", "--json")
        found = [Path(path) for path in json.loads(done.stdout)["checkpoints"]]
        assert found == paths, given
    done = run("timeline", *map(str, [paths[0], paths[1], paths[1]]), "-o", str(tmp_path / "out"))
    assert "0 %" in done.stdout.splitlines()[6]  # whoever names one twice gets it twice
    done = run("timeline", "--glob", every, "--glob", "nothing-*", "-o", str(tmp_path / "o"))
    assert (done.exit_code, "nothing matches the glob nothing-*" in done.stderr) == (2, True)


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    """Also what only a checkpoint in the middle lacks."""
    made = some_run(7, 4)
    paths, out = write_run(tmp_path, made), str(tmp_path / "out")
    name = "model.layers.1.mlp.weight"
    some = {n: (d, s, sides[1]) for n, (d, s, sides) in made.items() if n != name}
    write_safetensors(paths[1] / "model.safetensors", some | {"new.10": ("U8", (1,), b"x")})
    write_safetensors(paths[2] / "model.safetensors", {
        **{n: (d, s, sides[2]) for n, (d, s, sides) in made.items()}, "new.9": ("U8", (1,), b"y"),
    })  # fmt: skip
    done = run("timeline", *map(str, paths), "-o", out)
    lacking = [name, "new.9", "new.10"]
    assert f"or has another shape: {', '.join(lacking)}" in done.stdout
    assert json.loads(run("show", out, "--json").stdout)["left_out"] == lacking
    assert open_timeline(out).left_out == lacking


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
