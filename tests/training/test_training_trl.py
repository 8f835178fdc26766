"""The callback in Trainers of transformers and TRL: one line holds the frozen weights still."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainers
from datasets import Dataset
from training_processes import run_together
from training_support import Masks, all_bits, one_thread
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import ckdiff
from ckdiff.training import SubnetworkCallback, SubnetworkOptimizer

pytestmark = trainers.foreign_warnings
__all__ = ["one_thread"]  # a fixture
STEPS = 50


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """A short run on the CPU that writes and reports nothing."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def sentences(count: int = 8) -> list[str]:
    words = trainers.WORDS
    return [" ".join(words[(i * 5 + j * 3) % len(words)] for j in range(6)) for i in range(count)]


def sft(model: Any, folder: Path, callback: Any, **more: Any) -> Any:
    return SFTTrainer(
        model,
        args=SFTConfig(**options(folder, max_length=16, **more)),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        processing_class=trainers.tokenizer(),
        callbacks=[callback],
    )


def dpo(model: Any, folder: Path, callback: Any) -> Any:
    texts = sentences()
    data = {"prompt": ["w1 w2"] * 8, "chosen": texts, "rejected": texts[::-1]}
    return DPOTrainer(
        model,
        args=DPOConfig(**options(folder, max_length=16)),
        train_dataset=Dataset.from_dict(data),
        processing_class=trainers.tokenizer(),
        callbacks=[callback],
    )


def grpo(model: Any, folder: Path, callback: Any) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    return GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(**options(folder, num_generations=2, max_completion_length=3)),
        train_dataset=Dataset.from_dict({"prompt": sentences()}),
        processing_class=trainers.tokenizer(),
        callbacks=[callback],
    )


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_trl(make: Any, tmp_path: Path) -> None:
    model = trainers.saved_llama(tmp_path / "base")
    masks = trainers.some_masks(model)
    before = all_bits(model)
    callback = SubnetworkCallback(masks)
    trainer = make(model, tmp_path, callback)
    trainer.train()
    assert trainer.state.global_step == STEPS
    trainers.check(before, model, masks)
    assert callback.freeze is None


class Rows(torch.utils.data.Dataset):
    """The same few tokens again and again, or other ones."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(6) * 5 + at) % 32
        return {"input_ids": tokens, "labels": tokens}


def plain(model: Any, folder: Path, *callbacks: Any, optimizer: Any = None, **more: Any) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**options(folder, **more)),
        train_dataset=Rows(),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


class Watch(TrainerCallback):
    """Looks at what is handed to the optimizer."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert not any(gradients[name][~mask].any() for name, mask in self.masks.items())
        norms = [gradient.double().norm() for gradient in gradients.values()]
        self.norms.append(float(torch.stack(norms).norm()))


def test_clipping_is_by_the_norm_of_the_subnetwork(tmp_path: Path) -> None:
    model = trainers.tiny_llama()
    masks = trainers.some_masks(model, 0.1)
    watch = Watch(masks)
    plain(
        model,
        tmp_path,
        SubnetworkCallback(masks),
        watch,
        max_steps=4,
        max_grad_norm=1e-3,
        gradient_accumulation_steps=2,
    ).train()
    assert watch.norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_resuming_and_training_again(tmp_path: Path) -> None:
    masks = trainers.some_masks(trainers.tiny_llama())
    before = all_bits(trainers.tiny_llama())
    whole, first, second = (trainers.tiny_llama() for _ in range(3))
    short = {"max_steps": 8, "gradient_accumulation_steps": 2}
    plain(whole, tmp_path / "whole", SubnetworkCallback(masks), **short).train()
    keep = {"save_strategy": "steps", "save_steps": 4}
    plain(first, tmp_path / "run", SubnetworkCallback(masks), **short, **keep).train()
    again = plain(second, tmp_path / "run", SubnetworkCallback(masks), **short)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    trainers.check(before, second, masks)
    after = all_bits(whole)
    assert all(torch.equal(bits, after[name]) for name, bits in all_bits(second).items())
    again.train()
    trainers.check(before, second, masks)
    assert not all(torch.equal(bits, after[name]) for name, bits in all_bits(second).items())


class Failing(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    model = trainers.tiny_llama()
    masks = trainers.some_masks(model)
    before = all_bits(model)
    callback = SubnetworkCallback(masks)
    trainer = plain(model, tmp_path, callback, Failing(), max_steps=3)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert callback.freeze is not None
    assert callback.freeze.frozen == sum(int((~mask).sum()) for mask in masks.values())
    trainer.remove_callback(Failing)
    trainer.train()
    trainers.check(before, model, masks)
    assert callback.freeze is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    trainer.remove_callback(callback)
    trainer.train()
    with pytest.raises(AssertionError, match="a frozen element changed"):
        trainers.check(before, model, masks)


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    model = trainers.tiny_llama()
    masks = trainers.some_masks(model)
    del masks["lm_head.weight"]
    with pytest.raises(ckdiff.PairingError, match=r"lm_head\.weight: no mask"):
        plain(model, tmp_path, SubnetworkCallback(masks)).train()
    plain(model, tmp_path, SubnetworkCallback(masks, missing="freeze"), max_steps=1).train()
    callback = SubnetworkCallback(masks)
    for optimizer, found in (
        (None, "but none"),
        (SimpleNamespace(optimizer="x"), "but SimpleNamespace around str"),
    ):
        with pytest.raises(ckdiff.UsageError, match=found) as caught:
            callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
        assert "freeze_zero" in caught.value.one_line()


@pytest.mark.parametrize("with_callback", [True, False])
def test_the_compact_optimizer_in_a_trainer(with_callback: bool, tmp_path: Path) -> None:
    """It goes in as it is; with the callback clipping is the subnetwork's as well."""
    model, other = trainers.tiny_llama(), trainers.tiny_llama()
    masks = trainers.some_masks(model)
    before = all_bits(model)
    # one group, as the optimizer here has; the Trainer's own has one without decay as well
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    callbacks = [SubnetworkCallback(masks)] if with_callback else []
    clip = {} if with_callback else {"max_grad_norm": 0.0}
    compact = SubnetworkOptimizer(torch.optim.AdamW, model, masks, **settings)
    plain(model, tmp_path, *callbacks, optimizer=compact, **clip).train()
    trainers.check(before, model, masks)
    frozen = torch.optim.AdamW(other.parameters(), **settings)
    plain(other, tmp_path, SubnetworkCallback(masks), optimizer=frozen, **clip).train()
    after = all_bits(other)
    assert all(torch.equal(bits, after[name]) for name, bits in all_bits(model).items())


def test_the_compact_optimizer_resumes(tmp_path: Path) -> None:
    masks = trainers.some_masks(trainers.tiny_llama())
    short = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(resume: str | None) -> Masks:
        model = trainers.tiny_llama()
        optimizer = SubnetworkOptimizer(torch.optim.AdamW, model, masks, lr=1e-2)
        trainer = plain(model, tmp_path, optimizer=optimizer, **short)
        trainer.train(resume_from_checkpoint=resume)
        return all_bits(model)

    whole = run(None)
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(bits, resumed[name]) for name, bits in whole.items())


def test_two_processes(tmp_path: Path) -> None:
    """DDP and FSDP2: unmasked gradients are zero on each rank when clipping would look at them."""
    run_together("callback_worker.py", "ddp+fsdp", 2, tmp_path)  # the worker checks it
