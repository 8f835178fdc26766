"""The code in docs/monitor.md is run, with tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from datasets import Dataset
from training_support import one_thread
from trl import SFTConfig

import ckdiff
from ckdiff.training import UpdateMonitor

pytestmark = trainers.foreign_warnings
__all__ = ["one_thread"]  # a fixture
PAGE = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text("utf-8")


def blocks(title: str, language: str = "python") -> list[str]:
    """The code of a section."""
    (text,) = [
        part for part in re.split(r"^## ", PAGE, flags=re.M) if part.startswith(f"{title}\n")
    ]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plain_loop(folder: Path) -> None:
    llama = trainers.tiny_llama()

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama

        def forward(self, tokens: torch.Tensor) -> Any:
            return llama(tokens).logits.square().mean()

    model = Wrapped()
    here = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [torch.arange(6)[None]] * 200,
    }
    loop, look = blocks("A plain loop")
    exec(loop.replace(".loss.backward", ".backward"), here)
    exec(look, here)
    written = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [100, 200, 200]
    (shown,) = blocks("The log", "json")
    assert list(json.loads(shown)) == list(written[0])
    assert "self_attn.q_proj" in written[0]["modules"]


def test_trl() -> None:
    (code,) = blocks("Hugging Face Trainer and TRL")
    settings = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1}
    arguments = SFTConfig("out", save_strategy="no", disable_tqdm=True, **settings)
    tokens = Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 4})
    here: dict[str, Any] = {
        "model": trainers.tiny_llama(), "dataset": tokens, "arguments": arguments,
        "tokenizer": trainers.tokenizer(),
    }  # fmt: skip
    code = code.replace('SFTConfig(output_dir="out")', "arguments")
    exec(code.replace("=dataset", "=dataset, processing_class=tokenizer"), here)
    logged = {key for entry in here["trainer"].state.log_history for key in entry}
    for key in re.findall(r"^\| `(update/[\w./]+)` \|", PAGE, re.M):
        assert key in logged or key == "update/uncompared"


def test_rules_and_bases_that_are_named() -> None:
    model = torch.nn.Linear(3, 3)
    for rule in re.findall(r'rule="([^"]+)"', PAGE):
        assert UpdateMonitor(model, model.state_dict(), rule=rule).look().changed == 0
    for watch in re.findall(r'watch="([^"]+)"', PAGE):
        assert UpdateMonitor(model, watch=watch).look().elements == 12
    assert ckdiff.training.UpdateCallback.__doc__
