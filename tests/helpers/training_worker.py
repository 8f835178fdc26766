"""One of several processes that train together; run by test_training_sharded, once for each rank.

``python training_worker.py WHAT RANK PROCESSES FOLDER``. Rank 0 writes what the test looks at.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from leaving import leave
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from training_support import Masks, Tiny, all_bits, bits, check, some_masks, train

import ckdiff
from ckdiff.training import freeze_unmasked, parameter_masks
from ckdiff.training.sharding import cut, local


def adamw(model: nn.Module) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def fsdp(folder: Path) -> Masks:
    """Masks from a store, which each rank reads the ranges of; weights wider than ranks divide."""
    model, masks = Tiny(), some_masks(Tiny())
    before = all_bits(model)
    for part in (model.up, model.down):
        fully_shard(part)
    fully_shard(model)
    optimizer = adamw(model)
    freeze = freeze_unmasked(model, optimizer, folder / "run.zarr")
    here = {name: bits(local(parameter)) for name, parameter in model.named_parameters()}
    local_masks = parameter_masks(model, folder / "run.zarr")
    assert freeze.elements == sum(mask.numel() for mask in local_masks.values())
    assert freeze.elements < sum(mask.numel() for mask in masks.values())
    train(model, optimizer)
    for name, parameter in model.named_parameters():  # each rank looks at its own part too
        moved = bits(local(parameter)) != here[name]
        assert not moved[~local_masks[name]].any(), name
    whole = {name: full(parameter) for name, parameter in model.named_parameters()}
    done = Tiny()
    done.load_state_dict(whole)
    check(done, before, masks)
    return whole


def full(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach()


def fsdp_groups(folder: Path) -> Masks:
    """One layer sharded and computing in bfloat16, the others neither."""
    model, masks = Tiny(), some_masks(Tiny())
    before = all_bits(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model.up, mp_policy=policy)
    assert [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = adamw(model)
    freeze_unmasked(model, optimizer, masks)
    local_masks = parameter_masks(model, masks)
    optimizer.register_step_pre_hook(lambda *_: masked_gradients(model, local_masks))
    train(model, optimizer)
    whole = {
        name: full(p) if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    done = Tiny()
    done.load_state_dict(whole)
    check(done, before, masks)
    return whole


def masked_gradients(model: nn.Module, masks: Masks) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert not local(parameter.grad)[~masks[name]].any(), f"{name}: the optimizer sees it"


def ddp(folder: Path) -> Masks:
    bare, masks = Tiny(), some_masks(Tiny())
    before = all_bits(bare)
    model = DistributedDataParallel(bare)
    optimizer = adamw(model)
    freeze_unmasked(model, optimizer, masks)  # names of the bare model
    train(model, optimizer)
    check(bare, before, masks)
    return {name: parameter.detach() for name, parameter in bare.named_parameters()}


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 6)


def layouts(folder: Path) -> Masks:
    """Masks are cut as torch cuts: each element of a mask is held against its weight."""
    flat = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for shape in [(8, 6), (10, 7), (3, 5), (1, 4), (7,), (2, 3, 5), (0, 3), (9, 1)]:
        weights = random(shape)
        for mesh, placements in [
            (flat, [Shard(0)]),
            (flat, [Replicate()]),
            (flat, [Shard(-1)]),
            (grid, [Shard(0), Shard(0)]),
            (grid, [Replicate(), Shard(0)]),
            (grid, [Shard(0), Shard(len(shape) - 1)]),
        ]:
            sharded = distribute_tensor(weights, mesh, placements, src_data_rank=None)
            assert_cut(sharded, weights)
    for width in (8, 7, 10):  # FSDP over tensor parallelism, and over replicas
        for parallel in (True, False):
            model = Two(width)
            whole = {name: random(tuple(p.shape)) for name, p in model.named_parameters()}
            model.load_state_dict(whole)
            if parallel:
                plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
                parallelize_module(model, grid["tensor"], plan)
            fully_shard(model, mesh=grid["data"] if parallel else grid)
            for name, parameter in model.named_parameters():
                assert_cut(parameter, whole[name])
    refused(grid)
    return {}


def random(shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5).float()


def assert_cut(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    flags = whole.reshape(-1).bool()
    asked: list[int] = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.extend((start, stop))
        return flags[start:stop]

    mask, here = cut(read, tensor), local(tensor).detach()
    assert mask.shape == here.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask, here.bool()), tensor
    rows = here.shape[0] * math.prod(tensor.shape[1:])
    assert sum(asked[1::2]) - sum(asked[::2]) <= rows, "no more rows are read than are held"
    here += 1  # the memory is shared
    assert torch.equal(local(tensor), here)


def refused(grid: DeviceMesh) -> None:
    """Layouts that no weight has."""
    model = nn.Linear(8, 8, bias=False)
    ones = {"weight": torch.ones(8, 8, dtype=torch.bool)}
    for placements, words in (
        ([_StridedShard(0, split_factor=4), Shard(0)], "which is not supported"),
        ([Partial(), Shard(0)], "which is not a weight"),
    ):
        part = DTensor.from_local(torch.ones(2 if "sup" in words else 4, 8), grid, placements)
        model.weight = nn.Parameter(part)
        with pytest.raises(ckdiff.UsageError, match=words):
            parameter_masks(model, ones)


SCENARIOS = {"fsdp": fsdp, "fsdp_groups": fsdp_groups, "ddp": ddp, "layouts": layouts}


def main() -> None:
    names, rank, processes, folder = sys.argv[1].split("+"), *map(int, sys.argv[2:4]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    for name in names:
        weights = SCENARIOS[name](Path(folder))
        if rank == 0:
            torch.save(weights, Path(folder, f"{name}.pt"))
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
