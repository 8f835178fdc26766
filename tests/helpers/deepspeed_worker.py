"""One of two processes that train under DeepSpeed's ZeRO; run by test_training_deepspeed.

``python deepspeed_worker.py STAGE-DTYPE[-clip] RANK PROCESSES FOLDER``
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from training_support import STEPS, Tiny, all_bits, check, loss_of, some_masks

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed

import ckdiff
from ckdiff.training.deepspeed import freeze_zero

CLIP = 0.05


def engine_for(model: nn.Module, stage: int, dtype: str, clip: bool) -> Any:
    flat = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP if clip else 0.0,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = optim.AdamW(groups, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def main() -> None:
    (stage, dtype, *clip), rank, processes, folder = (
        sys.argv[1].split("-"),
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
    )
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    start, model = Tiny(kind), Tiny(kind)
    masks = some_masks(start)
    engine = engine_for(model, int(stage), dtype, bool(clip))
    freeze = freeze_zero(engine, masks)
    assert 0 < freeze.elements < sum(mask.numel() for mask in masks.values())
    with pytest.raises(ckdiff.PairingError, match=r"up\.bias: no mask"):
        freeze_zero(engine, {name: mask for name, mask in masks.items() if name != "up.bias"})
    for step in range(STEPS):
        engine.backward(loss_of(engine, step))
        if clip:
            freeze.mask_gradients()
        engine.step()
    # the model's own weights: what DeepSpeed gathers of its float32 ones loses the sign of zeros
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == "3"):
        check(model, all_bits(start), masks)
        if rank == 0:
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            torch.save(weights, folder / "weights.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
