"""Training through what models are wrapped in: compiled, checkpointed, adapted, tied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn, optim
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training_support import Masks, Tiny, Wrap, all_bits, check, one_thread, some_masks, train

from ckdiff.training import SubnetworkOptimizer, freeze_unmasked
from ckdiff.training.names import plain_name

__all__ = ["one_thread"]  # a fixture


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, under the names that PEFT gives."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low: torch.Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + low


class Unwrapped(Wrap):
    """A wrapper that can be called."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        (inner,) = self.children()
        return inner(tokens)


def compiled(model: Tiny) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def checkpointed(model: Tiny) -> nn.Module:
    model.up = checkpoint_wrapper(model.up)
    model.down = checkpoint_wrapper(model.down)
    return model


def adapted(model: Tiny) -> nn.Module:
    model.up = Adapted(model.up)  # type: ignore[assignment]
    model.down = Adapted(model.down)  # type: ignore[assignment]
    return Unwrapped("base_model", Unwrapped("model", model))


def tied(model: Tiny) -> nn.Module:
    model.head.weight = model.embed.weight
    return model


SETUPS: dict[str, Callable[[Tiny], nn.Module]] = {
    "compiled": compiled,
    "checkpointed": checkpointed,
    "adapted": adapted,
    "tied": tied,
}


@pytest.mark.parametrize("compact", [False, True], ids=["freeze", "compact"])
@pytest.mark.parametrize("setup", SETUPS)
def test_frozen_bits_stay_in_wrapped_models(setup: str, compact: bool) -> None:
    masks = some_masks(Tiny())
    if setup == "tied":
        del masks["embed.weight"]  # its other name will do
    model = SETUPS[setup](Tiny())
    expected: Masks = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if setup == "tied" and plain == "embed.weight":
            plain = "head.weight"
        every = torch.ones(parameter.shape, dtype=torch.bool)  # adapters are all trained
        expected[name] = every if "lora_" in name else masks[plain]
    assert len(expected) >= len(masks)
    before = all_bits(model)
    missing = "train" if setup == "adapted" else "error"
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer: optim.Optimizer
    if compact:
        optimizer = SubnetworkOptimizer(optim.AdamW, model, masks, missing=missing, **options)
    else:
        optimizer = optim.AdamW(model.parameters(), **options)
        freeze_unmasked(model, optimizer, masks, missing=missing)
    train(model, optimizer)
    check(model, before, expected)


def test_wrappers_do_not_change_what_is_learnt() -> None:
    bare = Tiny()
    masks = some_masks(bare)
    wrapped = checkpointed(Tiny())
    for model in (bare, wrapped):
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        freeze_unmasked(model, optimizer, masks)
        train(model, optimizer)
    assert all(map(torch.equal, all_bits(bare).values(), all_bits(wrapped).values()))
