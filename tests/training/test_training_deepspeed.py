"""ZeRO 1, 2 and 3 in two processes: frozen bits stay, the rest learns what one process learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim
from training_processes import run_together
from training_support import STEPS, Tiny, loss_of, one_thread, some_masks

import ckdiff
from ckdiff.training import freeze_unmasked
from ckdiff.training.deepspeed import freeze_zero

__all__ = ["one_thread"]  # a fixture

CLIP = 0.05  # as in the worker


def alone(clip: bool) -> nn.Module:
    """The same steps in one process, without DeepSpeed."""
    model = Tiny()
    masks = some_masks(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = optim.AdamW(groups, lr=0.01)
    freeze = freeze_unmasked(model, optimizer, masks)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip:
            freeze.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("what", ["1-fp32", "2-fp32-clip", "2-bf16", "3-fp32-clip", "3-bf16"])
def test_zero_leaves_frozen_bits(what: str, tmp_path: Path) -> None:
    run_together("deepspeed_worker.py", what, 2, tmp_path)  # the worker checks the bits
    weights = torch.load(tmp_path / "weights.pt")
    if "fp32" in what:
        expected = alone("clip" in what).state_dict()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_other_engines_are_refused() -> None:
    model = Tiny()
    masks = some_masks(model)
    engine = SimpleNamespace(module=model, optimizer=optim.AdamW(model.parameters()))
    with pytest.raises(ckdiff.UsageError, match="with ZeRO 1, 2 or 3, not with AdamW"):
        freeze_zero(engine, masks)
    offloaded = SimpleNamespace(single_partition_of_fp32_groups=[], cpu_offload=True)
    with pytest.raises(ckdiff.UsageError, match="offloaded"):
        freeze_zero(SimpleNamespace(module=model, optimizer=offloaded), masks)
