"""Projections that are fused on one side only: the masks are joined or cut where the names tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mask_stores
import numpy as np
import pytest
import torch
from torch import nn, optim
from training_support import Masks, all_bits, check, one_thread

import ckdiff
from ckdiff.training import SubnetworkOptimizer, freeze_unmasked, parameter_masks

__all__ = ["one_thread"]  # a fixture

HIDDEN, QUERY, KEY, INNER = 8, 12, 4, 10  # grouped queries: fewer rows of k and v
ROWS = {"qkv_proj": (QUERY, KEY, KEY), "gate_up_proj": (INNER, INNER)}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
STEPS = 50


class Attention(nn.Module):
    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        add(self, "qkv_proj", fused, bias)
        self.o_proj = nn.Linear(QUERY, HIDDEN, bias=False)


class Mlp(nn.Module):
    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        add(self, "gate_up_proj", fused, bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)


def add(module: nn.Module, name: str, fused: bool, bias: bool) -> None:
    """The projections ``name`` stands for, as one module or as several."""
    rows = {name: sum(ROWS[name])} if fused else dict(zip(PARTS[name], ROWS[name], strict=True))
    for part, count in rows.items():
        module.add_module(part, nn.Linear(HIDDEN, count, bias=bias))


def project(module: nn.Module, name: str, x: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(module, name):
        return list(getattr(module, name)(x).split(ROWS[name], dim=-1))
    return [getattr(module, part)(x) for part in PARTS[name]]


class Layer(nn.Module):
    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(fused, bias), Mlp(fused, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = project(self.self_attn, "qkv_proj", x)
        heads = torch.cat([k, v, k], -1)
        x = x + self.self_attn.o_proj(torch.tanh(q) * heads)
        gate, up = project(self.mlp, "gate_up_proj", x)
        return x + self.mlp.down_proj(torch.tanh(gate) * up)


class Model(nn.Module):
    def __init__(self, fused: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Layer(fused, bias) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def masks_of(model: nn.Module) -> Masks:
    random = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=random) < 0.4 for n, p in model.named_parameters()}


def fuse(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors under fused names: the slow, obvious twin."""
    fused = dict(tensors)
    for name in tensors:
        for whole, parts in PARTS.items():
            if f".{parts[0]}." in name:
                names = [name.replace(parts[0], part) for part in parts]
                joined = torch.cat([tensors[part] for part in names])
                fused[name.replace(parts[0], whole)] = joined
                for part in names:
                    del fused[part]
    return fused


def run(model: nn.Module, optimizer: optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.sin(torch.arange(5.0 * HIDDEN) * (step + 1)).view(5, HIDDEN)
        (model(x) - 3).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_model_takes_the_masks_of_a_split_one_and_the_other_way_round(bias: bool) -> None:
    split, fused = Model(False, bias), Model(True, bias)
    masks = masks_of(split)
    joined = fuse(masks)
    assert joined.keys() == dict(fused.named_parameters()).keys()
    found = parameter_masks(fused, masks)
    assert found.keys() == joined.keys()
    assert all(torch.equal(found[name], joined[name]) for name in joined)
    found = parameter_masks(split, joined)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)


def test_training_is_the_same_whichever_side_is_fused() -> None:
    split, fused = Model(False), Model(True)
    fused.load_state_dict(fuse(split.state_dict()))
    masks = masks_of(split)
    before, fused_before = all_bits(split), all_bits(fused)
    optimizer = optim.AdamW(fused.parameters(), lr=0.01, weight_decay=0.1)
    freeze_unmasked(fused, optimizer, masks)
    run(fused, optimizer)
    check(fused, fused_before, fuse(masks))
    run(split, SubnetworkOptimizer(optim.AdamW, split, fuse(masks), lr=0.01, weight_decay=0.1))
    check(split, before, masks)
    after = fuse(split.state_dict())  # products of other shapes are rounded in another way
    for name, weight in fused.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_stores_and_wrapped_names(tmp_path: Path, fused: bool) -> None:
    masks = masks_of(Model(False))
    model = Model(fused)
    stored = masks if fused else fuse(masks)
    base = {
        f"model.{name}": ("F32", tuple(mask.shape), np.zeros(mask.shape, np.uint32))
        for name, mask in stored.items()
    }
    flags = {f"model.{name}": mask.numpy() for name, mask in stored.items()}
    store = mask_stores.make_store(tmp_path / "run.zarr", base, flags)
    expected = fuse(masks) if fused else masks
    found = parameter_masks(torch.compile(model, backend="eager"), store)  # type: ignore[arg-type]
    assert len(found) == len(expected)
    assert all(torch.equal(found[f"_orig_mod.{name}"], expected[name]) for name in expected)


def words(model: nn.Module, masks: Masks, **options: Any) -> str:
    with pytest.raises(ckdiff.PairingError) as caught:
        parameter_masks(model, masks, **options)
    return caught.value.one_line()


def test_shapes_must_add_up() -> None:
    name = "layers.1.self_attn.v_proj.weight"
    masks = masks_of(Model(False))
    masks[name] = torch.ones(KEY + 1, HIDDEN, dtype=torch.bool)
    text = words(Model(True), masks)
    assert "layers.1.self_attn.qkv_proj.weight is [20, 8] in the model, q_proj, k_proj," in text
    assert "v_proj are [12, 8], [4, 8], [5, 8] in the masks" in text
    assert "layers.0" not in text
    assert "without a parameter" not in text
    masks = fuse(masks_of(Model(False)))
    masks["layers.0.mlp.gate_up_proj.bias"] = torch.ones(21, dtype=torch.bool)
    text = words(Model(False), masks)
    assert "gate_up_proj.bias is [21] in the masks, gate_proj, up_proj are [10], [10]" in text


def test_all_parts_must_be_there() -> None:
    masks = masks_of(Model(False))
    del masks["layers.0.self_attn.k_proj.weight"]
    text = words(Model(True), masks, missing="freeze")
    assert "layers.0.self_attn.qkv_proj.weight: no mask of k_proj for q_proj, v_proj" in text
    model = Model(False)
    model.layers[0].self_attn.k_proj = nn.Identity()  # type: ignore[union-attr]
    text = words(model, fuse(masks_of(Model(False))))
    assert "the mask layers.0.self_attn.qkv_proj.weight: no parameter k_proj" in text
    del masks["layers.0.self_attn.q_proj.weight"], masks["layers.0.self_attn.v_proj.weight"]
    assert "layers.0.self_attn.qkv_proj.weight: no mask (missing=" in words(Model(True), masks)


@pytest.mark.parametrize(
    "name", ["attn.c_attn", "attention.query_key_value", "attn.qkv_proj", "attn.Wqkv"]
)
def test_other_fused_names_are_not_guessed(name: str) -> None:
    model = Model(False)
    masks = fuse(masks_of(model))
    for layer in (0, 1):
        for kind in ("weight", "bias"):
            mask = masks.pop(f"layers.{layer}.self_attn.qkv_proj.{kind}")
            masks[f"layers.{layer}.{name}.{kind}"] = mask
    text = words(model, masks)
    assert f"layers.0.{name}.weight: in which order it holds its parts cannot be told" in text
    assert "q_proj.weight" in text


def test_stacked_experts_are_not_guessed() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Module()])})
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
    model["layers"][0].add_module("experts", experts)  # type: ignore[index]
    ones = torch.ones(3, 4, dtype=torch.bool)
    parts = [f"layers.0.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up")]
    text = words(model, dict.fromkeys(parts, ones))
    assert "layers.0.experts.gate_up_proj: in which order" in text
