"""State dicts on a device, here torch's CPU that passes for one, and diffs of them there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import ckdiff
from ckdiff.checkpoints.places import heldtorch
from ckdiff.diffs import task
from ckdiff.diffs.plan import plan
from ckdiff.diffs.run import run
from ckdiff.options import Observer, Options

State = dict[str, torch.Tensor]
RULES = ("exact", "atol=1e-3", "rtol=1e-2@bf16")


def some_states(rows: int = 300) -> tuple[State, State]:
    """Ragged, short and long tensors of several dtypes, strided ones, and one off its place."""
    noise = torch.Generator().manual_seed(3)
    base: State = {}
    for i, kind in enumerate([torch.bfloat16, torch.float32, torch.float64, torch.float16] * 3):
        shape = [(7,), (513,), (64, 64), (100, 77), (3, 5, 11), (1,)][i % 6]
        base[f"t{i:02}"] = torch.randn(shape, generator=noise).to(kind)
    base["many"] = torch.randint(-9, 9, (rows, 500), generator=noise, dtype=torch.int32)
    base["bytes"] = torch.randint(0, 9, (1111,), generator=noise, dtype=torch.uint8)
    base["strided"] = torch.randn((40, 50), generator=noise).t()
    base["beside"] = torch.randn(2000, generator=noise).to(torch.bfloat16)[1:]
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["beside"] = torch.cat([tensor[:1] for tensor in (base["beside"],) * 2000])[1:]
    tuned["strided"] = base["strided"].clone(memory_format=torch.contiguous_format)
    for name, tensor in tuned.items():
        flat = tensor.view(-1)
        flat[::97] = flat[::97] * 3 + (1 if "byte" in name else 0)
    return base, tuned


def pretend(patch: Any) -> list[int]:
    """Let torch's CPU pass for a device in what follows; gives the bytes of each copy from it."""
    copied: list[int] = []
    real = heldtorch.HeldOnDevice.copy

    def copy(self: Any, first: int, into: Any) -> None:
        copied.append(len(into))
        real(self, first, into)

    patch.setattr(heldtorch, "is_here", lambda tensor: False)
    patch.setattr(heldtorch.HeldOnDevice, "copy", copy)
    return copied


def diffed(
    base: Any,
    tuned: Any,
    out: Any = None,
    *,
    notes: list[str] | None = None,
    window: int | None = task.SMALLEST_WINDOW,
    **options: Any,
) -> ckdiff.DiffResult:
    """On torch's CPU device, in windows of the smallest size, or without ``window`` of the usual
    one; the test process has plenty of memory in use already.
    """
    asked = Options(
        **{"rules": RULES, "workers": 2, "memory": "8GiB", "device": "torch-cpu"} | options
    )
    observer = Observer(note=(notes if notes is not None else []).append)
    with plan(base, tuned, out, asked, observer) as planned:
        allotment = replace(planned.allotment, window=window or planned.allotment.window)
        return run(replace(planned, allotment=allotment))
