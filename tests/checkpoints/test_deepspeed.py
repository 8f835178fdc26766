"""Checkpoints of DeepSpeed: what has all of a model is read, all else says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import PLACES, Files, some_files

import ckdiff
from ckdiff.checkpoints.choosing import choice_of
from ckdiff.checkpoints.folders import Folder
from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.errors import CheckpointError

MODEL = "mp_rank_00_model_states.pt"
SHARDS = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
REMEDY = ["run `python zero_to_fp32.py DIR OUT"]
ITSELF = f"give {MODEL} itself"
Place = Callable[[Path, Files], Folder]


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def place(request: pytest.FixtureRequest) -> Place:
    made: Place = request.param
    return made


def saved(folder: Path, weights: dict[str, Any] | None, *others: str, **more: Any) -> Path:
    """What DeepSpeed's engine saves: the file of a rank, and others that nobody reads."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}
    state = {
        "module": weights, "buffer_names": [], "optimizer": optimizer, "param_shapes": None,
        "frozen_param_shapes": None, "shared_params": {}, "lr_scheduler": None, "skipped_steps": 0,
        "global_steps": 5, "dp_world_size": 2, "mp_world_size": 1, "ds_version": "0.17", **more,
    }  # fmt: skip
    folder.mkdir(parents=True)
    torch.save(state, folder / MODEL)
    for name in others:
        (folder / name).write_bytes(b"PK\x03\x04")
    return folder


def test_without_zero_the_model_is_read(tmp_path: Path) -> None:
    weights = {"a.w": torch.arange(6.0).bfloat16(), "b.w": torch.ones(2, 3)}
    base = saved(tmp_path / "base", weights)
    weights["a.w"][2] += 1
    tuned = saved(tmp_path / "run/global_step5", weights)
    (tmp_path / "run/latest").write_text("global_step5")
    for side in (tuned, tuned / MODEL):
        found = ckdiff.diff(base, side).to_dict()
        assert (found["rules"]["exact"]["changed"], found["elements"]) == (1, 12)
        assert found["uncompared"]["tensors"] == 0
    with pytest.raises(CheckpointError, match=r"did you mean .*run/global_step5\?"):
        ckdiff.diff(base, tmp_path / "run")


def test_with_zero_1_and_2_it_is_read_by_itself(tmp_path: Path) -> None:
    weights = {"a.w": torch.ones(6).bfloat16()}
    folder = saved(tmp_path / "run/global_step5", weights, *SHARDS)
    result = ckdiff.diff(folder / MODEL, {"a.w": torch.ones(6).bfloat16()})
    assert result.tensors_identical == 1
    with open_checkpoint(folder / MODEL) as opened:
        assert "those that ZeRO trains are in the files beside it" in opened.notes[0]
    for given in (folder, folder.parent):
        with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py") as raised:
            ckdiff.diff(given, folder / MODEL)
        assert ITSELF in raised.value.one_line()


def test_a_model_that_is_in_other_files_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="and no weights"):
        ckdiff.diff(saved(tmp_path / "a", None), saved(tmp_path / "b", {}))


@pytest.mark.parametrize(
    ("names", "path", "words"),
    [
        ([MODEL, *SHARDS], "", [*REMEDY, ITSELF]),
        (["zero_to_fp32.py", MODEL], "", REMEDY),
        (["zero_to_fp32.py", "latest", f"global_step5/{MODEL}"], "", [*REMEDY, "global_step5"]),
        ([f"global_step{n}/{MODEL}" for n in (5, 10)], "", ["2 folders do", "f/global_step10?"]),
        ([f"zero_pp_rank_{n}_mp_rank_00_model_states.pt" for n in (0, 1)], "", REMEDY),
        ([SHARDS[0]], SHARDS[0], ["is a part of a DeepSpeed checkpoint", *REMEDY]),
        ([MODEL, *SHARDS], SHARDS[1], ["is a part of a DeepSpeed checkpoint", *REMEDY, ITSELF]),
        ([MODEL, MODEL.replace("00", "01")], "", ["2 ranks, each with its part", "whole model"]),
        ([MODEL, MODEL.replace("00", "01")], MODEL, ["is a part of", "2 ranks", "whole model"]),
        (
            [f"global_step5/{MODEL}", f"global_step5/{MODEL.replace('00', '01')}"],
            "",
            ["holds a DeepSpeed checkpoint of 2 ranks", "whole model"],
        ),
        ([MODEL, "layer_00-model_states.pt"], "", ["layers or experts in 1 files"]),
        ([MODEL, "layer_0_expert_1_mp_rank_00_model_states.pt"], MODEL, ["layers or experts"]),
        ([MODEL, "zero_pp_rank_0_mp_rank_00_model_states.pt"], MODEL, REMEDY),
        ([MODEL, "zero_pp_rank_0_mp_rank_01_optim_states.pt"], MODEL, REMEDY),
        ([MODEL, "zero/a.w/fp32.pt"], "", ["holds a DeepSpeed checkpoint with each tensor"]),
    ],
)  # fmt: skip
def test_what_is_not_read(
    tmp_path: Path, place: Place, names: list[str], path: str, words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as raised:
        choice_of(place(tmp_path / "f", some_files(*names)), path)
    line = raised.value.one_line()
    for word in words:
        assert word in line.replace(f"{tmp_path}/", ""), line


def test_other_weights_go_first(tmp_path: Path, place: Place) -> None:
    """A trainer saves the model beside DeepSpeed's folder, which is then left alone."""
    for other in ("model.safetensors", "pytorch_model.bin", "x.pt"):
        files = some_files(other, MODEL, f"global_step5/{MODEL}", "zero_to_fp32.py")
        choice = choice_of(place(tmp_path / other, files), "")
        assert choice.names == (other,)
    choice = choice_of(place(tmp_path / "f", some_files(MODEL, "optimizer.pt")), "")
    assert (choice.names, choice.format) == ((MODEL,), "torch")
