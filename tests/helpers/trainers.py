"""A language model and a tokenizer, tiny and made here, for tests with trainers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training_support import Masks, all_bits
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

#: PEFT and TRL use names that transformers has renamed
foreign_warnings = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
)
WORDS = [f"w{number}" for number in range(28)]


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """Two layers with grouped heads; its embedding is not its head unless it is told so."""
    torch.manual_seed(11)
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**settings | options)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] = -0.0
    return model


def saved_llama(folder: Path) -> LlamaForCausalLM:
    """The same, from a folder: some trainers load the model that they compare with from there."""
    tiny_llama().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def some_masks(model: torch.nn.Module, density: float = 0.3) -> Masks:
    """Some elements of each parameter."""
    random = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(parameter.shape, generator=random) < density
        for name, parameter in model.named_parameters()
    }


def check(before: Masks, model: torch.nn.Module, masks: Masks, least: float = 0.5) -> None:
    """Frozen bits are as before; most of the masked ones are not."""
    moved = {name: after != before[name] for name, after in all_bits(model).items()}
    assert moved.keys() == masks.keys()
    for name, mask in masks.items():
        assert not moved[name][~mask].any(), f"{name}: a frozen element changed"
    marked = torch.cat([moved[name][mask] for name, mask in masks.items()])
    assert marked.float().mean() > least, "the masked elements move"
