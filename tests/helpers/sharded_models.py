"""A small model as each kind of sharded training state has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sharded_state import distributed, rows, write_dcp, write_ranks
from support import write_safetensors

from ckdiff.checkpoints.contents import SHARDING

STATE = {
    "model.layers.0.q.weight": torch.arange(64.0).reshape(8, 8).bfloat16(),
    "model.layers.0.up.weight": torch.arange(128.0).reshape(16, 8).bfloat16(),
    "model.norm.bias": torch.arange(8.0),
}
ELEMENTS = sum(tensor.numel() for tensor in STATE.values())


def dcp(folder: Path) -> str:
    """The pieces of rows of a ``torch.distributed.checkpoint``; gives the name of its metadata."""
    cuts = {name: rows(tuple(tensor.shape), 3) for name, tensor in STATE.items()}
    write_dcp(folder, STATE, cuts, paths={name: ("model", name) for name in STATE})
    return ".metadata"


def ranks(folder: Path) -> str:
    """The files of two ranks; gives the name of one."""
    from torch.distributed.tensor import Shard

    def state(rank: int) -> Any:
        found = dict(STATE)
        for name in list(STATE)[:2]:
            found[name] = distributed(found[name], (2,), [Shard(0)])
        return found

    write_ranks(folder, 2, state)
    return "model_world_size_2_rank_1.pt"


def pieces(folder: Path) -> str:
    """Two safetensors files of pieces; gives the name of one."""
    folder.mkdir()
    for part in range(2):
        held, said = {}, {}
        for name, tensor in STATE.items():
            ((at, extent), *_) = rows(tuple(tensor.shape), 2)[part:]
            some = tensor[at[0] : at[0] + extent[0]].contiguous()
            data = some.view(torch.uint8).numpy().tobytes()
            kind = "BF16" if some.dtype == torch.bfloat16 else "F32"
            held[name] = (kind, extent, data)
            said[name] = {"saved_offsets": list(at)}
        path = folder / f"shard-0000{part + 1}-model-00001-of-00001.safetensors"
        write_safetensors(path, held, metadata={SHARDING: json.dumps(said)})
    return "shard-00002-model-00001-of-00001.safetensors"
