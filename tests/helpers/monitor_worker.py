"""One of several processes that train together and watch it; run by test_training_monitor_sharded.

``python monitor_worker.py WHAT RANK PROCESSES FOLDER``. Each writes what it saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from safetensors.torch import save_file
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from training_support import Tiny, loss_of, train

import ckdiff
from ckdiff.training import UpdateMonitor


class Two(nn.Module):
    """Widths that processes do not divide, and a bias that some of them have nothing of."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(self.a(x))
        return found


def save(model: nn.Module, path: Path) -> None:
    """All of a model's weights, gathered; the first process writes them."""
    whole = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }
    if dist.get_rank() == 0:
        save_file(whole, path)
    dist.barrier()


def watched(model: nn.Module, folder: Path, name: str, steps: Any) -> None:
    """Look after each step; the test compares with diffs of what is saved."""
    save(model, folder / f"{name}-0.safetensors")
    given = UpdateMonitor(model, folder / "base.safetensors") if name == "fsdp" else None
    monitor = UpdateMonitor(model, log=folder / f"{name}.jsonl")
    seen = []
    for step in (1, 2):
        steps()
        seen.append(monitor.look(step).to_dict())
        if given is not None:
            seen[-1]["base"] = given.look().changed
        save(model, folder / f"{name}-{step}.safetensors")
    part = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    assert monitor.nbytes == 2 * part, "each process keeps its part"
    (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(seen))


def fsdp(folder: Path) -> None:
    model = Tiny()
    for part in (model.up, model.down):
        fully_shard(part)
    fully_shard(model)
    optimizer = optim.SGD(model.parameters(), lr=0.02)

    def steps() -> None:
        train(model, optimizer, steps=2)
        with torch.no_grad():  # leaves parameters whole
            loss_of(model, 0)

    watched(model, folder, "fsdp", steps)


def other_parts(folder: Path) -> None:
    """A monitor from before the model was sharded says so, in every process."""
    model = Two(8)
    monitor = UpdateMonitor(model)
    fully_shard(model)
    with pytest.raises(ckdiff.UsageError, match="make the monitor once the model is sharded"):
        monitor.look()


def ddp(folder: Path) -> None:
    model = DistributedDataParallel(Tiny())
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    save(model.module, folder / "ddp-0.safetensors")
    if dist.get_rank() == 0:
        monitor = UpdateMonitor(model)
    for step in (1, 2):
        train(model, optimizer, steps=2)
        if dist.get_rank() == 0:  # nothing is communicated
            (folder / f"ddp-look-{step}.json").write_text(json.dumps(monitor.look().to_dict()))
        save(model.module, folder / f"ddp-{step}.safetensors")


def grids(folder: Path) -> None:
    """FSDP over tensor parallelism, and over replicas: everything counts once."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name in ("parallel", "replicas"):
        model = Two()
        if name == "parallel":
            plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
            parallelize_module(model, grid["tensor"], plan)
        fully_shard(model, mesh=grid["data"] if name == "parallel" else grid)

        def steps(model: nn.Module = model) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    assert isinstance(parameter, DTensor)
                    parameter.to_local().view(-1)[::3] += 1

        watched(model, folder, name, steps)


SCENARIOS = {"fsdp": fsdp, "other_parts": other_parts, "ddp": ddp, "grids": grids}


def main() -> None:
    names, rank, processes, folder = sys.argv[1].split("+"), *map(int, sys.argv[2:4]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    for name in names:
        SCENARIOS[name](Path(folder))
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
