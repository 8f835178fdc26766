"""`make` on a machine of somebody else: an old Python, and an environment that is none any more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
OLD = "#!/bin/sh\ncase $2 in *print*) echo False;; esac\nexit 1\n"  # what Python 3.10 answers


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(clone: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    # a make that runs these tests would be this one's parent, and say so
    known = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    known.pop("MFLAGS", None)
    known |= more
    return subprocess.run(["make", *words], cwd=clone, capture_output=True, text=True, env=known)


@pytest.mark.parametrize("goal", ["demo", "test"])
def test_an_old_python_is_named_and_how_to_choose_another(clone: Path, goal: str) -> None:
    old = program(clone / "python3.10", OLD)
    done = make(clone, f"PYTHON={old}", goal)
    assert done.returncode == 2
    first = done.stdout.splitlines()[0]
    assert "needs Python 3.11" in first
    assert str(old) in first
    chosen = re.search(r"make PYTHON=(python3\.1[1-3]) (\w+)$", first)
    assert chosen is not None, first
    assert chosen[2] == goal
    assert not (clone / ".venv").exists()


def environment(clone: Path, python: str, pip: str) -> None:
    """Everything looks as if it were installed."""
    program(clone / ".venv/bin/python", python)
    program(clone / ".venv/bin/pip", f"#!{pip}\n")
    for stamp in (".run", ".test"):
        (clone / ".venv" / stamp).touch()


def test_one_that_is_there_is_suggested(clone: Path) -> None:
    old = program(clone / "python3.10", OLD)
    for name in ("python3.11", "python3.12"):
        program(clone / "some" / name, OLD)
    program(clone / "some/python3.13", "#!/bin/sh\n")
    first = make(clone, f"PYTHON={old}", PATH=f"{clone}/some:{os.environ['PATH']}").stdout
    assert "choose one: make PYTHON=python3.13 demo\n" in first


NEW = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
#: as where the system's Python became another one: what was installed is of the one before
BARE = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'


@pytest.mark.parametrize(
    ("python", "pip"),
    [
        (OLD, "HERE"),
        ("#!/nowhere/python\n", "HERE"),
        (NEW, "/elsewhere/.venv/bin/python"),
        (BARE, "HERE"),
    ],
    ids=["old", "gone", "moved", "another"],
)
def test_a_stale_environment_is_made_anew(clone: Path, python: str, pip: str) -> None:
    environment(clone, python, pip.replace("HERE", f"{clone}/.venv/bin/python"))
    assert "-m venv --clear .venv" in make(clone, "-n", "demo").stdout


def test_a_good_one_is_kept(clone: Path) -> None:
    environment(clone, NEW, f"{clone}/.venv/bin/python")
    assert make(clone, "-n", "demo").stdout == ".venv/bin/python examples/tiny_rl/demo.py\n"
