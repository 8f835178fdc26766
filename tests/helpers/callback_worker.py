"""One of two processes that train with the callback, over DDP and FSDP2; run by test_training_trl.

``python callback_worker.py WHAT RANK PROCESSES FOLDER``. Each checks its own part.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from leaving import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckdiff.training import SubnetworkCallback


def whole(tensor: Any) -> Any:
    return getattr(tensor, "full_tensor", lambda: tensor)()


def train(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 5))
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in model.named_parameters()}
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    before = {name: whole(p).detach().clone() for name, p in named.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    callback: Any = SubnetworkCallback(masks)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    torch.manual_seed(rank)
    for _ in range(50):
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
        for name, parameter in named.items():
            gradient = whole(parameter.grad)
            assert not gradient[~masks[name]].any(), "before clipping"
            assert gradient.any()
        optimizer.step()
    for name, parameter in named.items():
        assert torch.equal(whole(parameter) != before[name], masks[name]), name


if __name__ == "__main__":
    number, count, where = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=number, world_size=count
    )
    for one in sys.argv[1].split("+"):
        train(one, number)
    leave()
