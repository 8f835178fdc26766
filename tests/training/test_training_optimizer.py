"""SubnetworkOptimizer: the same weights as the dense optimizer frozen, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn, optim
from training_support import (
    DTYPES,
    NOT_IN_BFLOAT16,
    STEPS,
    Masks,
    Rogue,
    Tiny,
    all_bits,
    check,
    loss_of,
    matrices,
    one_thread,
    some_masks,
    train,
)

import ckdiff
from ckdiff.training import SubnetworkOptimizer, freeze_unmasked

__all__ = ["one_thread"]  # a fixture

COMPACT: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd-fused": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-foreach": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adamw-fused": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "adadelta": (optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adagrad-fused": (optim.Adagrad, {"lr": 0.05, "fused": True}),
    "adamax": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
    "asgd": (optim.ASGD, {"lr": 0.1, "weight_decay": 0.1}),
    "nadam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "radam": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "rprop": (optim.Rprop, {"lr": 0.01}),
}


def exact(name: str, dtype: torch.dtype, width: int) -> bool:
    """Torch's CPU kernels round what is left over after full vectors differently in bfloat16 and
    when fused: there a dense step depends on where in a tensor an element is, unless the tensor's
    size is a multiple of 64."""
    return width % 64 == 0 or (dtype == torch.float32 and not name.endswith("fused"))


CASES = [
    pytest.param(name, dtype, width, id=f"{name}-{str(dtype)[6:]}-{width}")
    for name in COMPACT
    for dtype in DTYPES
    for width in (37, 64)
    if exact(name, dtype, width) and (name, dtype) not in NOT_IN_BFLOAT16
]


@pytest.mark.parametrize(("name", "dtype", "width"), CASES)
def test_compact_equals_frozen_bit_for_bit(name: str, dtype: torch.dtype, width: int) -> None:
    kind, options = COMPACT[name]
    dense, small = Tiny(dtype, width=width), Tiny(dtype, width=width)
    masks, before = some_masks(dense), all_bits(dense)
    optimizer = kind(dense.parameters(), **options)
    freeze_unmasked(dense, optimizer, masks)
    train(dense, optimizer)
    compact = SubnetworkOptimizer(kind, small, masks, **options)
    train(small, compact)
    check(small, before, masks)
    one, two = all_bits(dense), all_bits(small)
    differing = {key: int((one[key] != two[key]).sum()) for key in one}
    assert differing == dict.fromkeys(one, 0)


def test_compact_groups_schedules_and_missing_gradients() -> None:
    def groups(model: Tiny) -> list[dict[str, Any]]:
        flat = [p for p in model.parameters() if p.ndim == 1]
        return [
            {"params": matrices(list(model.parameters())), "weight_decay": 0.1},
            {"params": flat, "lr": 0.003},
        ]

    dense, small = Tiny(), Tiny()
    masks, before = some_masks(dense), all_bits(dense)
    usual = optim.AdamW(groups(dense), lr=0.01)
    freeze_unmasked(dense, usual, masks)
    compact = SubnetworkOptimizer(optim.AdamW, small, masks, params=groups(small), lr=0.01)
    assert [group["weight_decay"] for group in compact.param_groups] == [0.1, 0.01]
    assert compact.masked == sum(int(mask.sum()) for mask in masks.values())
    for model, optimizer in ((dense, usual), (small, compact)):
        schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss_of(model, step).backward()
            if step % 3 == 0:
                model.up.weight.grad = None  # left out of this step
            optimizer.step()
            schedule.step()
    check(small, before, masks)
    assert all(map(torch.equal, all_bits(dense).values(), all_bits(small).values()))


def test_compact_state_is_small_and_none_is_kept_of_the_rest() -> None:
    model = Tiny(width=64)
    masks = {name: torch.zeros_like(mask) for name, mask in some_masks(model).items()}
    masks["up.weight"].view(-1)[100:164] = True
    optimizer = SubnetworkOptimizer(optim.Adam, model, masks, lr=0.01)
    train(model, optimizer)
    sizes = [
        value.numel()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert sizes == [64, 64]
    step = optimizer.step(lambda: 7.0)
    assert step == 7.0


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adagrad, optim.ASGD])
def test_compact_resumes_from_its_state_dict(kind: type[optim.Optimizer]) -> None:
    one, two = Tiny(), Tiny()
    masks, before = some_masks(one), all_bits(one)
    whole = SubnetworkOptimizer(kind, one, masks, lr=0.02)
    optim.lr_scheduler.StepLR(whole, 1)
    whole.param_groups[0]["lr"] = 0.01
    train(one, whole)
    file = io.BytesIO()
    torch.save([whole.state_dict(), one.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)

    two.load_state_dict(weights)
    wrapped = nn.ModuleDict({"module": two})  # names may change, masks may not
    resumed = SubnetworkOptimizer(kind, wrapped, masks, lr=0.02)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.01
    assert resumed.param_groups[0]["initial_lr"] == 0.02
    train(one, whole, 5)
    train(two, resumed, 5)
    assert all(map(torch.equal, all_bits(one).values(), all_bits(two).values()))
    check(two, before, masks)

    other = SubnetworkOptimizer(kind, two, some_masks(two, seed=1), lr=0.02)
    with pytest.raises(ckdiff.UsageError, match=r"another mask of embed\.weight"):
        other.load_state_dict(state)
    fewer = SubnetworkOptimizer(kind, two, masks, params=[two.up.weight], lr=0.02)
    with pytest.raises(ckdiff.UsageError, match="for 7 parameters, the optimizer has 1"):
        fewer.load_state_dict(state)
    with pytest.raises(ckdiff.UsageError, match="not the state of a SubnetworkOptimizer"):
        other.load_state_dict(kind(two.parameters(), lr=0.02).state_dict())


def test_compact_survives_a_copy() -> None:
    model = Tiny()
    optimizer = SubnetworkOptimizer(optim.AdamW, model, some_masks(model), lr=0.01)
    optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(other, twin, 2)
    assert all(map(torch.equal, all_bits(model).values(), all_bits(other).values()))


def test_compact_on_weights_that_are_not_contiguous() -> None:
    dense, small = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    small.load_state_dict(dense.state_dict())
    small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not small.weight.is_contiguous()
    masks, before = some_conv_masks(small), all_bits(small)
    optimizers = [optim.AdamW(dense.parameters()), None]
    freeze_unmasked(dense, optimizers[0], masks)  # type: ignore[arg-type]
    optimizers[1] = SubnetworkOptimizer(optim.AdamW, small, masks)
    for step in range(STEPS):
        images = torch.sin(torch.arange(75.0) * (step + 1)).view(1, 3, 5, 5)
        for model, optimizer in zip((dense, small), optimizers, strict=True):
            assert optimizer is not None
            model.zero_grad()
            model(images).square().sum().backward()
            small.weight.grad = None if dense.weight.grad is None else dense.weight.grad.clone()
            small.bias.grad = None if dense.bias.grad is None else dense.bias.grad.clone()  # type: ignore
            optimizer.step()
    check(small, before, masks)
    assert all(map(torch.equal, all_bits(dense).values(), all_bits(small).values()))


def some_conv_masks(model: nn.Module) -> Masks:
    random = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=random) < 0.4 for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optimizer_class": optim.LBFGS}, "LBFGS cannot be made compact"),
        ({"optimizer_class": Rogue}, "Rogue cannot be made compact"),
        ({"optimizer_class": 3}, "must be a class"),
        ({"model": 3}, "must be a torch.nn.Module, not int"),
        ({"params": []}, "at least one"),
        ({"params": ["up.weight"]}, "the model's parameters"),
        ({"rule": "exact"}, "have no rules"),
        ({"missing": "ignore"}, "missing cannot be 'ignore'"),
        ({"store": {"up.weight": torch.ones(37, 12)}}, "not torch.float32 Tensor"),
        ({"store": {"up.weight": [True]}}, "not list"),
        ({"store": {3: torch.ones(1) > 0}}, "must be text"),
        ({"store": 3}, "must be a path"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: dict[str, Any], words: str) -> None:
    model = Tiny()
    usual: dict[str, Any] = {
        "optimizer_class": optim.SGD,
        "model": model,
        "store": some_masks(model),
        "lr": 0.1,
    }
    with pytest.raises(ckdiff.UsageError, match=words.replace(".", r"\.")):
        SubnetworkOptimizer(**usual | arguments)


def test_compact_refuses_what_it_cannot_do() -> None:
    model = Tiny(sparse=True)
    optimizer = SubnetworkOptimizer(optim.SGD, model, some_masks(model), lr=0.1)
    with pytest.raises(ckdiff.UsageError, match="sparse gradient"):
        train(model, optimizer, 1)
    with pytest.raises(ckdiff.PairingError, match="not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
