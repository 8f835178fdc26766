"""The code in docs/sync.md is run, with a tiny model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from weight_streams import read_model

pytestmark = trainers.foreign_warnings
PAGE = Path(__file__).parents[2] / "docs" / "sync.md"


def follows(local: Path, code: str, model: Any) -> int:
    """Run the reader; whether it has come to the model's weights. Gives the version."""
    here: dict[str, Any] = {}
    exec(code, here)
    found, state = read_model(local), model.state_dict()
    for name, (_, _, data) in found.items():
        assert data == state[name].bfloat16().view(torch.uint8).numpy().tobytes(), name
    return int(here["version"])


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, trl, reader = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    model = trainers.tiny_llama()
    LlamaForCausalLM.from_pretrained(
        trainers.saved_llama(tmp_path / "f32").name_or_path, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("base", "local")
    tokens = torch.arange(32).view(4, 8)
    here: dict[str, Any] = {
        "model": model,
        "batches": [{"input_ids": tokens, "labels": tokens}] * 3,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
    }
    exec(plain, here)
    assert here["done"].version == 3
    assert 0 < here["done"].density <= 1
    assert follows(tmp_path / "local", reader, model) == 3
    arguments = SFTConfig("out", max_steps=2, use_cpu=True, report_to=[], bf16=False)
    here |= {
        "SFTTrainer": SFTTrainer,
        "tokenizer": trainers.tokenizer(),
        "dataset": Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 4}),
        "args": arguments,
    }
    made = "processing_class=tokenizer, train_dataset=dataset"
    code = trl.replace("train_dataset=dataset", made).replace('SFTConfig(output_dir="out")', "args")
    exec(code, here)
    assert follows(tmp_path / "local", reader, model) == 5
