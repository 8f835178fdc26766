"""The command line: what goes to stdout and stderr, exit codes, signals, pipes, start-up time."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

import ckdiff
from ckdiff.cli import exits, main, options, output
from ckdiff.cli.program import COMMANDS
from ckdiff.cli.progress import Reporter, compilation_noted, describe
from ckdiff.summaries import By
from support import Tensor, write_safetensors

HOSTILE = 'layers.0.\x1b[31m\n[red]\u202e"evil".weight'
HEAVY = {"numba", "llvmlite", "zarr", "dask", "numpy", "rich", "torch", "huggingface_hub"}
PACKAGE = Path(ckdiff.__file__).parent.parent


def bf16(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).integers(0x3C00, 0x3F80, shape, np.uint16)
    return "BF16", shape, values.tobytes()


def bump(tensor: Tensor, elements: int) -> Tensor:
    """The tensor with its first ``elements`` elements moved by one representable value."""
    values = np.frombuffer(tensor[2], np.uint16).copy()
    values[:elements] += 1
    return tensor[0], tensor[1], values.tobytes()


def model() -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": bf16((32, 64))}
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = bf16((64, 64), layer)
        for expert in range(2):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = bf16((16, 64), 10 * layer + expert)
    return tensors


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two small checkpoints: 4 of 9 tensors and 4096 + 10 + 20 + 30 elements differ."""
    folder = tmp_path_factory.mktemp("pair")
    base = model()
    tuned = dict(base)
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts.1.up_proj.weight"
        tuned[name] = bump(base[name], 10 * (layer + 1))
    name = "model.layers.2.self_attn.q_proj.weight"
    tuned[name] = bump(base[name], 4096)
    return (
        str(write_safetensors(folder / "base.safetensors", base)),
        str(write_safetensors(folder / "tuned.safetensors", tuned)),
    )


@pytest.fixture(scope="module")
def store(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of their difference, with two masks and statistics."""
    path = str(tmp_path_factory.mktemp("store") / "run.zarr")
    ckdiff.diff(*pair, path, rules=["exact", "atol=1e-5"], stats=True)
    return path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def ok(*args: str) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def error(*args: str, code: int = 2) -> str:
    """The one line that a failing command prints."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ckdiff: error: ")
    return line.removeprefix("ckdiff: error: ")


def python(code: str, *args: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **extra.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **extra,
    )


MAIN = "import sys; from ckdiff.cli import main; main(sys.argv[1:])"


# start-up


def test_help_lists_the_commands() -> None:
    text = ok("--help").stdout
    for name, line in COMMANDS.items():
        assert name in text
        assert line in text
    assert ok().stdout == text
    assert ok("-h").stdout == text


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


def test_nothing_heavy_is_imported_at_start_up() -> None:
    code = """
import sys
from ckdiff.cli import main
try:
    main(["--help"])
except SystemExit as done:
    print("MODULES", done.code, *sys.modules)
"""
    words = python(code).stdout.partition("MODULES ")[2].split()
    assert words[0] == "0"
    assert "click" in words
    assert not HEAVY & {word.partition(".")[0] for word in words}


def test_help_answers_at_once() -> None:
    took = []
    for _ in range(7):
        began = time.perf_counter()
        assert python(MAIN, "--help").returncode == 0
        took.append(time.perf_counter() - began)
    assert min(took) < 0.15


def test_module_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "ckdiff", "--version"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == f"ckdiff {ckdiff.__version__}\n"


# diff


def test_diff_json_is_the_contract(pair: tuple[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "out.zarr")
    result = ok("diff", *pair, "--rule", "atol=1e-5", "--rule", "exact", "-o", path, "--json")
    found = json.loads(result.stdout)
    assert found["elements"] == 32 * 64 + 3 * (64 * 64 + 2 * 16 * 64)
    assert found["tensors"] == 10
    assert list(found["rules"]) == ["atol=1e-05", "exact"] or list(found["rules"]) == [
        "atol=1e-5",
        "exact",
    ]
    assert found["rules"]["exact"]["changed"] == 4096 + 60
    assert found["rules"]["exact"]["density"] == (4096 + 60) / found["elements"]
    assert found["unpaired"] == {"added": [], "removed": [], "reshaped": [], "retyped": []}
    assert found["unpaired_details"] == []
    assert found["bytes_read"] == 2 * 2 * found["elements"]
    assert found["seconds"] > 0
    assert Path(path).is_dir()
    assert result.stderr == ""


def test_diff_text(pair: tuple[str, str], tmp_path: Path) -> None:
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


def test_diff_without_a_store(pair: tuple[str, str], tmp_path: Path) -> None:
    result = ok("diff", *pair)
    assert "-o STORE" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_diff_of_equal_checkpoints(pair: tuple[str, str]) -> None:
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
    tuned = {"shape": bf16((2, 8)), "type": ("F16", (4,), b"\0" * 8)} | same
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
    assert re.search(r"^retyped +type +BF16 \[4\] → F16 \[4\]$", text, re.M)


def test_only_the_first_unpaired_tensors_are_named(tmp_path: Path) -> None:
    text = ok("diff", *unpaired_checkpoints(tmp_path, 40)).stdout
    assert len(re.findall(r"^added ", text, re.M)) < 20
    assert "and 23 more (43 in all)" in text
    found = json.loads(ok("diff", *unpaired_checkpoints(tmp_path, 40), "--json").stdout)
    assert len(found["unpaired"]["added"]) == 40


def test_selecting_and_renaming(pair: tuple[str, str], tmp_path: Path) -> None:
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


def test_warnings_go_to_stderr(pair: tuple[str, str]) -> None:
    result = ok("diff", *pair, "--exclude", "nothing*", "--json")
    assert result.stderr.startswith("ckdiff: warning: --exclude 'nothing*' matches no tensor")
    json.loads(result.stdout)


def test_dry_run(pair: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    text = ok("diff", *pair, "-o", str(path), "--dry-run").stdout
    assert "20,480 elements in 10 tensors" in text
    assert "81.9 kB" in text
    found = json.loads(ok("diff", *pair, "--dry-run", "--json").stdout)
    assert found["bytes_to_read"] == 81_920
    assert found["disk_at_most"] == 0
    assert list(tmp_path.iterdir()) == []
    assert "compares nothing" in error("diff", *pair, "--dry-run", "--exit-code")


@pytest.mark.parametrize(
    ("fraction", "code"), [("0", 1), ("0.2", 1), ("0.2030", 0), ("0.5", 0), ("1", 0), ("2e-1", 1)]
)
def test_fail_above(pair: tuple[str, str], fraction: str, code: int) -> None:
    result = run("diff", *pair, "--fail-above", fraction, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["rules"]["exact"]["changed"] == 4156
    assert ("exceeds --fail-above" in result.stderr) == (code == 1)


def test_fail_above_judges_the_first_rule(pair: tuple[str, str]) -> None:
    assert run("diff", *pair, "--rule", "atol=1", "--fail-above", "0").exit_code == 0
    asked = ("--rule", "exact", "--rule", "atol=1", "--fail-above", "0")
    assert run("diff", *pair, *asked).exit_code == 1


@pytest.mark.parametrize("fraction", ["-0.1", "1.1", "nan", "inf", "five"])
def test_fail_above_is_validated(pair: tuple[str, str], fraction: str) -> None:
    assert "--fail-above" in error("diff", *pair, f"--fail-above={fraction}")


def test_exit_code(pair: tuple[str, str], tmp_path: Path) -> None:
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
    assert "cannot both" in error("show", store, "--json", "--csv")


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


def test_check_finds_damage(pair: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    ok("diff", *pair, "-o", str(path))
    mask = path / "masks" / "exact" / "c" / "0"
    data = bytearray(mask.read_bytes())
    data[len(data) // 2] ^= 1
    mask.write_bytes(data)
    assert "masks/exact/c/0" in error("check", str(path))
    assert error("check", str(tmp_path / "none.zarr"))


def test_clean(pair: tuple[str, str], tmp_path: Path) -> None:
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
    from ckdiff.workdir import WorkDir

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


def test_engine_errors_are_one_line(pair: tuple[str, str], store: str, tmp_path: Path) -> None:
    assert "rules are" in error("diff", *pair, "--rule", "nonsense")
    assert "--memory" in error("diff", *pair, "--memory", "1MiB")
    assert "size" in error("diff", *pair, "--memory", "lots")
    assert "--overwrite" in error("diff", *pair, "-o", store)
    assert "source" in error("diff", *pair, "-o", pair[0], "--overwrite")
    assert "REGEX=REPL" in error("diff", *pair, "--rename", "x")
    assert "no directory" in error("diff", *pair, "-o", str(tmp_path / "no" / "out.zarr"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def arrange(failure: BaseException) -> None:
        def summary(*args: object, **options: object) -> None:
            raise failure

        monkeypatch.setattr("ckdiff.store.MaskStore.summary", summary)

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
    failing: Any, store: str, failure: BaseException, code: int, says: str
) -> None:
    failing(failure)
    assert error("show", store, code=code) == says or says in error("show", store, code=code)


def test_a_bug_shows_where_it_is(failing: Any, store: str) -> None:
    failing(ZeroDivisionError("oh"))
    result = run("show", store)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "ckdiff: error: this is a bug in ckdiff: ZeroDivisionError: oh"
    )


# signals


#: stands for a signal at the worst moment: when a chunk was recorded, and nothing after it
_STOPPED = """
import os, signal, sys
from ckdiff.workdir import WorkDir
from ckdiff.cli import main
record = WorkDir.record
def stop(self, chunk, payload):
    record(self, chunk, payload)
    os.kill(os.getpid(), int(sys.argv[1]))
WorkDir.record = stop
main(sys.argv[2:])
"""


def interrupted(
    pair: tuple[str, str], out: Path, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    return python(_STOPPED, str(int(number)), "diff", *pair, "-o", str(out))


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted (the same command resumes)"),
        (signal.SIGTERM, 143, "stopped by SIGTERM (the same command resumes)"),
    ],
)
def test_signals_stop_cleanly(
    pair: tuple[str, str], tmp_path: Path, number: signal.Signals, code: int, says: str
) -> None:
    out = tmp_path / "out.zarr"
    stopped = interrupted(pair, out, number)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stdout == ""
    assert stopped.stderr.splitlines()[-1] == f"ckdiff: error: {says}"
    assert not out.exists()
    assert "resuming: 1 of 1" in ok("diff", *pair, "-o", str(out)).stderr
    ok("check", str(out))


def test_a_second_signal_ends_the_process(pair: tuple[str, str]) -> None:
    code = """
import os, signal, sys, time
from ckdiff.cli import exits, main
exits._PATIENCE = 0.05
def hang(*args):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # too soon: the same Ctrl-C, passed on
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
import ckdiff.engine
ckdiff.engine.Diff.run = hang
main(sys.argv[1:])
"""
    assert python(code, "diff", *pair).returncode == 143


def test_a_lost_signal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits._signals, "received", signal.SIGTERM)
    with Reporter("compared") as reporter, pytest.raises(KeyboardInterrupt):
        reporter.update(1, 2)


def test_handlers_are_put_back(store: str) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ok("check", store)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# streams that go away


def test_a_closed_stdout_is_quiet(pair: tuple[str, str], store: str, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    for args, code in (
        (["--help"], 0),
        (["show", store, "--json"], 0),
        (["check", store], 0),
        (["diff", *pair, "-o", str(out), "--exit-code"], 1),  # the verdict stands
    ):
        reader, writer = os.pipe()
        os.close(reader)
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        command = [sys.executable, "-c", MAIN, *args]
        try:
            found = subprocess.run(
                command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(writer)
        assert found.returncode == code, found.stderr
        assert "rror" not in found.stderr
        assert "Traceback" not in found.stderr
    ok("check", str(out))


def test_a_closed_stderr_does_not_end_a_run(pair: tuple[str, str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    out = tmp_path / "out.zarr"
    command = [sys.executable, "-c", MAIN, "diff", *pair, "-o", str(out), "--exclude", "nothing"]
    found = subprocess.run(command, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    assert found.returncode == 0
    ok("check", str(out))


def test_descriptors_that_were_closed_by_the_caller(pair: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    code = f"import os; [os.close(n) for n in (0, 1, 2)]; os.execv({sys.executable!r}, "
    code += f"[{sys.executable!r}, '-c', {MAIN!r}, 'diff', *{pair!r}, '-o', {str(out)!r}])"
    assert python(code).returncode == 0
    ok("check", str(out))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_an_error(store: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    for args in (["show", store], ["--help"]):
        command = [sys.executable, "-c", MAIN, *args]
        with open("/dev/full", "w") as full:
            found = subprocess.run(
                command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert found.returncode == 2
        assert re.fullmatch(r"ckdiff: error: .*No space left on device.*\n", found.stderr)


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    output.write_json({"a": [float("inf"), float("nan"), 1.5], "b": (None, -float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [None, None]}


# progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Reporter("compared", clock=clock) as reporter:
        for second in range(0, 91):
            clock.now = 100.0 + second
            reporter.update(second * 10**9, 120 * 10**9)
        reporter.update(120 * 10**9, 120 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "ckdiff: compared 30 GB of 120 GB (25 %), 1 GB/s, 1 min 30 s left",
        "ckdiff: compared 60 GB of 120 GB (50 %), 1 GB/s, 1 min 0 s left",
        "ckdiff: compared 90 GB of 120 GB (75 %), 1 GB/s, 30 s left",
    ]


def test_resumed_bytes_are_not_speed() -> None:
    assert describe(80, 100, 60, 2.0) == ("80 B of 100 B", "10 B/s", "2 s left")
    assert describe(60, 100, 60, 2.0)[2] == ""
    assert describe(100, 100, 0, 0.0)[1] == "0 B/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    with Reporter("compared", clock=clock) as reporter:
        reporter.update(0, 1000)
        assert stream.getvalue() == ""  # nothing flashes up where all is over at once
        clock.now += 2
        reporter.update(10**9, 10**10)
        reporter.note("warning: \x1b[31m")
        reporter.update(2 * 10**9, 10**10)
    text = stream.getvalue()
    assert "1 GB of 10 GB" in text
    assert "500 MB/s" in text
    assert "ckdiff: warning: \\x1b[31m\n" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor comes back


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", stream)
    with Reporter("compared", clock=clock) as reporter:
        clock.now += 31
        reporter.update(1, 2)
    assert stream.getvalue() == "ckdiff: compared 1 B of 2 B (50 %), 0 B/s, 31 s left\n"


def test_compiling_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    from ckdiff.kernels.compiled import on_compile

    before = list(on_compile)
    with Reporter("compared") as reporter, compilation_noted(reporter):
        for report in on_compile:
            report("exact BF16")
            report("exact F32")
    assert on_compile == before
    assert capsys.readouterr().err == "ckdiff: compiling kernels (first run only)\n"


def test_compiling_is_really_said(pair: tuple[str, str], tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = python(MAIN, "diff", *pair, env=environment)
    assert first.stderr.count("compiling kernels (first run only)") == 1
    second = python(MAIN, "diff", *pair, env=environment)
    assert "compiling" not in second.stderr
