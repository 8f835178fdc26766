"""Which mask is whose: names that wrappers change, tied weights, what is said when none fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mask_stores
import numpy as np
import pytest
import torch
from torch import nn, optim
from training_support import (
    Tied,
    Tiny,
    Wrap,
    all_bits,
    check,
    one_thread,
    some_masks,
    train,
)

import ckdiff
from ckdiff.training import SubnetworkOptimizer, freeze_unmasked, parameter_masks

__all__ = ["one_thread"]  # a fixture


def test_tied_weights_count_once() -> None:
    model, mask = Tied(), torch.arange(24).view(6, 4) % 3 == 0
    for names in (["embed.weight"], ["lm_head.weight"], ["embed.weight", "lm_head.weight"]):
        found = parameter_masks(model, dict.fromkeys(names, mask))
        assert list(found) == ["embed.weight"]
        assert torch.equal(found["embed.weight"], mask)
    assert SubnetworkOptimizer(optim.SGD, model, found, lr=0.1).masked == 8
    with pytest.raises(ckdiff.PairingError, match="tied weights with different masks"):
        parameter_masks(model, {"embed.weight": mask, "lm_head.weight": ~mask})


@pytest.mark.parametrize("wrappers", [["module"], ["_orig_mod"], ["_orig_mod", "module", "model"]])
def test_wrapped_models_find_their_masks(wrappers: list[str]) -> None:
    bare = Tiny()
    masks = some_masks(bare)
    model: nn.Module = bare
    for wrapper in wrappers:
        model = Wrap(wrapper, model)
    found = parameter_masks(model, masks)
    assert all(map(torch.equal, found.values(), masks.values()))
    # the other way round: masks of a wrapped model
    found = parameter_masks(bare, found)
    assert found.keys() == masks.keys()


def test_inner_wrappers_and_compiled_models() -> None:
    model = Tiny()
    masks = some_masks(model)
    compiled = torch.compile(model, backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    assert len(parameter_masks(compiled, masks)) == len(masks)
    model.up = Wrap("base_layer", model.up)  # type: ignore[assignment]
    assert "up.base_layer.weight" in parameter_masks(model, masks)


def test_a_mask_that_does_not_fit_says_why() -> None:
    model = Tiny()
    masks = some_masks(model)

    def wrong(changes: dict[str, Any], **options: Any) -> str:
        given = {name: mask for name, mask in (masks | changes).items() if mask is not None}
        with pytest.raises(ckdiff.PairingError) as caught:
            parameter_masks(model, given, **options)
        return caught.value.one_line()

    ones = torch.ones(3, dtype=torch.bool)
    text = wrong({"up.bias": ones})
    assert "up.bias is [37] in the model and [3] in the masks" in text
    text = wrong({"up.bias": None, "norm.bias": None})
    assert "up.bias, norm.bias: no mask (missing='freeze'" in text
    assert "stray: a mask without a parameter" in wrong({"stray": ones}, missing="train")
    text = wrong({"up.bias": None, "model.up.bias": masks["up.bias"], "module.up.bias": ones})
    assert "up.bias: could be any of the masks model.up.bias, module.up.bias" in text
    assert "and 4 more: no mask" in wrong(dict.fromkeys(masks))
    stranger = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ckdiff.PairingError, match="1 of 1 parameters of the optimizer"):
        freeze_unmasked(model, stranger, masks)
    with pytest.raises(ckdiff.UsageError, match="meta device"):
        parameter_masks(Tiny().to("meta"), masks)


def test_two_parameters_never_share_a_mask() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "model": nn.ModuleDict()})
    model["model"]["a"] = nn.Linear(2, 2, bias=False)  # type: ignore[operator]
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert list(parameter_masks(model, {"a.weight": mask}, missing="freeze")) == [
        "a.weight",
        "model.a.weight",
    ]
    assert not parameter_masks(model, {"a.weight": mask}, missing="freeze")["model.a.weight"].any()
    with pytest.raises(ckdiff.PairingError, match="could be any of the masks module"):
        parameter_masks(model, {"module.a.weight": mask}, missing="freeze")


@pytest.mark.parametrize("missing", ["train", "freeze"])
def test_parameters_without_a_mask(missing: Any) -> None:
    dense, small = Tiny(), Tiny()
    masks, before = some_masks(dense), all_bits(dense)
    given = {"up.weight": masks["up.weight"], "scale": torch.zeros(3, dtype=torch.bool)}
    expected = {name: torch.full_like(mask, missing == "train") for name, mask in masks.items()}
    expected["up.weight"] = masks["up.weight"]
    optimizer = optim.AdamW(dense.parameters(), lr=0.01)
    freeze_unmasked(dense, optimizer, given, missing=missing)
    compact = SubnetworkOptimizer(optim.AdamW, small, given, missing=missing, lr=0.01)
    for model, stepped in ((dense, optimizer), (small, compact)):
        train(model, stepped)
        check(model, before, expected)
    assert all(map(torch.equal, all_bits(dense).values(), all_bits(small).values()))


def test_parameters_that_are_not_trained_need_no_mask() -> None:
    model = Tiny()
    model.requires_grad_(False)
    model.up.weight.requires_grad_(True)
    mask = some_masks(model)["up.weight"]
    assert list(parameter_masks(model, {"up.weight": mask})) == ["up.weight"]


def test_a_store_is_as_good_as_a_dict(tmp_path: Path) -> None:
    model, other = Tiny(), Tiny()
    masks = some_masks(model)
    base = {
        f"model.{name}": ("F32", tuple(p.shape), p.detach().numpy().copy().view(np.uint32))
        for name, p in model.named_parameters()
    }
    flags = {f"model.{name}": mask.numpy() for name, mask in masks.items()}
    store = mask_stores.make_store(tmp_path / "run.zarr", base, flags)
    found = parameter_masks(model, store)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    before = all_bits(model)
    compact = SubnetworkOptimizer(optim.AdamW, model, tmp_path / "run.zarr", rule="exact", lr=0.01)
    train(model, compact, 5)
    SubnetworkOptimizer(optim.AdamW, other, flags).load_state_dict(compact.state_dict())
    check(model, before, masks)
    with pytest.raises(ckdiff.UsageError, match="no mask for the rule"):
        parameter_masks(model, store, rule="atol=1e-5")
    with pytest.raises(ckdiff.StoreIncomplete):
        parameter_masks(model, tmp_path)
