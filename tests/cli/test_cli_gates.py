"""Gates and reports on the command line: exit codes, one line each, and nothing after an error."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from cli_support import Pair, bf16, bump, error, model, ok, run, write_pair
from support import write_safetensors

import ckdiff

PAGE = Path(__file__).parents[2] / "docs" / "ci.md"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    found = write_pair(tmp_path_factory.mktemp("pair"))
    ckdiff.diff(*found, rules=["exact", "atol=1"])  # kernels are compiled
    return found


@pytest.fixture
def parted(tmp_path: Path) -> Pair:
    """Two checkpoints that share one tensor of five, which is equal."""
    base = {"same": bf16((8,)), "old.a": bf16((4,)), "old.b": bf16((4,)), "shape": bf16((4, 2))}
    tuned = {"same": bf16((8,)), "new": bf16((4,)), "shape": bf16((2, 4))}
    return (
        str(write_safetensors(tmp_path / "a.safetensors", base)),
        str(write_safetensors(tmp_path / "b.safetensors", tuned)),
    )


def failed(*args: str) -> list[str]:
    """What a run that fails at its gates says on stderr, without the hint."""
    result = run("diff", *args, "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["ok"] is False
    lines = result.stderr.splitlines()
    wrong = [gate for gate in found["gates"] if not gate["ok"]]
    assert lines == [f"ckdiff: gate {g['gate']} failed: {g['reason']}" for g in wrong]
    return lines


def test_little_was_compared_and_is_no_success(parted: Pair) -> None:
    (line,) = failed(*parted, "--fail-above", "0.01")
    assert "4 of 5 tensors were not compared, such as new (added)" in line
    failed(*parted, "--fail-below", "0")
    assert len(failed(*parted, "--fail-below", "0.5")) == 2
    for gate in ("--fail-above", "--fail-below"):
        ok("diff", *parted, gate, "0", "--allow-unpaired")
    ok("diff", *parted, "--fail-above", "0", "--include", "same")  # the others were not asked for
    failed(*parted, "--exit-code")
    failed(*parted, "--exit-code", "--rule", "atol=1")


def test_exit_code_judges_by_the_first_rule(pair: Pair) -> None:
    failed(*pair, "--exit-code")
    ok("diff", *pair, "--exit-code", "--rule", "atol=1")
    failed(*pair, "--exit-code", "--rule", "exact", "--rule", "atol=1")


def test_expectations(pair: Pair) -> None:
    (line,) = failed(*pair, "--expect-changed", "*")
    assert "6 of 10 matching tensors are bit-identical: model.embed_tokens.weight" in line
    ok("diff", *pair, "--expect-changed", "*.experts.1.*", "--expect-unchanged", "*embed*")
    asked = ("--expect-changed", "*experts.0.*", "--expect-unchanged", "*.layers.2.*", "--rule")
    assert len(failed(*pair, *asked, "atol=1")) == 2
    found = json.loads(run("diff", *pair, *asked, "exact", "--json").stdout)
    assert [gate["glob"] for gate in found["gates"]] == ["*experts.0.*", "*.layers.2.*"]


def test_identical_tensors_are_counted(pair: Pair) -> None:
    assert "\n6 of 10 tensors are bit-identical\n" in ok("diff", *pair).stdout
    found = json.loads(ok("diff", *pair, "--json").stdout)
    assert found["tensors_identical"] == 6
    assert (found["base"], found["tuned"]) == pair
    assert found["version"] == ckdiff.__version__
    assert (found["gates"], found["ok"]) == ([], True)
    # known to be equal, and not read
    assert json.loads(ok("diff", pair[0], pair[0], "--json").stdout)["tensors_identical"] == 10


@pytest.mark.parametrize(
    "gate",
    [["--fail-above", "1"], ["--fail-below", "0"], ["--exit-code"], ["--expect-changed", "*"]],
)
@pytest.mark.parametrize("glob", [["--include", "none*", "--include", "*"], ["--exclude", "none*"]])
def test_a_glob_that_matches_nothing(pair: Pair, gate: list[str], glob: list[str]) -> None:
    assert f"{glob[0]} 'none*' matches no tensor" in error("diff", *pair, *glob, *gate)
    assert "warning" in ok("diff", *pair, *glob).stderr


def test_an_expectation_of_nothing(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    for option in ("--expect-changed", "--expect-unchanged"):
        line = error("diff", *pair, option, "none", "-o", str(out))
        assert f"{option} 'none' matches no tensor" in line
    assert not out.exists()
    # what is excluded is not there
    assert "no tensor" in error(
        "diff", *pair, "--expect-changed", "*embed*", "--exclude", "*embed*"
    )


def test_globs_match_renamed_names(tmp_path: Path) -> None:
    base = {"a.w": bf16((4,)), "b.w": bf16((4,))}
    tuned = {"m.a.w": bf16((4,)), "m.b.w": bf16((4,)), "m.c.w": bf16((4,))}
    one = str(write_safetensors(tmp_path / "a.safetensors", base))
    two = str(write_safetensors(tmp_path / "b.safetensors", tuned))
    asked = ("diff", one, two, "--rename", r"^m\.=", "--exit-code")
    ok(*asked, "--exclude", "c.*")
    ok(*asked, "--exclude", "c.*", "--expect-unchanged", "b.w")
    assert "matches no tensor" in error(*asked, "--exclude", "m.*")


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "inf", "five"])
def test_fractions(pair: Pair, value: str) -> None:
    assert "--fail-below" in error("diff", *pair, f"--fail-below={value}")


@pytest.mark.parametrize(
    "asked",
    [
        ["--fail-below", "0"], ["--expect-changed", "*"], ["--expect-unchanged", "*"],
        ["--junit", "x.xml"], ["--markdown", "x.md"],
    ],
)  # fmt: skip
def test_a_dry_run_judges_nothing(pair: Pair, asked: list[str]) -> None:
    assert "compares nothing" in error("diff", *pair, "--dry-run", *asked)


def test_reports(pair: Pair, tmp_path: Path) -> None:
    xml, text = tmp_path / "r.xml", tmp_path / "r.md"
    asked = ("diff", *pair, "--junit", str(xml), "--markdown", str(text))
    assert run(*asked, "--fail-above", "0").exit_code == 1
    assert b"exceeds --fail-above 0" in xml.read_bytes()
    assert b"1 of 2 gates failed" in text.read_bytes()
    ok(*asked)
    assert b"failure " not in xml.read_bytes()
    xml.unlink()
    before = text.read_bytes()
    error(*asked, "--memory", "1KiB")
    assert not xml.exists()
    assert text.read_bytes() == before


def test_where_reports_may_not_be(pair: Pair, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    out = str(tmp_path / "out.zarr")
    folder = tmp_path / "base"
    write_safetensors(folder / "model.safetensors", model())
    wrong = {
        "is not a report of ckdiff": (*pair, "--markdown", str(notes)),
        "would replace": (*pair, "-o", out, "--junit", out),
        "lies inside the source": (str(folder), pair[1], "--markdown", str(folder / "r.md")),
        "is not a report": (*pair, "--junit", pair[1]),
    }
    for says, asked in wrong.items():
        assert says in error("diff", *asked, "--overwrite")
    assert notes.read_text() == "mine"
    ok("diff", *pair, "-o", out)
    asked = ("diff", *pair, "-o", out, "--overwrite", "--junit", f"{out}/r.xml")
    assert "lies inside the input" in error(*asked)
    ok("check", out)


# show and info


def test_show_and_info_say_of_what_a_store_is(tmp_path: Path) -> None:
    base, tuned = model(), model()
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned[name] = bump(tuned[name], 3)
    del tuned["model.embed_tokens.weight"]
    tuned["model.layers.1.self_attn.q_proj.weight"] = bf16((32, 128))
    one = write_safetensors(tmp_path / "run1" / "checkpoint-500" / "model.safetensors", base).parent
    two = write_safetensors(
        tmp_path / "run2" / "checkpoint-500" / "model.safetensors", tuned
    ).parent
    out = str(tmp_path / "s.zarr")
    ok("diff", str(one), str(two), "-o", out)
    text = ok("show", out).stdout
    assert text.startswith("run1/checkpoint-500 → run2/checkpoint-500: ")
    assert re.search(r"^removed +model\.embed_tokens\.weight +BF16 \[32, 64\]$", text, re.M)
    about = ok("info", out).stdout
    assert "base run1/checkpoint-500, tuned run2/checkpoint-500" in about
    assert "not compared: removed model.embed_tokens.weight, BF16 [32, 64]" in about
    assert "not compared: reshaped model.layers.1.self_attn.q_proj.weight" in about
    for command in (("show", out), ("info", out)):
        found = json.loads(ok(*command, "--json").stdout)
        assert (found["base"], found["tuned"]) == ("run1/checkpoint-500", "run2/checkpoint-500")
        assert found["unpaired"]["removed"] == ["model.embed_tokens.weight"]
        assert found["unpaired"]["reshaped"] == ["model.layers.1.self_attn.q_proj.weight"]
        assert len(found["unpaired_details"]) == 2
    derived = str(tmp_path / "r.zarr")
    ok("random", "--like", out, "--seed", "1", "-o", derived)
    assert "random within each tensor, seed 1" in ok("info", derived).stdout
    assert "made_by" in json.loads(ok("show", derived, "--json").stdout)
    assert "not compared" not in ok("show", derived).stdout


# docs/ci.md


def page_commands() -> list[list[str]]:
    """Every ``ckdiff`` command of the page, in its jobs too."""
    text = PAGE.read_text("utf-8")
    lines = re.findall(r"^(?: +- | +|)(ckdiff .*)$", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_page_s_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model()
    tuned = {
        name: tensor if "embed" in name else bump(tensor, 100) for name, tensor in base.items()
    }
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path / "base" / "model.safetensors", base)
    write_safetensors(tmp_path / "tuned" / "model.safetensors", tuned)
    commands = page_commands()
    assert len(commands) >= 8
    for arguments in commands:
        result = run(*arguments)
        assert result.exit_code == int("--exit-code" in arguments), (arguments, result.output)
    assert Path("ckdiff.xml").exists()
    assert Path("ckdiff.md").exists()


def test_the_page_s_jobs_are_yaml_and_its_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text("utf-8")
    github, gitlab = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    )
    steps = github["jobs"]["diff"]["steps"]
    assert any("ckdiff diff" in step.get("run", "") for step in steps)
    assert gitlab["weights"]["artifacts"]["reports"]["junit"] == "ckdiff.xml"
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    for side in ("base", "tuned"):
        write_safetensors(tmp_path / side / "model.safetensors", model())
    exec(code, {})
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["fail-above", "True"], ["unpaired", "True"], ["expect-unchanged", "True"],
    ]  # fmt: skip


# two dtypes, and rows


def test_dtypes_and_rows(tmp_path: Path) -> None:
    values = bf16((8, 4))
    wide = ("F32", (8, 4), b"".join(b"\0\0" + values[2][i : i + 2] for i in range(0, 64, 2)))
    base = {"a": values, "e": bf16((4, 2)), "same": bf16((2,))}
    tuned = {"a": wide, "e": bf16((6, 2)), "same": bf16((2,))}
    tuned["e"] = ("BF16", (6, 2), base["e"][2] + b"\0" * 8)
    one = str(write_safetensors(tmp_path / "a.safetensors", base))
    two = str(write_safetensors(tmp_path / "b.safetensors", tuned))
    result = ckdiff.diff(one, two)
    assert result.retyped == [{"name": "a", "base": "BF16", "tuned": "F32"}]
    assert result.unpaired["reshaped"] == ["e"]
    assert result.tensors_identical == 2
    text = ok("diff", one, two).stdout
    assert "1 tensor has two dtypes and was compared by value: a (BF16 → F32)" in text
    assert "No element and no tensor differs" not in text
    (line,) = failed(one, two, "--exit-code", "--exclude", "e")
    assert "1 tensor of another dtype, such as a" in line
    ok("diff", one, two, "--exit-code", "--exclude", "e", "--rule", "exact")
    grown = ckdiff.diff(one, two, common_rows=True)
    assert grown.resized == [{"name": "e", "base": [4, 2], "tuned": [6, 2], "rows": 4}]
    assert grown.uncompared == {"tensors": 0, "elements": 0}
    assert grown.differs
