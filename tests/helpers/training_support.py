"""A tiny model to train, masks for it, and every torch optimizer: for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

from ckdiff.training import freeze_unmasked

STEPS = 50
Masks = dict[str, torch.Tensor]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tiny(nn.Module):
    """An embedding, linear layers and a norm; zeros of both signs among the weights."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, width: int = 37, sparse: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(16, 12, sparse=sparse)
        self.up = nn.Linear(12, width)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, 12, bias=False)
        self.head = nn.Linear(12, 16, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.view(-1)[::5] = -0.0
                parameter.view(-1)[1::5] = 0.0
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.nn.functional.gelu(self.up(self.embed(tokens))))
        return self.head(self.down(hidden))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens = (torch.arange(8) * 3 + step) % 16
    return torch.nn.functional.cross_entropy(model(tokens).float(), (tokens * 5 + 1) % 16)


def some_masks(model: nn.Module, seed: int = 0) -> Masks:
    """About a third of each parameter; nothing of one, all of another."""
    random = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(p.shape, generator=random) < 0.3 for name, p in model.named_parameters()
    }
    masks["norm.weight"][:] = True
    masks["norm.bias"][:] = False
    masks["down.weight"] = torch.rand(masks["down.weight"].shape, generator=random) < 0.7
    return masks


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def all_bits(model: nn.Module) -> Masks:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def check(model: nn.Module, before: Masks, masks: Masks) -> None:
    """Frozen bits are as before; most of the masked ones are not."""
    for name, after in all_bits(model).items():
        moved = after != before[name]
        assert not moved[~masks[name]].any(), f"{name}: a frozen element changed"
        if masks[name].any():
            share = moved[masks[name]].float().mean()
            assert share > 0.2, f"{name}: only {share:.2f} of the masked elements moved"


class Rogue(torch.optim.Optimizer):
    """Changes every weight, whatever its gradient, and leaves NaN and wrong zeros."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.125).mul_(-1.125)
                    parameter.view(-1)[2::7] = float("nan")


class Nested(torch.optim.AdamW):
    """A step that calls the step of its parent: the hooks run inside each other."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.99)


def matrices(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in params if parameter.ndim == 2]


ANY: dict[str, Make] = {
    "sgd-decay": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-foreach": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam-l2": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, weight_decay=0.1, initial_accumulator_value=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, weight_decay=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
    "rogue": Rogue,
    "nested": lambda p: Nested(p, lr=0.01, weight_decay=0.1),
}
if hasattr(optim, "Adafactor"):
    ANY["adafactor"] = lambda p: optim.Adafactor(p, lr=0.01, weight_decay=0.1)
if hasattr(optim, "Muon"):
    ANY["muon"] = lambda p: optim.Muon(matrices(p), lr=0.01, weight_decay=0.1)
DTYPES = [torch.float32, torch.bfloat16]
#: fused SGD of torch 2.13 for CPUs changes no bfloat16 weight at all; LBFGS soon finds only NaN
NOT_IN_BFLOAT16 = {(name, torch.bfloat16) for name in ("sgd-fused", "lbfgs")}


class Tied(nn.Module):
    """Two names for one matrix, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))


class Wrap(nn.Module):
    """Puts a part in front of every name, as DDP and torch.compile do."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def alone() -> Masks:
    """The weights after the same steps in one process."""
    model = Tiny()
    masks = some_masks(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    freeze_unmasked(model, optimizer, masks)
    train(model, optimizer)
    return all_bits(model)
