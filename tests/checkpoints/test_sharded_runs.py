"""A run of two processes, saved in every way that torch has: each is read as what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from given_files import all_bytes, of_torch
from sharded_state import two_processes

import ckdiff
from ckdiff.checkpoints.opening import open_local

torch = pytest.importorskip("torch")

#: what it is saved as, and how many notes there are of what is passed over
WAYS = {"plain": 0, "nested": 1, "app": 1, "flat": 0, "packs": 0, "pieces": 0, "ranks": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    two_processes(folder)
    return folder


def test_whatever_two_processes_write(run: Path) -> None:
    full = torch.load(run / "full.pt", weights_only=True)
    for way, notes in WAYS.items():
        with open_local(run / way) as checkpoint:
            assert _dict(all_bytes(checkpoint)) == _dict(of_torch(full)), way
            assert len(checkpoint.notes) == notes, (way, checkpoint.notes)
            assert checkpoint.contents.pieces, way
    old = torch.load(run / "old_full.pt", weights_only=True)
    for way in ("old", "old_dcp"):
        with open_local(run / way) as checkpoint:
            assert _dict(all_bytes(checkpoint)) == _dict(of_torch(old)), way
    for way in WAYS:
        found = ckdiff.diff(run / "plain", run / way)
        assert found.rules["exact"]["changed"] == 0
        assert not any(found.unpaired.values())


def _dict(tensors: Any) -> Any:
    return dict(sorted(tensors.items()))
