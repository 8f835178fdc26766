"""A step of AdamW: dense, with masked gradients, frozen and compact, all in one run, in turn.

    python bench/sparse_step.py [--elements 1e8] [--density 0.3,0.1,0.01] [--rounds 7] [--json]
                                [--threads 2] [--quick]

The model is matrices of 1,000 x 1,000 float32, with random masks; all optimizers see the same
gradients, so gradient computation is no part of it. "masked gradients" are multiplied by the mask
before a dense step, as people do: weight decay still moves the frozen weights. State is what the
optimizer keeps between steps, with masks or positions.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from typing import Any

import torch
from common import median, table, take_turns, timed
from torch import nn

from ckdiff.training import SubnetworkOptimizer, freeze_unmasked

SIDE = 1000
KINDS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIONS = {"lr": 1e-4, "weight_decay": 0.1}
GRADIENTS = 4  # different matrices of gradients


class Matrices(nn.Module):
    """Square matrices that all start the same, with gradients that models share."""

    def __init__(self, count: int, start: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(count))
        for parameter, gradient in zip(self.w, gradients, strict=True):
            parameter.grad = gradient


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


class Contest:
    """Optimizers over models of their own."""

    def __init__(self, count: int, start: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        self._new = lambda: Matrices(count, start, gradients)
        self.models: dict[str, nn.Module] = {}
        self.steps: dict[str, Callable[[], object]] = {}
        self.state: dict[str, Callable[[], int]] = {}

    def dense(self, name: str, options: dict[str, bool]) -> None:
        model = self.models[name] = self._new()
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, **options)
        self.steps[name] = optimizer.step
        self.state[name] = lambda: state_bytes(optimizer)

    def masked(self, name: str, masks: dict[str, torch.Tensor]) -> None:
        """Multiplying rather than filling: gradients are shared, so they are put back."""
        model = self.models[name] = self._new()
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)

        def step() -> None:
            kept = [parameter.grad for parameter in model.parameters()]
            for parameter, mask in zip(model.parameters(), masks.values(), strict=True):
                assert parameter.grad is not None
                parameter.grad = parameter.grad * mask
            optimizer.step()
            for parameter, gradient in zip(model.parameters(), kept, strict=True):
                parameter.grad = gradient

        self.steps[name] = step
        self.state[name] = lambda: state_bytes(optimizer) + sum(m.nbytes for m in masks.values())

    def frozen(self, name: str, masks: dict[str, torch.Tensor]) -> None:
        """Freezing zeroes unmasked gradients in place, so this model has its own."""
        model = self.models[name] = self._new()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)
        freeze_unmasked(model, optimizer, masks)
        self.steps[name] = optimizer.step
        self.state[name] = lambda: state_bytes(optimizer) + sum(m.nbytes for m in masks.values())

    def compact(self, name: str, masks: dict[str, torch.Tensor], options: dict[str, bool]) -> None:
        model = self.models[name] = self._new()
        optimizer = SubnetworkOptimizer(torch.optim.AdamW, model, masks, **OPTIONS, **options)
        self.steps[name] = optimizer.step
        self.state[name] = lambda: state_bytes(optimizer) + optimizer.selection_bytes

    def run(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of each step, after one that makes states and kernels."""
        for step in self.steps.values():
            step()
        return take_turns({name: timed(step) for name, step in self.steps.items()}, rounds)

    def check(self, dense: str, other: str, start: torch.Tensor, masks: list[torch.Tensor]) -> None:
        """The other model's masked weights are the dense one's, its frozen ones as at first."""
        for one, two, mask in zip(
            self.models[dense].parameters(), self.models[other].parameters(), masks, strict=True
        ):
            expected = torch.where(mask, one.detach(), start).view(torch.int32)
            assert torch.equal(expected, two.detach().view(torch.int32)), f"{other} is WRONG"


def compare(
    count: int, density: float, rounds: int, start: torch.Tensor, gradients: list[torch.Tensor]
) -> dict[str, Any]:
    """One density: name -> seconds (median) and bytes of state."""
    random = torch.Generator().manual_seed(round(1 / density))
    masks = {f"w.{i}": torch.rand(SIDE, SIDE, generator=random) < density for i in range(count)}
    contest = Contest(count, start, gradients)
    for kind, options in KINDS.items():
        contest.dense(f"dense, {kind}", options)
    contest.masked("masked gradients, fused", masks)
    contest.frozen("freeze_unmasked, fused", masks)
    for kind, options in KINDS.items():
        contest.compact(f"compact, {kind}", masks, options)
    seconds = contest.run(rounds)
    for kind in KINDS:
        contest.check(f"dense, {kind}", f"compact, {kind}", start, list(masks.values()))
    contest.check("dense, fused", "freeze_unmasked, fused", start, list(masks.values()))
    found = {
        name: {"seconds": median(times), "least": min(times), "state": contest.state[name]()}
        for name, times in seconds.items()
    }
    del contest
    gc.collect()  # optimizers and their hooks hold each other, and gigabytes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=float, default=1e8, help="parameters of the model")
    parser.add_argument("--density", default="0.3,0.1,0.01", help="of the masks, with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="only JSON: seconds, bytes of state")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    densities = "0.1" if a.quick else a.density
    count, rounds = (2, 1) if a.quick else (max(1, round(a.elements / SIDE**2)), a.rounds)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    start = torch.randn(SIDE, SIDE) * 0.02
    some = [torch.randn(SIDE, SIDE) * 1e-3 for _ in range(GRADIENTS)]
    gradients = [some[i % GRADIENTS].clone() for i in range(count)]
    found = {
        density: compare(count, density, rounds, start, gradients)
        for density in map(float, densities.split(","))
    }
    if a.json:
        print(json.dumps({"elements": count * SIDE**2, "threads": a.threads, "densities": found}))
        return
    for density, entries in found.items():
        default, fused = (entries[f"dense, {kind}"] for kind in ("default", "fused"))
        table(
            f"AdamW, {count} float32 matrices of 10^6, density {density:g}, {a.threads} threads,"
            f" median of {rounds}",
            ["what", "ms a step", "x default", "x fused", "state, bytes an element", "of dense"],
            [
                [
                    name,
                    f"{entry['seconds'] * 1e3:.1f}",
                    default["seconds"] / entry["seconds"],
                    fused["seconds"] / entry["seconds"],
                    entry["state"] / (count * SIDE**2),
                    f"{entry['state'] / default['state']:.3f}",
                ]
                for name, entry in entries.items()
            ],
        )


if __name__ == "__main__":
    main()
