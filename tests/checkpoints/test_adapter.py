"""A base with a LoRA adapter merged into it, against PEFT's own ``merge_and_unload``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.views.adapter import AdapterView, adapt
from ckdiff.kernels.memory import bytes_at

pytestmark = pytest.mark.filterwarnings("ignore")  # of what PEFT and transformers ask each other

#: one model for each kind; wide enough for torch to use its matrix product
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    attention_bias=True,
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)

Tensors = Mapping[str, torch.Tensor]


def noise(model: nn.Module, seed: int = 1) -> None:
    """Weights unlike zero everywhere: also those that begin as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def train(base: nn.Module, config: LoraConfig, folder: Path) -> None:
    """A base and an adapter as people have them on disks."""
    noise(base)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = torch.Generator().manual_seed(len(name))
                parameter += 0.05 * torch.randn(parameter.shape, generator=seed)
    model.save_pretrained(folder / "adapter")


def merged_by_peft(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    base = kind.from_pretrained(folder / "base", dtype="auto")
    model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read(view: AdapterView, window: int = 1 << 12) -> dict[str, bytes]:
    """All tensors of a view, some bytes at a time."""
    found = {}
    with closing(view.reader()) as reader:
        for i, (name, size) in enumerate(
            zip(view.table.names, view.table.nbytes.tolist(), strict=True)
        ):
            data = b""
            for at in range(0, size, window):
                some = min(window, size - at)
                (address,) = reader.acquire(*(np.array([n]) for n in (i, at, some))).tolist()
                data += bytes_at(address, some).tobytes()
                reader.release()
            found[name] = data
    return found


def same(folder: Path, kind: Any, **options: int) -> AdapterView:
    """Fails unless the view is what PEFT makes, bit for bit; gives the view, closed."""
    expected = merged_by_peft(kind, folder)
    with adapt(open_checkpoint(folder / "base"), open_checkpoint(folder / "adapter")) as view:
        found = read(view, **options)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert view.table.shapes[view.table.names.index(name)] == tuple(tensor.shape)
            assert found[name] == bits(tensor), name
    return view


LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj", "up_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
        {"r": 1, "lora_alpha": 3, "target_modules": LINEAR},
        {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": LINEAR,
            "rank_pattern": {r"^model\.layers\.0\.self_attn\..*": 6, "down_proj": 3},
            "alpha_pattern": {r"layers\.\d+\.mlp\.(up|down)_proj": 5, "q_proj": 0.3},
        },
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "all"},
        {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
        {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
        {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
)
def test_llama(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    train(LlamaForCausalLM(LLAMA).to(dtype), LoraConfig(**options), tmp_path)
    view = same(tmp_path, LlamaForCausalLM)
    assert view.merged
    assert not view.in_files
    assert bool(view.replaced) == (
        "modules_to_save" in options
        or "bias" in options
        or ("embed_tokens" in options["target_modules"])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "c_fc"], ["c_attn"], ["wte", "c_proj"], ["c_proj"]]
)
def test_gpt2_whose_weights_are_transposed(
    tmp_path: Path, dtype: torch.dtype, targets: list[str]
) -> None:
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True)
    train(GPT2LMHeadModel(GPT2).to(dtype), config, tmp_path)
    same(tmp_path, GPT2LMHeadModel)


@pytest.mark.parametrize("rank", [64, 192, 200, 256, 400])
def test_ranks_for_which_torch_sums_in_runs(tmp_path: Path, rank: int) -> None:
    config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])
    train(LlamaForCausalLM(LLAMA), config, tmp_path)
    same(tmp_path, LlamaForCausalLM, window=1 << 20)
