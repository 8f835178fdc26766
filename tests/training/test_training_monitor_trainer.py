"""The callback that watches, in Trainers of transformers and TRL: it is in their own log."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainers
from datasets import Dataset
from training_support import one_thread
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import ckdiff
from ckdiff.training import UpdateCallback

pytestmark = trainers.foreign_warnings
__all__ = ["one_thread"]  # a fixture


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """A short run on the CPU that writes nothing but what is asked for."""
    return {
        "output_dir": str(folder), "max_steps": 5, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2,
    } | more  # fmt: skip


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(6) * 5 + i) % 28 + 4
        return {"input_ids": tokens, "labels": tokens}


class Listener(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """What W&B and TensorBoard are told: a callback that comes before ours."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.heard.append((state.global_step, dict(logs)))


def entries(trainer: Any) -> dict[int, dict[str, float]]:
    """Step -> what the log has of updates."""
    found = [entry for entry in trainer.state.log_history if "update/density" in entry]
    assert len({entry["step"] for entry in found}) == len(found)
    return {int(entry["step"]): entry for entry in found}


def test_what_the_trainer_logs(tmp_path: Path) -> None:
    model = trainers.tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    listener = Listener()
    arguments = TrainingArguments(
        **options(tmp_path / "out", save_strategy="steps", save_steps=2, save_only_model=True)
    )
    trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[listener])
    callback = UpdateCallback(trainer, log=tmp_path / "updates.jsonl")
    trainer.add_callback(callback)
    trainer.train()
    found = entries(trainer)
    assert list(found) == [2, 4, 5], "where the Trainer logs, and at the end"
    before = tmp_path / "base"
    for step in (2, 4):
        after = tmp_path / "out" / f"checkpoint-{step}"
        for base, key in ((tmp_path / "base", "density"), (before, "density_since_last")):
            store = ckdiff.diff(base, after, tmp_path / "s.zarr", overwrite=True).store
            assert store is not None
            for row in store.summary(by="module"):
                name = f"update/{key}/{row['group']}"
                assert found[step][name] == row["rules"]["exact"]["density"], name
            (row,) = store.summary(by="model")
            assert found[step][f"update/{key}"] == row["rules"]["exact"]["density"] > 0
        before = after
    assert callback.look is not None
    assert callback.look.density == found[5]["update/density"]
    heard = {step: logs for step, logs in listener.heard if "update/density" in logs}
    assert heard.keys() == found.keys()
    assert {"update/density/self_attn.q_proj", "update/density/mlp.up_proj"} <= heard[2].keys()
    lines = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert {line["step"]: line["density"] for line in lines} == {
        step: entry["update/density"] for step, entry in found.items()
    }


@pytest.mark.parametrize(
    ("settings", "every", "steps"),
    [
        ({"logging_strategy": "epoch"}, None, [4, 8]),
        ({"logging_strategy": "no"}, None, [8]),
        ({"logging_strategy": "epoch"}, 3, [3, 6, 8]),
        ({"logging_steps": 100}, 8, [8]),
    ],
)
def test_when_it_looks(settings: Any, every: Any, steps: list[int], tmp_path: Path) -> None:
    arguments = TrainingArguments(
        **options(tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="no", **settings)
    )
    trainer = Trainer(trainers.tiny_llama(), arguments, train_dataset=Tokens())
    trainer.add_callback(UpdateCallback(trainer, every=every))
    for _ in range(2):  # training again begins anew
        trainer.train()
        assert list(entries(trainer)) == steps


def test_trl_and_a_base(tmp_path: Path) -> None:
    base = trainers.tiny_llama()
    model = trainers.tiny_llama()
    with torch.no_grad():
        model.lm_head.weight += 1  # as if it was trained before
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**options(tmp_path, max_length=16)),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 4}),
        processing_class=trainers.tokenizer(),
    )
    trainer.add_callback(UpdateCallback(trainer, base.state_dict(), every=3, rule="exact@bf16"))
    trainer.train()
    found = entries(trainer)
    assert list(found) == [3, 5]
    assert found[3]["update/density/lm_head.weight"] == 1
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4]
    assert all("mean_token_accuracy" in entry for entry in losses), "what TRL gathers is its own"
    assert not any("mean_token_accuracy" in entry for entry in found.values())


def test_only_one_of_several_that_have_the_same_looks(tmp_path: Path) -> None:
    trainer = Trainer(trainers.tiny_llama(), TrainingArguments(**options(tmp_path)))
    callback = UpdateCallback(trainer)
    other = SimpleNamespace(is_world_process_zero=False, global_step=1)
    control = SimpleNamespace(should_log=True, should_training_stop=False)
    callback.on_train_begin(trainer.args, other, control, model=trainer.model)
    callback.on_step_end(trainer.args, other, control)
    assert callback.look is None
    assert trainer.state.log_history == []


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ckdiff.UsageError, match=r"needs the trainer, not str \(trainer.add_call"):
        UpdateCallback("run1.zarr")
    trainer = Trainer(trainers.tiny_llama(), TrainingArguments(**options(tmp_path)))
    for wrong in ({"every": 0}, {"rule": "nonsense"}):
        with pytest.raises(ckdiff.UsageError):
            UpdateCallback(trainer, **wrong)
