"""Watching in several processes: every one sees what a diff of the gathered weights says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_processes import run_together
from training_support import Tiny

import ckdiff

PROCESSES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes saw and saved."""
    folder = tmp_path_factory.mktemp("four")
    base = {name: value.clone() for name, value in Tiny().state_dict().items()}
    base["up.weight"][5:25] += 1  # rows of several processes
    base["down.weight"][:, ::2] = torch.nan
    save_file(base, folder / "base.safetensors")
    run_together("monitor_worker.py", "fsdp+other_parts+ddp+grids", PROCESSES, folder)
    return folder


def check(look: dict[str, Any], folder: Path, name: str, step: int) -> None:
    states = [folder / f"{name}-{at}.safetensors" for at in (0, step - 1, step)]
    for base, key in ((states[0], "changed"), (states[1], "changed_since_last")):
        out = folder / "s.zarr"
        store = ckdiff.diff(base, states[2], out, overwrite=True).store
        assert store is not None
        expected = {
            row["group"]: (row["elements"], row["rules"]["exact"]["changed"])
            for row in store.summary(by="module")
        }
        found = {name: (row["elements"], row[key]) for name, row in look["modules"].items()}
        assert found == expected
        assert look[key] == sum(changed for _, changed in expected.values()) > 0


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """The looks, which are the same in all processes but for the time that they took."""
    looks = [json.loads((folder / f"{name}-{i}.json").read_text()) for i in range(PROCESSES)]
    for look in (look for some in looks for look in some):
        del look["seconds"]
    assert all(some == looks[0] for some in looks)
    found: list[dict[str, Any]] = looks[0]
    return found


def test_sharded(folder: Path) -> None:
    for step, look in enumerate(seen(folder, "fsdp"), 1):
        check(look, folder, "fsdp", step)
        result = ckdiff.diff(folder / "base.safetensors", folder / f"fsdp-{step}.safetensors")
        assert look["base"] == result.to_dict()["rules"]["exact"]["changed"]
    lines = (folder / "fsdp.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2], "one process writes"


def test_one_process_of_several_that_have_the_same(folder: Path) -> None:
    for step in (1, 2):
        check(json.loads((folder / f"ddp-look-{step}.json").read_text()), folder, "ddp", step)


@pytest.mark.parametrize("name", ["parallel", "replicas"])
def test_grids_of_processes(name: str, folder: Path) -> None:
    for step, look in enumerate(seen(folder, name), 1):
        check(look, folder, name, step)
