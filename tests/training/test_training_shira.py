"""A mask as a PEFT adapter: base weights rest, merging changes masked elements only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from training_support import Masks, all_bits, one_thread

import ckdiff
from ckdiff.training import load_shira, to_shira

pytestmark = [
    trainers.foreign_warnings,
    # PEFT makes sparse tensors, and writes the base's output layer where that has an adapter
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
__all__ = ["one_thread"]  # a fixture
STEPS = 50


def linear_masks(model: nn.Module, density: float = 0.3) -> Masks:
    """Masks for every parameter that mark some of linear layers, and nothing of one of them."""
    masks = trainers.some_masks(model, density)
    for name, mask in masks.items():
        if "proj" not in name and name != "lm_head.weight":
            mask[:] = False
    masks["model.layers.1.self_attn.k_proj.weight"][:] = False
    return masks


def train(model: nn.Module, steps: int = STEPS) -> None:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2
    )
    for step in range(steps):
        tokens = (torch.arange(12).view(2, 6) * 5 + step) % 32
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_save_load_merge(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trainers.tiny_llama().to(dtype)
    masks = linear_masks(model)
    before = all_bits(model)
    untouched = outputs(model)
    adapted = to_shira(model, masks, task_type="CAUSAL_LM")
    assert torch.equal(outputs(adapted), untouched), "the adapter begins as nothing"
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) == sum(int(mask.sum()) for mask in masks.values())
    train(adapted.train())
    rested = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): value
        for name, value in all_bits(adapted).items()
        if "shira_weight" not in name
    }
    assert rested.keys() == before.keys()
    assert all(torch.equal(rested[name], value) for name, value in before.items())

    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="size mismatch"):  # why load_shira is there
        PeftModel.from_pretrained(trainers.tiny_llama().to(dtype), tmp_path / "adapter")
    expected = outputs(adapted)
    assert not torch.equal(expected, untouched)
    loaded = load_shira(trainers.tiny_llama().to(dtype), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    merged = loaded.merge_and_unload()
    trainers.check(before, merged, masks, least=0.8 if dtype == torch.float32 else 0.1)
    assert torch.equal(outputs(merged), expected)


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    masks = linear_masks(trainers.tiny_llama())
    adapted = to_shira(trainers.tiny_llama(), masks)
    train(adapted, 5)
    adapted.save_pretrained(tmp_path)
    loaded = load_shira(trainers.tiny_llama(), tmp_path, is_trainable=True)
    train(adapted, 5)
    train(loaded, 5)
    assert torch.equal(outputs(loaded), outputs(adapted))
    again = tmp_path / "again"
    loaded.save_pretrained(again, save_embedding_layers=False)
    names = load_file(again / "adapter_model.safetensors")
    assert all("shira" in name for name in names)
    assert torch.equal(outputs(load_shira(trainers.tiny_llama(), again)), outputs(adapted))


def test_names_that_end_alike_are_kept_apart() -> None:
    """PEFT takes a target for the end of a name; here each is the whole of one."""
    model = nn.ModuleDict(
        {
            "up": nn.Linear(4, 6),
            "block": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}),
        }
    )
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["up.weight"][1, 2] = True
    adapted = to_shira(model, masks)
    found = [name for name, _ in adapted.named_parameters() if "shira" in name]
    assert found == ["base_model.model.up.shira_weight.default"]
    assert adapted.base_model.model["up"].shira_indices["default"].tolist() == [[1], [2]]


def complaint(model: nn.Module, masks: Any, **options: Any) -> str:
    with pytest.raises(ckdiff.CkdiffError) as caught:
        to_shira(model, masks, **options)
    assert not any("shira" in name for name, _ in model.named_parameters()), "nothing was changed"
    return caught.value.one_line()


def test_what_is_not_a_linear_weight() -> None:
    model = trainers.tiny_llama()
    masks = trainers.some_masks(model)
    text = complaint(model, masks)
    assert "model.embed_tokens.weight" in text
    assert "model.layers.0.input_layernorm.weight" in text
    assert "proj" not in text
    assert "elsewhere='skip'" in text
    assert "elsewhere cannot be 'x'" in complaint(model, masks, elsewhere="x")
    adapted = to_shira(model, masks, elsewhere="skip")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 15
    assert all(
        name.endswith(("proj.shira_weight.default", "lm_head.shira_weight.default"))
        for name in trained
    )


def test_tied_weights_are_not_adapted() -> None:
    model = trainers.tiny_llama(tie_word_embeddings=True)
    masks = linear_masks(model)
    masks["model.embed_tokens.weight"][3] = True
    text = complaint(model, masks)
    assert "cannot train model.embed_tokens.weight:" in text


def test_attention_whose_output_layer_is_never_called() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 1)})
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    assert "attention.out_proj.weight" in complaint(model, masks)
    assert "one input or output: up" in complaint(model, masks, elsewhere="skip")
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    masks = {"norm.weight": torch.ones(4, dtype=torch.bool)}
    text = complaint(model, masks, elsewhere="skip", missing="freeze")
    assert "mark nothing that SHiRA can train" in text
    assert "norm.bias: no mask" in complaint(model, masks)


def test_other_models_and_broken_files(tmp_path: Path) -> None:
    model = trainers.tiny_llama()
    to_shira(model, linear_masks(model)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    good = load_file(file)

    def refusal() -> str:
        base = trainers.tiny_llama(num_hidden_layers=1)
        with pytest.raises(ckdiff.CkdiffError) as caught:
            load_shira(base, tmp_path)
        assert not any("shira" in name for name, _ in base.named_parameters())
        return caught.value.one_line()

    assert "does not fit the model: model.layers.1." in refusal()
    one = "base_model.model.model.layers.0.mlp.up_proj.shira"
    positions = good[f"{one}_indices"].clone()
    positions[0, 0] = 24
    part = {f"{one}_indices": positions, f"{one}_weight": good[f"{one}_weight"]}
    save_file(part, file)
    assert "does not fit the model: model.layers.0.mlp.up_proj" in refusal()
    save_file({**part, f"{one}_weight": torch.zeros(3)}, file)
    assert "the indices and weights of" in refusal()
    positions[0, 0] = 0
    save_file({**part, "base_model.model.lm_head.base_layer.weight": torch.zeros(32, 16)}, file)
    assert "does not fit the model: lm_head.weight" in refusal()
    save_file({"more": torch.zeros(3)}, file)
    assert "holds no SHiRA" in refusal()
    file.write_bytes(b"\xff" * 100)
    assert "cannot be read" in refusal()
    config = tmp_path / "adapter_config.json"
    config.write_text('{"peft_type": "LORA"}')
    assert "not SHIRA" in refusal()
    config.write_text("{")
    assert "cannot be read" in refusal()
    config.unlink()
    assert "no adapter_config.json" in refusal()
