"""Each command does its work with what ckdiff-core needs, or says what to install for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command_names
from small_worker import trial
from source import ROOT

WORKER = ROOT / "tests/helpers/small_worker.py"


def test_every_command(tmp_path: Path) -> None:
    trial.prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, WORKER, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_no_command_is_left_out() -> None:
    assert {tried.words[0] for tried in trial.trials()} == {*command_names(), "--version"}


@pytest.mark.parametrize(
    ("code", "stderr", "lacks", "right"),
    [
        (0, "ckdiff: note: done\n", None, True),
        (2, "ckdiff: error: no\n", None, False),
        (2, "ckdiff: error: no (pip install 'ckdiff-core[gpu]')\n", "'ckdiff-core[gpu]'", True),
        (0, "", "'ckdiff-core[gpu]'", False),
        (2, "Traceback\nNo 'ckdiff-core[gpu]'\n", "'ckdiff-core[gpu]'", False),
        (2, "ckdiff: error: no (pip install torch)\n", "'ckdiff-core[gpu]'", False),
    ],
)
def test_what_is_wrong(code: int, stderr: str, lacks: str | None, right: bool) -> None:
    found = trial.wrong(trial.Trial(["info"], lacks), trial.Said(code, stderr))
    assert (found is None) == right
