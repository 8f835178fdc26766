"""Torch files of many kinds, and what is read of them: bytes for bytes against torch itself."""

from __future__ import annotations

import argparse
import collections
import io
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.torchzip import TorchTable, torch_table


def read(raw: bytes, key: str | None = None) -> TorchTable:
    """The table of a file's bytes."""
    return torch_table(lambda offset, size: raw[offset : offset + size], len(raw), "f.pt", key)


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def packed_bytes(raw: bytes, table: TorchTable, place: int) -> bytes:
    """The elements of one tensor in order, found by its place and its strides alone."""
    begin, nbytes = int(table.begins[place]), int(table.nbytes[place])
    strides = table.strides[place]
    if strides is None:
        return raw[begin : begin + nbytes]
    shape = table.shapes[place]
    width = nbytes // int(np.prod(shape))
    flat = np.frombuffer(raw, np.uint8)[begin:]
    steps = [*(step * width for step in strides), 1]
    return bytes(np.lib.stride_tricks.as_strided(flat, (*shape, width), steps).tobytes())


def assert_same(raw: bytes, wanted: Mapping[str, Any], key: str | None = None) -> TorchTable:
    """Hold what is read against tensors of torch: names in order, shapes, dtypes, bytes."""
    import torch

    table = read(raw, key)
    assert table.names == list(wanted)
    for place, (name, tensor) in enumerate(wanted.items()):
        assert table.shapes[place] == tuple(tensor.shape), name
        assert table.dtypes[place] == NAMES[str(tensor.dtype).removeprefix("torch.")], name
        whole = tensor.detach().contiguous().clone()
        data = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        assert table.nbytes[place] == len(data), name
        assert packed_bytes(raw, table, place) == data, name
    return table


#: the safetensors name of a dtype of torch
NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def state_dict() -> dict[str, Any]:
    """Tensors of all dtypes and of all kinds of views."""
    import torch

    base = torch.arange(24, dtype=torch.float32)
    half = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool]
    half += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    half += [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
    half += [torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    views = {
        "matrix": base.view(4, 6),
        "transposed": base.view(4, 6).t(),
        "part": base[5:11],
        "steps": base.view(4, 6)[::2, 1::2],
        "expanded": torch.full((1,), 3.0).expand(7, 3),
        "windows": base.unfold(0, 5, 2),
        "permuted": base.view(2, 3, 4).permute(2, 0, 1),
        "single": base.view(24, 1)[3:9].t(),
        "same": base,
        "nothing": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "bound": torch.nn.Parameter(base.view(4, 6).t()),
    }
    return views | {f"of.{kind}": torch.tensor([0, 1, 1, 0, 1]).to(kind) for kind in half}


def module() -> Any:
    """A module with buffers of both kinds, modules in modules, and a shared one."""
    import torch

    inner = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.BatchNorm1d(2))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), inner, inner)
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("passing", torch.ones(2), persistent=False)
    return model


def training_state() -> dict[str, Any]:
    """What a training loop saves: weights beside everything else."""
    import torch

    model = module()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 12,
        "state_dict": collections.OrderedDict(model.state_dict()),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [0.1]}],
        "hyper_parameters": argparse.Namespace(rate=0.1, weight=torch.ones(2), when={1, 2}),
        "random": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
        "best": np.float64(0.25),
        "generator": np.random.default_rng(1),
        "raw": [b"\0\xff" * 5, bytearray(b"abc"), frozenset("a"), 1 << 200, -1.5, ("t", None)],
        "history": collections.defaultdict(list, loss=[torch.tensor(0.5)]),
    }


def scripted(model: Any) -> bytes:
    """A TorchScript archive."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(model), buffer)
    return buffer.getvalue()


def seeds() -> Iterator[bytes]:
    """Files of several kinds and protocols, all of them small."""
    import torch

    for protocol in (1, 2, 4, 5):
        yield saved(state_dict(), pickle_protocol=protocol)
        yield saved(training_state(), pickle_protocol=protocol)
    yield saved(module())
    yield saved([torch.ones(3), torch.zeros(2)])
    yield scripted(torch.nn.Linear(2, 3))
