"""The file of JSON lines: what is there stays, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import Tiny, one_thread

import ckdiff
from ckdiff.training import UpdateMonitor

__all__ = ["one_thread"]  # a fixture
ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_for_each_look(tmp_path: Path) -> None:
    model, path = Tiny(), tmp_path / "updates.jsonl"
    for run in range(2):  # a second run goes on where the first ended
        monitor = UpdateMonitor(model, every=2, log=path)
        for _ in range(4):
            with torch.no_grad():
                model.up.bias += 1
            monitor.step()
        found = lines(path)
        assert [line["step"] for line in found] == [2, 4] * (run + 1)
    assert found[-1]["changed"] == len(model.up.bias)
    look = monitor.look(9)
    assert lines(path)[-1] == {"kind": "ckdiff update", **look.to_dict()}
    assert lines(path)[-1]["modules"]["up.bias"]["density"] == 1


def test_what_is_no_log_of_ours_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    for text in ('{"loss": 1}\n', "{", '{"kind": "ckdiff'):
        path.write_text(text)
        with pytest.raises(ckdiff.OutputError, match="exists and is not a log of updates"):
            UpdateMonitor(Tiny(), log=path)
        assert path.read_text() == text
    with pytest.raises(ckdiff.OutputError, match="cannot write"):
        UpdateMonitor(Tiny(), log=tmp_path / "nowhere" / "updates.jsonl")
    with pytest.raises(ckdiff.OutputError, match="cannot write"):
        UpdateMonitor(Tiny(), log=tmp_path)
    for path in ("", "a\0b", b"updates.jsonl"):
        with pytest.raises(ckdiff.UsageError, match="a log is the path of a file"):
            UpdateMonitor(Tiny(), log=path)  # type: ignore[arg-type]
    monitor = UpdateMonitor(Tiny(), log=tmp_path / "new.jsonl")
    (tmp_path / "new.jsonl").unlink()
    (tmp_path / "new.jsonl").mkdir()
    with pytest.raises(ckdiff.OutputError, match="cannot write"):
        monitor.look()


@pytest.mark.parametrize("length", [40, 200_000])
def test_an_unfinished_line_is_cut_off(length: int, tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    UpdateMonitor(Tiny(), log=path).look()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30] + b"x" * length)
    monitor = UpdateMonitor(Tiny(), log=path)
    assert path.read_bytes() == whole
    monitor.look()
    assert len(lines(path)) == 2
    path.write_bytes(whole[:-1])  # the first one
    UpdateMonitor(Tiny(), log=path).look()
    assert len(lines(path)) == 1


KILLED = """
import os, signal, torch
from ckdiff.training import UpdateMonitor
model = torch.nn.Linear(4, 4)
monitor = UpdateMonitor(model, log="updates.jsonl")
for step in range(3):
    monitor.step()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_seen_survives_a_kill(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["step"] for line in lines(tmp_path / "updates.jsonl")] == [1, 2, 3]
