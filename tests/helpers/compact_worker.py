"""One of two processes with a compact optimizer under FSDP2; run by test_training_compact.

``python compact_worker.py WHAT RANK PROCESSES FOLDER``. Rank 0 writes what the test looks at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_support import Tiny, bits, some_masks, train

import ckdiff
from ckdiff.training import SubnetworkOptimizer, parameter_masks
from ckdiff.training.sharding import local


def sharded(state: dict[str, torch.Tensor]) -> nn.Module:
    model = Tiny()
    model.load_state_dict(state)
    for part in (model.up, model.down):
        fully_shard(part)
    fully_shard(model)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        found[name] = parameter.full_tensor().detach()
    return found


def main() -> None:
    rank, processes, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    masks = some_masks(Tiny())
    model = sharded(Tiny().state_dict())
    here = {name: bits(local(parameter)) for name, parameter in model.named_parameters()}
    flags = parameter_masks(model, masks)
    optimizer = SubnetworkOptimizer(optim.AdamW, model, masks, lr=0.01, weight_decay=0.1)
    assert optimizer.masked == sum(int(mask.sum()) for mask in flags.values())
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        moved = bits(local(parameter)) != here[name]
        assert not moved[~flags[name]].any(), name
    done = whole(model)

    # each process saves and loads the state of its own parts
    mine = folder / f"optimizer{rank}.pt"
    torch.save(optimizer.state_dict(), mine)
    dist.barrier()
    again = sharded(done)
    resumed = SubnetworkOptimizer(optim.AdamW, again, masks, lr=0.01, weight_decay=0.1)
    with pytest.raises(ckdiff.UsageError, match=r"for another part of embed\.weight"):
        resumed.load_state_dict(torch.load(folder / f"optimizer{1 - rank}.pt"))
    resumed.load_state_dict(torch.load(mine))
    for one, stepped in ((model, optimizer), (again, resumed)):
        train(one, stepped, 5)
    after = whole(model)
    assert all(map(torch.equal, after.values(), whole(again).values()))
    if rank == 0:
        torch.save(done, folder / "compact.pt")
    leave()


if __name__ == "__main__":
    main()
