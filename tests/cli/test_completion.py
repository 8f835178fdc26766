"""What a shell completes: commands, options, stores before other paths, and the words of each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import MAIN, PACKAGE, ok, python, write_pair
from click.shell_completion import CompletionItem, ShellComplete
from commands import command_names, commands, option_names

from ckdiff.cli import completing, main
from ckdiff.cli.program import Program
from ckdiff.naming import OPERATIONS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    pair = write_pair(root)
    for name in ("run2.zarr", "run10.zarr", "inner/deep.zarr"):
        (root / name).parent.mkdir(exist_ok=True)
        ok("diff", *pair, "-o", str(root / name))
    (root / "no-store.zarr").mkdir()
    (root / "runs").mkdir()
    (root / "run notes").mkdir()
    return root


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(Program, "_completes", True)
    monkeypatch.chdir(place)


def items(line: str) -> list[CompletionItem]:
    """What the last word of a command line may become."""
    *words, last = line.split(" ")
    return ShellComplete(main, {}, "ckdiff", "_CKDIFF_COMPLETE").get_completions(words, last)


def values(line: str) -> list[str]:
    found = items(line)
    assert {item.type for item in found} <= {"plain"}
    return [item.value for item in found]


def kind(line: str) -> str:
    (item,) = items(line)
    return str(item.type)


def test_commands() -> None:
    assert values("") == command_names()
    assert values("co") == ["combine", "convert-delta", "convert"]
    assert values("-q comb") == ["combine"]
    assert "--log-level" in values("--")


@pytest.mark.parametrize("name", command_names())
def test_options(name: str) -> None:
    assert set(values(f"{name} --")) >= {o for o in option_names(commands()[name]) if o[:2] == "--"}


@pytest.mark.parametrize(
    "line",
    ["show ", "overlap run2.zarr ", "combine union ", "random --like ", "structure ", "check ",
     "delta a b --mask ", "graft a b --mask ", "export ", "report ", "principal c --like "],
)  # fmt: skip
def test_stores_come_first(line: str) -> None:
    found = values(line)
    assert found[:2] == ["run10.zarr", "run2.zarr"]
    assert found[2:] == ["inner/", "no-store.zarr/", "runs/"]
    assert values(f"{line}run") == ["run10.zarr", "run2.zarr", "runs/"]
    assert values(f"{line}inner/") == ["inner/deep.zarr"]
    assert kind(f"{line}no") == "file", "the shell knows paths"
    assert kind(f"{line}nowhere/x") == "file"


def test_absolute_paths_and_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(f"show {place}/run1") == [f"{place}/run10.zarr"]
    monkeypatch.setenv("HOME", str(place))
    assert values("show ~/run1") == ["~/run10.zarr"]


@pytest.mark.parametrize(
    "line",
    ["diff ", "diff a ", "diff a b -o ", "info ", "apply a ", "apply a d -o ", "timeline a ",
     "overlap a --base ", "check a --base ", "convert ", "report a --spectrum ", "squash ",
     "diff a b --junit "],
)  # fmt: skip
def test_paths_are_left_to_the_shell(line: str) -> None:
    assert kind(line) == "file"


def test_folders_are_left_to_the_shell() -> None:
    for line in ("clean ", "timeline a -o ", "diff a b --base-adapter ", "report s --figures "):
        assert kind(line) == "dir"


def test_words() -> None:
    assert values("combine ")[:-1] == list(OPERATIONS)[:-1]
    assert values("combine at") == ["at-least="]
    assert values("diff a b --rule ") == ["exact", "atol=1e-5", "rtol=1e-3", "ulp=1"]
    assert values("diff a b --rule atol=1e-4@b") == ["atol=1e-4@bf16"]
    assert values("overlap a --null ") == ["model", "tensor", "magnitude", "rowcol"]
    assert values("delta a b --encoding x") == ["xor"]
    assert values("export s --to n") == ["npz"]
    assert values("show s --by m") == ["module", "model"]
    assert values("show s --sort d") == ["dtype", "density"]
    assert values("diff a b --memory 1") == ["1GiB"]
    assert values("diff a b --device c") == ["cpu", "cuda"]
    assert values("--log-level d") == ["debug"]


def test_every_kind_is_known() -> None:
    """Each argument that is a path completes as one: a new one gets a name that is known."""
    free = {"key", "include", "exclude", "rename", "expect_changed", "expect_unchanged", "glob",
            "tensors", "scheduler", "title"}  # fmt: skip
    for name, command in commands().items():
        completing.complete(command)
        for parameter in command.params:
            plain = type(parameter.type).__name__ == "StringParamType"
            assert not plain or parameter.name in free, (name, parameter.name)


def test_many_entries_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "_LOOKED_AT", 10)
    for i in range(30):
        (tmp_path / f"d{i}").mkdir()
    assert kind(f"show {tmp_path}/") == "file"


def ask(shell: str, words: str, at: int) -> subprocess.CompletedProcess[str]:
    asked = {"_CKDIFF_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    return python(MAIN, env=asked)


def test_as_shells_ask() -> None:
    assert ask("bash", "ckdiff show run1", 2).stdout == "plain,run10.zarr\n"
    assert ask("zsh", "ckdiff show run1", 2).stdout.splitlines()[:2] == ["plain", "run10.zarr"]
    fish = {
        "_CKDIFF_COMPLETE": "fish_complete",
        "COMP_WORDS": "ckdiff show run1",
        "COMP_CWORD": "run1",
    }
    assert "run10.zarr" in python(MAIN, env=fish).stdout


def test_nothing_heavy_is_imported() -> None:
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules)); {MAIN}"
    for words in ("ckdiff overlap r", "ckdiff combine i", "ckdiff diff "):
        asked = {"_CKDIFF_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
        done = python(code, env=asked)
        loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
        assert "ckdiff" in loaded
        assert not loaded & {"numpy", "numba", "zarr", "dask", "torch", "rich", "huggingface_hub"}
        assert len([name for name in done.stdout.split() if name.startswith("ckdiff.cli.")]) < 15


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell: str, place: Path) -> None:
    """What is documented is evaluated by a real shell, where there is one."""
    script = python(MAIN, env={"_CKDIFF_COMPLETE": f"{shell}_source"})
    assert script.returncode == 0
    assert "_CKDIFF_COMPLETE" in script.stdout
    found = shutil.which(shell)
    if shell != "bash" or found is None:
        return
    program = place / "ckdiff"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m ckdiff \"$@\"\n")
    program.chmod(0o755)
    asked = (
        'eval "$(_CKDIFF_COMPLETE=bash_source ckdiff)"; COMP_WORDS=(ckdiff show run1);'
        ' COMP_CWORD=2; _ckdiff_completion ckdiff 2>/dev/null; echo "${COMPREPLY[@]}"'
    )
    path = {"PATH": f"{place}:{os.environ['PATH']}", "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [found, "-c", asked], env=os.environ | path, capture_output=True, text=True, check=True
    )
    program.unlink()
    assert done.stdout == "run10.zarr\n"
