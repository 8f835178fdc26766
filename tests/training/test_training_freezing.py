"""freeze_unmasked: frozen elements keep their bits, masked ones move, whatever steps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from training_support import (
    ANY,
    DTYPES,
    NOT_IN_BFLOAT16,
    STEPS,
    Tiny,
    all_bits,
    check,
    loss_of,
    one_thread,
    some_masks,
    train,
)

import ckdiff
from ckdiff.training import Freeze, SubnetworkOptimizer, freeze_unmasked

__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name in ANY
        for dtype in DTYPES
        if (name, dtype) not in NOT_IN_BFLOAT16
    ],
)
def test_any_optimizer_leaves_frozen_bits(name: str, dtype: torch.dtype) -> None:
    if name == "nested":  # torch patches a class when it is first used: both are now
        optim.AdamW([nn.Parameter(torch.zeros(1))])
    model = Tiny(dtype)
    masks, before = some_masks(model), all_bits(model)
    optimizer = ANY[name](list(model.parameters()))
    freeze = freeze_unmasked(model, optimizer, masks)
    train(model, optimizer)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        if id(parameter) not in stepped:
            masks[key] = torch.zeros_like(masks[key])
    check(model, before, masks)
    assert not freeze._kept, "nothing is kept between steps"


def test_without_it_they_would_change() -> None:
    model = Tiny()
    masks, before = some_masks(model), all_bits(model)
    train(model, optim.AdamW(model.parameters(), lr=0.01), 2)
    with pytest.raises(AssertionError, match="a frozen element changed"):
        check(model, before, masks)


def test_resumed_dense_state_infinite_gradients_and_schedules() -> None:
    model = Tiny()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer, 3)
    masks, before = some_masks(model), all_bits(model)
    resumed = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    freeze_unmasked(model, resumed, masks)
    schedule = optim.lr_scheduler.CosineAnnealingLR(resumed, 60)
    for step in range(STEPS):
        resumed.zero_grad()
        loss_of(model, step).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad[~masks[name]] = (float("inf"), float("nan"))[step % 2]
        resumed.step()
        schedule.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    check(model, before, masks)


def test_the_masked_elements_learn_as_if_the_rest_were_constants() -> None:
    model, other = Tiny(), Tiny()
    masks = some_masks(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    freeze_unmasked(model, optimizer, masks)
    train(model, optimizer)
    start = [p.detach().clone() for p in other.parameters()]
    by_hand = optim.AdamW(other.parameters(), lr=0.01)
    for step in range(STEPS):
        by_hand.zero_grad()
        loss_of(other, step).backward()
        by_hand.step()
        with torch.no_grad():
            for p, mask, old in zip(other.parameters(), masks.values(), start, strict=True):
                p.copy_(torch.where(mask, p, old))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_sparse_gradients() -> None:
    model = Tiny(sparse=True)
    masks, before = some_masks(model), all_bits(model)
    optimizer = optim.SparseAdam([model.embed.weight], lr=0.01)
    freeze_unmasked(model, optimizer, masks)
    train(model, optimizer)
    check(model, before, {k: m & (k == "embed.weight") for k, m in masks.items()})


def test_gradients_are_masked_early_on_request() -> None:
    model = Tiny()
    masks = some_masks(model)
    freeze = freeze_unmasked(model, optim.SGD(model.parameters(), lr=0.1), masks)
    compact = SubnetworkOptimizer(optim.SGD, model, masks, lr=0.1)
    for masker in (freeze, compact):
        loss_of(model, 0).backward()
        masker.mask_gradients()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert not parameter.grad[~masks[name]].any()
            assert parameter.grad[masks[name]].any() or not masks[name].any()


def test_remove_lets_go_and_a_failed_step_does_not() -> None:
    model = Tiny()
    masks, before = some_masks(model), all_bits(model)
    optimizer = optim.LBFGS(model.parameters(), lr=0.1)
    freeze = freeze_unmasked(model, optimizer, masks)
    assert repr(freeze).endswith("elements held still>")
    assert freeze.frozen == sum(int((~mask).sum()) for mask in masks.values())
    assert freeze.elements == sum(mask.numel() for mask in masks.values())

    def failing() -> float:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(failing)
    train(model, optimizer, 1)
    check(model, before, masks)
    freeze.remove()
    with pytest.raises(ArithmeticError):
        optimizer.step(failing)
    with pytest.raises(AssertionError, match="a frozen element changed"):
        check(model, before, masks)


def test_parameters_added_later_are_refused() -> None:
    model = Tiny()
    optimizer = optim.SGD([model.up.weight], lr=0.1)
    freeze_unmasked(model, optimizer, some_masks(model))
    optimizer.add_param_group({"params": [model.down.weight]})
    with pytest.raises(ckdiff.UsageError, match="new parameters"):
        optimizer.step()


def test_an_optimizer_in_a_wrapper() -> None:
    class Wrapper:  # as Accelerate's, whose own hooks never run
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = Tiny()
    masks, before = some_masks(model), all_bits(model)
    optimizer = optim.AdamW(model.parameters())
    assert isinstance(freeze_unmasked(model, Wrapper(optimizer), masks), Freeze)  # type: ignore
    train(model, optimizer)
    check(model, before, masks)
    with pytest.raises(ckdiff.UsageError, match="not int"):
        freeze_unmasked(model, 3, masks)  # type: ignore[arg-type]
