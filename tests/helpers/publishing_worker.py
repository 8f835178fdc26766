"""One of several processes that publish a model together; run by test_sync_sharded.

``python publishing_worker.py WHAT RANK PROCESSES FOLDER``. Rank 0 writes what the test looks at.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import ckdiff
from ckdiff.sync import Publisher


class Tiny(nn.Module):
    """Weights that ranks do not divide, one that is there twice, one that no rank shards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(37, 16)
        self.up = nn.Linear(16, 51)
        self.down = nn.Linear(51, 16)
        self.head = nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """What engines are to have: all of it, in bf16, the tied weight once."""
    found = {}
    for name, value in model.state_dict().items():
        full: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
        if name != "head.weight":
            found[name] = full.bfloat16() if full.is_floating_point() else full.clone()
    return found


def step(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for value in model.parameters():
            local: Any = value.to_local()
            generator = torch.Generator().manual_seed(seed)
            local += 0.1 * (torch.rand(local.shape, generator=generator) < 0.1)
        model.steps += 1  # type: ignore[operator]


def refuse(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def publish(rank: int, folder: Path, *, base: bool) -> None:
    model = Tiny()
    fully_shard(model)
    start = whole(model)
    if rank == 0 and base:
        (folder / "base").mkdir()
        save_file(start, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text("{}")
    dist.barrier()
    given = folder / "base" if base else None
    wanted, fulls = [], []
    with Publisher(folder / "s", given, dtype="bf16", anchor_every=4) as publisher:
        for seed in range(6):
            step(model, seed)
            if seed == 2:  # one rank of two fails, and both say so
                real = os.write
                os.write = refuse if rank == 1 else real  # type: ignore[assignment]
                with pytest.raises(ckdiff.OutputError, match="No space left"):
                    publisher.publish(model)
                os.write = real
                step(model, 77)
            found = publisher.publish(model)
            assert found.version == publisher.version == seed + 1
            fulls.append(found.full)
            mine = publisher._spread._state.snapshot.table  # type: ignore[union-attr]
            assert 0 < len(mine) < len(start) + (not base)
            wanted.append(whole(model))
    with Publisher(folder / "s", given, dtype="bf16") as publisher:  # goes on
        step(model, 9)
        assert publisher.publish(model).version == 7
        wanted.append(whole(model))
    if rank == 0:
        torch.save({"wanted": wanted, "fulls": fulls}, folder / "found.pt")


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[4])
    number, count = int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=number, world_size=count
    )
    for one in what.split("+"):
        publish(number, where / one, base=one == "base")
    leave()
