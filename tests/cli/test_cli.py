"""The commands: what goes to stdout and stderr, and what the process would exit with."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import pytest
from cli_support import (
    MAIN,
    Pair,
    bf16,
    bump,
    error,
    interrupted,
    model,
    ok,
    python,
    run,
    write_pair,
)
from support import write_safetensors

import ckdiff
from ckdiff.cli import main, options, output
from ckdiff.cli.program import COMMANDS
from ckdiff.diffs.result import unpaired_names
from ckdiff.stores.summaries import By

HOSTILE = 'layers.0.\x1b[31m\n[red]\u202e"evil".weight'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two checkpoints, with kernels compiled: the note about compiling has its own tests."""
    found = write_pair(tmp_path_factory.mktemp("pair"))
    ckdiff.diff(*found, rules=["exact", "atol=1e-5", "atol=1", "ulp=1"])
    ckdiff.diff(*found, rules=["exact"], stats=True)
    ckdiff.diff(*found, rules=["exact", "atol=1e-5"])
    return found


@pytest.fixture(scope="module")
def store(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of their difference, with two masks and statistics."""
    path = str(tmp_path_factory.mktemp("store") / "run.zarr")
    ckdiff.diff(*pair, path, rules=["exact", "atol=1e-5"], stats=True)
    return path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_help_lists_the_commands() -> None:
    text = ok("--help").stdout
    for name, line in COMMANDS.items():
        assert name in text
        assert line in " ".join(text.split())
    assert ok().stdout == text
    assert ok("-h").stdout == text
    assert "Begin with `ckdiff diff BASE TUNED`" in text


def test_the_help_of_diff_ends_with_examples() -> None:
    _, _, last = ok("diff", "--help").stdout.partition("\n  Examples:\n")
    lines = [line.strip() for line in last.splitlines()]
    examples = [line for line in lines if line.startswith("ckdiff ")]
    assert len(examples) == 3
    command = main.get_command(click.Context(main), "diff")
    assert command is not None
    for example in examples:
        program, name, *arguments = example.split()
        assert (program, name) == ("ckdiff", "diff")
        command.make_context("diff", arguments)  # all of its options are there
    for page in ("checkpoints", "cli", "ci"):
        assert f"docs/{page}.md" in last


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        text = ok(name, "--help").stdout
        assert text.startswith(f"Usage: ckdiff {name} ")
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.name == name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_version() -> None:
    assert ok("--version").stdout == f"ckdiff {ckdiff.__version__}\n"


def test_groupings_are_those_of_the_summaries() -> None:
    assert get_args(By) == options.BY


# diff


def test_diff_json_is_the_contract(pair: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "out.zarr")
    result = ok("diff", *pair, "--rule", "atol=1e-5", "--rule", "exact", "-o", path, "--json")
    found = json.loads(result.stdout)
    assert found["elements"] == 32 * 64 + 3 * (64 * 64 + 2 * 16 * 64)
    assert found["tensors"] == 10
    assert list(found["rules"]) == ["atol=1e-5", "exact"]
    assert found["rules"]["exact"]["changed"] == 4096 + 60
    assert found["rules"]["exact"]["density"] == (4096 + 60) / found["elements"]
    assert found["unpaired"] == unpaired_names([])
    assert found["unpaired_details"] == []
    assert found["bytes_read"] == 2 * 2 * found["elements"]
    assert found["seconds"] > 0
    assert Path(path).is_dir()
    assert result.stderr == ""


def test_diff_text(pair: Pair, tmp_path: Path) -> None:
    path = str(tmp_path / "out 1.zarr")
    result = ok("diff", *pair, "-o", path, "--stats")
    text = result.stdout
    assert f"{pair[0]} → {pair[1]}" in text
    assert "20,480 elements in 10 tensors" in text
    assert re.search(r"^exact +4,156 +20\.29 % +79\.71 % +BF16$", text, re.M)
    assert re.search(r"^model\.layers\.2 +6,144 +4,126 +67\.15 %", text, re.M)
    assert "‖Δ‖/‖base‖" in text
    assert re.search(r"^ *1 +4,156 +100 %", text, re.M)  # all moved by one ULP
    assert f"masks of exact in {path}" in text
    assert result.stderr == f"ckdiff: hint: next, try: ckdiff show '{path}'\n"
    assert all(line == line.rstrip() for line in text.splitlines())


def test_diff_without_a_store(pair: Pair, tmp_path: Path) -> None:
    result = ok("diff", *pair)
    assert "-o STORE" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_diff_of_equal_checkpoints(pair: Pair) -> None:
    assert "No element and no tensor differs." in ok("diff", pair[0], pair[0]).stdout


def test_a_long_model_is_shown_by_module(tmp_path: Path) -> None:
    base = {f"l.{i}.{m}.w": bf16((64,)) for i in range(20) for m in ("up", "down")}
    tuned = {name: bump(tensor, 7) for name, tensor in base.items()}
    one = write_safetensors(tmp_path / "a.safetensors", base)
    two = write_safetensors(tmp_path / "b.safetensors", tuned)
    text = ok("diff", str(one), str(two)).stdout
    assert re.search(r"^module +elements", text, re.M)
    assert re.search(r"^up +1,280 +140 +10\.94 %", text, re.M)


def test_storage_dtypes_stand_beside_the_densities(tmp_path: Path) -> None:
    base = {"a": bf16((98,)), "b": ("F32", (2,), b"\0" * 8), "flags": ("BOOL", (4,), b"\0\1\0\1")}
    one = write_safetensors(tmp_path / "a.safetensors", base)
    two = write_safetensors(tmp_path / "b.safetensors", base | {"a": bump(base["a"], 1)})
    text = ok("diff", str(one), str(two), "--rule", "ulp=1").stdout
    assert "BF16 94.23 %, BOOL 3.85 %, F32 1.92 %" in text
    assert "ulp=1 means exact on 1 tensor without numeric values: flags" in text


def unpaired_checkpoints(folder: Path, extra: int = 1) -> tuple[str, str]:
    same = {"same": bf16((8,))}
    base = {"shape": bf16((8, 2)), "type": bf16((4,)), "gone": bf16((2,))} | same
    tuned = {"shape": bf16((2, 8)), "type": ("U16", (4,), b"\0" * 8)} | same
    tuned |= {f"new.{i}": bf16((3, 1)) for i in range(extra)}
    return (
        str(write_safetensors(folder / "a.safetensors", base)),
        str(write_safetensors(folder / "b.safetensors", tuned)),
    )


def test_unpaired_tensors_are_named_with_reasons(tmp_path: Path) -> None:
    text = ok("diff", *unpaired_checkpoints(tmp_path)).stdout
    assert re.search(r"^removed +gone +BF16 \[2\]$", text, re.M)
    assert re.search(r"^added +new\.0 +BF16 \[3, 1\]$", text, re.M)
    assert re.search(r"^reshaped +shape +BF16 \[8, 2\] → BF16 \[2, 8\]$", text, re.M)
    assert re.search(r"^retyped +type +BF16 \[4\] → U16 \[4\]$", text, re.M)


def test_only_the_first_unpaired_tensors_are_named(tmp_path: Path) -> None:
    text = ok("diff", *unpaired_checkpoints(tmp_path, 40)).stdout
    assert len(re.findall(r"^added ", text, re.M)) < 20
    assert "and 23 more (43 in all)" in text
    found = json.loads(ok("diff", *unpaired_checkpoints(tmp_path, 40), "--json").stdout)
    assert len(found["unpaired"]["added"]) == 40


def test_selecting_and_renaming(pair: Pair, tmp_path: Path) -> None:
    found = json.loads(
        ok("diff", *pair, "--include", "*layers*", "--exclude", "*.0.*", "--json").stdout
    )
    assert found["tensors"] == 4
    assert found["excluded"] == 6
    tuned = {f"module.{name}": tensor for name, tensor in model().items()}
    path = str(write_safetensors(tmp_path / "wrapped.safetensors", tuned))
    assert "--rename" in error("diff", pair[0], path)
    found = json.loads(ok("diff", pair[0], path, "--rename", r"^module\.=", "--json").stdout)
    assert found["tensors"] == 10
    assert found["rules"]["exact"]["changed"] == 0


def test_warnings_go_to_stderr(pair: Pair) -> None:
    result = ok("diff", *pair, "--exclude", "nothing*", "--json")
    assert result.stderr.startswith("ckdiff: warning: --exclude 'nothing*' matches no tensor")
    json.loads(result.stdout)


def test_dry_run(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    text = ok("diff", *pair, "-o", str(path), "--dry-run").stdout
    assert "20,480 elements in 10 tensors" in text
    assert "80.0 KiB" in text
    found = json.loads(ok("diff", *pair, "--dry-run", "--json").stdout)
    assert found["bytes_to_read"] == 81_920
    assert found["disk_at_most"] == 0
    assert list(tmp_path.iterdir()) == []
    assert "compares nothing" in error("diff", *pair, "--dry-run", "--exit-code")


def test_dry_run_says_what_would_be_refused(pair: Pair, store: str, tmp_path: Path) -> None:
    refused = ok("diff", *pair, "-o", store, "--dry-run")
    assert "20,480 elements" in refused.stdout
    assert refused.stderr == (
        f"ckdiff: warning: a run would be refused: {store} exists (use --overwrite to replace it)\n"
    )
    found = json.loads(ok("diff", *pair, "-o", store, "--dry-run", "--json").stdout)
    assert found["refusal"] == f"{store} exists (use --overwrite to replace it)"
    for fine in (["-o", store, "--overwrite"], ["-o", str(tmp_path / "new.zarr")], []):
        accepted = ok("diff", *pair, *fine, "--dry-run", "--json")
        assert accepted.stderr == ""
        assert json.loads(accepted.stdout)["refusal"] is None
    nowhere = ok("diff", *pair, "-o", str(tmp_path / "no" / "new.zarr"), "--dry-run")
    assert "would be refused: cannot write" in nowhere.stderr


@pytest.mark.parametrize(
    ("fraction", "code"), [("0", 1), ("0.2", 1), ("0.2030", 0), ("0.5", 0), ("1", 0), ("2e-1", 1)]
)
def test_fail_above(pair: Pair, fraction: str, code: int) -> None:
    result = run("diff", *pair, "--fail-above", fraction, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["rules"]["exact"]["changed"] == 4156
    assert ("exceeds --fail-above" in result.stderr) == (code == 1)


def test_fail_above_judges_the_first_rule(pair: Pair) -> None:
    assert run("diff", *pair, "--rule", "atol=1", "--fail-above", "0").exit_code == 0
    asked = ("--rule", "exact", "--rule", "atol=1", "--fail-above", "0")
    assert run("diff", *pair, *asked).exit_code == 1


@pytest.mark.parametrize("fraction", ["-0.1", "1.1", "nan", "inf", "five"])
def test_fail_above_is_validated(pair: Pair, fraction: str) -> None:
    assert "--fail-above" in error("diff", *pair, f"--fail-above={fraction}")


def test_exit_code(pair: Pair, tmp_path: Path) -> None:
    assert run("diff", *pair).exit_code == 0
    assert run("diff", *pair, "--exit-code").exit_code == 1
    assert run("diff", *pair, "--exit-code", "--json").exit_code == 1
    assert run("diff", pair[0], pair[0], "--exit-code").exit_code == 0
    assert run("diff", *pair, "--exit-code", "--fail-above", "0.9").exit_code == 1
    base, _ = unpaired_checkpoints(tmp_path)
    same = write_safetensors(tmp_path / "c.safetensors", {"same": bf16((8,))})
    assert run("diff", base, str(same), "--exit-code").exit_code == 1  # tensors differ


# show


def test_show_json_is_the_contract(store: str) -> None:
    rows = json.loads(ok("show", store, "--by", "tensor", "--json").stdout)["rows"]
    assert len(rows) == 10
    assert {"name", "dtype", "shape", "elements", "rules"} <= rows[0].keys()
    assert rows[0]["name"] == "model.embed_tokens.weight"
    assert rows[0]["shape"] == [32, 64]
    assert rows[0]["rules"]["exact"] == {"changed": 0, "density": 0.0}
    for by in ("layer", "module", "dtype", "model"):
        found = json.loads(ok("show", store, "--by", by, "--json").stdout)
        assert {"group", "elements", "rules"} <= found["rows"][0].keys()
        assert sum(row["rules"]["exact"]["changed"] for row in found["rows"]) == 4156
    assert [row["group"] for row in found["rows"]] == ["model"]


def test_show_is_by_layer(store: str) -> None:
    assert ok("show", store).stdout == ok("show", store, "--by", "layer").stdout
    text = ok("show", store).stdout
    assert "base.safetensors → tuned.safetensors" in text
    assert "stored as BF16" in text
    assert re.search(r"^layer .*elements +changed +density", text, re.M)
    assert re.search(r"^model +20,480 +4,156 +20\.29 %", text, re.M)
    assert "density by module and layer" not in text  # only on a terminal


def test_show_by_module_joins_experts(store: str) -> None:
    text = ok("show", store, "--by", "module").stdout
    assert re.search(r"^mlp\.experts\.\*\.up_proj +6,144 +60 +0\.98 %", text, re.M)


def test_show_sort_and_top(store: str) -> None:
    rows = json.loads(
        ok("show", store, "--by", "tensor", "--sort", "density", "--top", "3", "--json").stdout
    )["rows"]
    assert [row["rules"]["exact"]["changed"] for row in rows] == [4096, 30, 20]
    assert (
        rows
        == json.loads(ok("show", store, "--by", "tensor", "--top", "3", "--json").stdout)["rows"]
    )
    line = error("show", store, "--sort", "nonsense")
    assert "nonsense" in line
    assert "density:atol=1e-5" in line
    assert "--top" in error("show", store, "--top", "0")


def test_show_csv(store: str) -> None:
    rows = list(csv.DictReader(io.StringIO(ok("show", store, "--by", "tensor", "--csv").stdout)))
    assert len(rows) == 10
    assert list(rows[0])[:6] == [
        "name", "dtype", "shape", "elements", "changed:exact", "density:exact",
    ]  # fmt: skip
    assert sum(int(row["changed:exact"]) for row in rows) == 4156
    assert rows[0]["shape"] == "32x64"
    assert "cannot be used together" in error("show", store, "--json", "--csv")


def test_show_on_a_terminal_draws_a_map(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "90")
    text = ok("show", store).stdout
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "model.layers: exact density by module and layer" in plain
    assert re.search(r"^self_attn\.q_proj +│······███│ +33\.33 %$", plain, re.M)
    assert max(map(len, plain.splitlines())) <= 90
    assert "density by module" not in ok("show", store, "--by", "dtype").stdout
    assert "density by module" not in ok("show", store, "--by", "tensor").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert ok("show", store).stdout == plain


def test_without_unicode_the_output_is_ascii(store: str) -> None:
    for command in (("show", store), ("show", store, "--by", "module")):
        found = python(MAIN, *command, env={"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"})
        assert found.returncode == 0, found.stderr
        assert found.stdout.isascii()
        assert "\\u" not in found.stdout


# hostile names


def test_hostile_names_are_escaped_for_people_and_exact_in_json(tmp_path: Path) -> None:
    base = {HOSTILE: bf16((8,)), "[bold]x[/bold].0.w": bf16((8,)), "gone\x07": bf16((1,))}
    tuned = {name: bump(tensor, 3) for name, tensor in base.items() if name != "gone\x07"}
    one = str(write_safetensors(tmp_path / "a.safetensors", base))
    two = str(write_safetensors(tmp_path / "b.safetensors", tuned))
    path = str(tmp_path / "out.zarr")
    results = [
        ok("diff", one, two, "-o", path, "--stats", "--exclude", "\x1b[2J*"),
        *(ok("show", path, "--by", by) for by in ("tensor", "layer", "module")),
        ok("show", path, "--by", "tensor", "--csv"),
        ok("check", path),
    ]
    for result in results:
        for character in "\x1b\x07\u202e":
            assert character not in result.output
    assert '\\x1b[31m\\n[red]\\u202e"evil"' in results[1].stdout
    assert "[bold]x[/bold].0.w" in results[1].stdout
    assert "gone\\x07" in results[0].stdout
    rows = json.loads(ok("show", path, "--by", "tensor", "--json").stdout)["rows"]
    assert {row["name"] for row in rows} == {HOSTILE, "[bold]x[/bold].0.w"}
    found = json.loads(ok("diff", one, two, "--json").stdout)
    assert found["unpaired"]["removed"] == ["gone\x07"]
    assert "\x1b" not in run("show", "no\x1b[31m\nsuch").output


# check and clean


def test_check(store: str) -> None:
    assert re.fullmatch(r".*run\.zarr: ok, \d+ files, .* verified\n", ok("check", store).stdout)
    found = json.loads(ok("check", store, "--json").stdout)
    assert found["ok"] is True
    assert found["bytes"] > 0


def test_check_reports_its_progress_to_the_end(store: str) -> None:
    seen: list[tuple[int, int]] = []
    ckdiff.check_store(store, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_check_finds_damage(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    ok("diff", *pair, "-o", str(path))
    mask = path / "masks" / "exact" / "c" / "0"
    data = bytearray(mask.read_bytes())
    data[len(data) // 2] ^= 1
    mask.write_bytes(data)
    assert "masks/exact/c/0" in error("check", str(path))
    assert error("check", str(tmp_path / "none.zarr"))


def test_clean(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    assert "nothing to clean" in ok("clean", str(folder)).stdout
    stopped = interrupted(pair, folder / "out.zarr", signal.SIGINT)
    assert stopped.returncode == 130
    leftover = folder / "out.zarr.ckdiff-partial"
    assert leftover.is_dir()
    assert error("show", str(leftover))
    assert ok("clean", str(folder)).stdout == f"removed {leftover}\n"
    assert list(folder.iterdir()) == []
    assert "none" in error("clean", str(tmp_path / "none"))


def test_clean_leaves_what_is_in_use(tmp_path: Path) -> None:
    from ckdiff.stores.workdir import WorkDir

    with WorkDir(tmp_path / "out.zarr", {}, overwrite=False) as work:
        assert ok("clean", str(tmp_path)).stdout == f"still in use: {work.path}\n"
        assert work.path.is_dir()


# errors


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["diff"], "Missing argument 'BASE'"),
        (["diff", "a"], "Missing argument 'TUNED'"),
        (["diff", "a", "b", "c"], "unexpected extra argument"),
        (["diff", "--nonsense", "a", "b"], "--nonsense"),
        (["diff", "a", "b", "--workers", "0"], "--workers"),
        (["show", "s", "--by", "nonsense"], "'tensor', 'layer', 'module', 'dtype', 'model'"),
        (["diff", "no\nsuch", "file"], "no\\nsuch"),
        (["show", "nosuch"], "nosuch"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_are_one_line(args: list[str], says: str) -> None:
    assert says in error(*args)


def test_engine_errors_are_one_line(pair: Pair, store: str, tmp_path: Path) -> None:
    assert "rules are" in error("diff", *pair, "--rule", "nonsense")
    assert "--memory" in error("diff", *pair, "--memory", "1MiB")
    assert "size" in error("diff", *pair, "--memory", "lots")
    assert "--overwrite" in error("diff", *pair, "-o", store)
    assert "source" in error("diff", *pair, "-o", pair[0], "--overwrite")
    assert "REGEX=REPL" in error("diff", *pair, "--rename", "x")
    assert "no directory" in error("diff", *pair, "-o", str(tmp_path / "no" / "out.zarr"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes ``show`` fail in the way a test wants."""

    def arrange(failure: BaseException) -> None:
        def summary(*args: object, **options: object) -> None:
            raise failure

        monkeypatch.setattr("ckdiff.stores.maskstore.MaskStore.summary", summary)

    return arrange


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (MemoryError(), 2, "out of memory"),
        (PermissionError(13, "Permission denied", "/x/\x1by"), 2, "/x/\\x1by: Permission denied"),
        (OSError("odd"), 2, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ckdiff.Interrupted("stopped", exit_code=143), 143, "stopped"),
        (ckdiff.StoreCorrupt("two\nlines", hint="do\tthis"), 2, "two\\nlines (do\\tthis)"),
        (click.Abort(), 130, "interrupted"),
    ],
)
def test_unexpected_failures_are_one_line(
    failing: Callable[[BaseException], None],
    store: str,
    failure: BaseException,
    code: int,
    says: str,
) -> None:
    failing(failure)
    assert says in error("show", store, code=code)


def test_a_bug_shows_where_it_is(failing: Callable[[BaseException], None], store: str) -> None:
    failing(ZeroDivisionError("oh"))
    result = run("show", store)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "ckdiff: error: this is a bug in ckdiff: ZeroDivisionError: oh"
    )


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json({"a": [float("inf"), float("nan"), 1.5], "b": (None, -float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [None, None]}
