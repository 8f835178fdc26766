"""The code in docs/training.md about other libraries is run, with a store and a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import mask_stores
import numpy as np
import pytest
import torch
import trainers
from datasets import Dataset
from training_support import Masks, all_bits
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import ckdiff
from ckdiff.training import SubnetworkOptimizer

pytestmark = [
    trainers.foreign_warnings,
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def blocks(title: str) -> list[str]:
    """The Python of a section."""
    section = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.M)
    (text,) = [part for part in section if part.startswith(f"{title}\n")]
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Masks:
    """``run1.zarr`` in the current folder, the diff of the base with a copy that was changed."""
    model = trainers.saved_llama(tmp_path / "base")
    masks = trainers.some_masks(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[masks[name]] += 1
    model.save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    ckdiff.diff("base", "tuned", "run1.zarr")
    return masks


def test_trainers(masks: Masks) -> None:
    callback, compact = blocks("Hugging Face Trainer and TRL")
    settings = {
        "dataset": Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 4}),
        "args": SFTConfig("out", max_steps=2, use_cpu=True, report_to=[], max_grad_norm=0.0),
        "torch": torch,
        "SFTTrainer": SFTTrainer,
        "SubnetworkOptimizer": SubnetworkOptimizer,
    }
    for code, train in ((callback, ""), (compact, "trainer.train()")):
        model = LlamaForCausalLM.from_pretrained("base")
        before = all_bits(model)
        made = "processing_class=tokenizer, train_dataset=dataset"
        here: dict[str, Any] = {**settings, "model": model, "tokenizer": trainers.tokenizer()}
        code = code.replace("train_dataset=dataset", made)
        code = code.replace('SFTConfig(output_dir="out")', "args")
        exec(code + train, here)
        assert here["trainer"].state.global_step > 1
        trainers.check(before, model, masks)


def test_peft(masks: Masks) -> None:
    (code,) = blocks("PEFT")
    base, base_again = (LlamaForCausalLM.from_pretrained("base") for _ in range(2))
    before = all_bits(base)

    def train(model: torch.nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
        tokens = torch.arange(32).view(4, 8)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    here = {"base": base, "base_again": base_again, "train": train}
    exec(
        "from ckdiff.training import load_shira, to_shira\n" + code.replace("...", "train(model)"),
        here,
    )
    linear = {
        name: mask & ("proj" in name or name == "lm_head.weight") for name, mask in masks.items()
    }
    trainers.check(before, here["merged"], linear)


def test_optax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("optax")
    rng = np.random.default_rng(0)
    base = mask_stores.random_base(rng, {"w": ("BF16", (6, 8))})
    mask = rng.random((6, 8)) < 0.5
    mask_stores.make_store(tmp_path / "run1.zarr", base, {"w": mask})
    monkeypatch.chdir(tmp_path)
    params = {"w": jnp.ones((6, 8))}
    here: dict[str, Any] = {"params": params, "gradients": params}
    exec(code, here)
    assert ((here["params"]["w"] != 1) == mask).all()
