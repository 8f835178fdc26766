"""Two processes that train one model with FSDP2 and save it in every way that torch has.

    python sharded_worker.py FOLDER

``full.pt`` is the oracle: what ``full_tensor()`` gives of each tensor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


class App:
    """What people save: a model beside its optimizer."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def work(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from leaving import leave
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(3, 1))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in weights.items()}
    dcp.save(weights, checkpoint_id=folder / "plain")
    dcp.save({"model": weights, "optim": moments, "step": 3}, checkpoint_id=folder / "nested")
    dcp.save({"app": App({"model": weights, "optim": moments})}, checkpoint_id=folder / "app")
    flat = {f"optim.state.{i}": v for i, v in enumerate(weights.values())}
    dcp.save({**weights, **flat}, checkpoint_id=folder / "flat")
    packs = dcp.FileSystemWriter(
        folder / "packs", serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS
    )
    dcp.save(weights, storage_writer=packs)
    writer = dcp.HuggingFaceStorageWriter(str(folder / "pieces"), save_distributed=True)
    dcp.save(weights, storage_writer=writer)
    (folder / "ranks").mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "ranks" / f"model_world_size_2_rank_{rank}.pt")
    old_shards(rank, folder)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    leave()


def old_shards(rank: int, folder: Path) -> None:
    """FSDP of old, whose state dicts have ShardedTensors."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed import fsdp

    torch.manual_seed(1)
    model = fsdp.FullyShardedDataParallel(
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)),
        device_id=torch.device("cpu"), use_orig_params=True,
    )  # fmt: skip
    kind = fsdp.FullyShardedDataParallel
    settings = fsdp.ShardedStateDictConfig(offload_to_cpu=False)
    with kind.state_dict_type(model, fsdp.StateDictType.SHARDED_STATE_DICT, settings):
        state = model.state_dict()
    (folder / "old").mkdir(exist_ok=True)
    torch.save(state, folder / "old" / f"model_world_size_2_rank_{rank}.pt")
    dcp.save(state, checkpoint_id=folder / "old_dcp")
    with kind.state_dict_type(model, fsdp.StateDictType.FULL_STATE_DICT):
        full = model.state_dict()
    if rank == 0:
        torch.save(full, folder / "old_full.pt")


if __name__ == "__main__":
    from importlib import import_module

    import torch.multiprocessing as mp

    for name in ("_dynamo", "distributed.checkpoint", "distributed.fsdp"):
        import_module(f"torch.{name}")  # it takes seconds, and not twice
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mp.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
