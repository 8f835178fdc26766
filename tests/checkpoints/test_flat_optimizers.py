"""An optimizer's state that was saved flat, among the weights, is never compared by accident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import error
from hypothesis import given
from hypothesis import strategies as st
from sharded_state import write_dcp, write_ranks

import ckdiff
from ckdiff.checkpoints.formats.statewords import of_optimizer

torch = pytest.importorskip("torch")

WEIGHTS = {"model.w": torch.ones(4, 4), "norm": torch.ones(3), "state.proj.weight": torch.ones(2)}


def flat(prefix: str = "") -> dict[str, Any]:
    """As ``get_optimizer_state_dict`` gives it with ``flatten_optimizer_state_dict``."""
    found: dict[str, Any] = {}
    for name, tensor in WEIGHTS.items():
        found[f"{prefix}state.{name}.exp_avg"] = tensor * 3
        found[f"{prefix}state.{name}.step"] = torch.tensor(2.0)
        found[f"{prefix}state.{name}.of_some_other_optimizer"] = tensor * 3
        found[f"{prefix}param_groups.{name}.lr"] = torch.tensor(0.1)
    return found


def dcp(folder: Path, state: dict[str, Any]) -> Path:
    write_dcp(folder, state, {})
    return folder


def file(folder: Path, state: dict[str, Any]) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def ranks(folder: Path, state: dict[str, Any]) -> Path:
    write_ranks(folder, 2, lambda rank: state)
    return folder


Save = Callable[[Path, dict[str, Any]], Path]


@pytest.mark.parametrize("save", [dcp, file, ranks])
@pytest.mark.parametrize("prefix", ["", "optimizer.", "optim."])
def test_only_weights_count(tmp_path: Path, save: Save, prefix: str) -> None:
    plain = save(tmp_path / "a", WEIGHTS)
    mixed = save(tmp_path / "b", WEIGHTS | flat(prefix))
    for base, tuned in ((plain, mixed), (mixed, plain), (mixed, mixed)):
        found = ckdiff.diff(base, tuned).to_dict()
        assert (found["tensors"], found["elements"]) == (3, 21)
        assert not any(found["unpaired"].values())


@pytest.mark.parametrize("save", [dcp, file, ranks])
def test_nothing_but_an_optimizer_is_no_model(tmp_path: Path, save: Save) -> None:
    said = error("info", str(save(tmp_path / "a", flat())))
    assert "no tensors that are weights" in said
    assert "--key" not in said


def test_a_module_without_tensors_is_no_model() -> None:
    for given_ in (torch.nn.ReLU(), torch.nn.Sequential()):
        with pytest.raises(ckdiff.CheckpointError, match="no tensors that are weights") as caught:
            ckdiff.diff(WEIGHTS, given_)
        assert "--key" not in str(caught.value)


def test_names_of_models_stay() -> None:
    for names in (
        ["state.proj.weight", "state.proj.bias", "w"],
        ["state.0.step", "state.1.step"],
        ["optical.state.x.y", "x.z"],
        ["param_groups.x.lr"],
        ["state.weight", "weight"],
    ):
        assert of_optimizer(names) == set()


@given(st.lists(st.text("state.groupsexpavg_0", max_size=30), unique=True))
def test_any_names(names: list[str]) -> None:
    assert of_optimizer(names) <= set(names)
