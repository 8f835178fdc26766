"""What newcomers ask has its answer where a search for their words leads first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sentences import sentences, words

DOCS = Path(__file__).parents[2] / "docs"
HOW = (DOCS / "how-do-i.md").read_text("utf-8")
ANSWERS = re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", HOW, re.S | re.M)
#: what somebody types, and what the heading of the answer has in it
ASKED = {
    "compare attention weights only": "attention weights",
    "layers changed": "layers changed",
    "step 7 engine": "step 7",
    "trust store stranger": "stranger",
    "memory 405B": "405B",
    "70B long disk": "70B",
    "two models directory": "directory that has",
    "fail pull request": "pull request",
    "undo in place update": "Undo",
    "sparsity during training": "during training",
    "bfloat16 served": "served",
    "store older version 0.1.0": "older version",
    "not compared": "not compared",
    "LoRA adapter": "LoRA",
    "resume killed run": "killed",
    "publish every step": "every step",
    "train only mask": "weights of a mask",
    "vocabularies different sizes": "vocabularies",
    "GPU": "GPU",
    "compare two steps FSDP run": "FSDP",
    "weight version": "step 7",
    "read mask numpy": "numpy",
    "send colleague": "colleague",
    "how big store": "disk a store takes",
    "stop resume": "killed",
    "why unchanged 0 tensors identical": "identical",
    "exit codes": "exit codes",
    "Slurm cluster": "Slurm",
    "turn off colors progress": "Turn off",
    "model uploaded telemetry": "uploaded",
}


@pytest.mark.parametrize(("asked", "heading"), ASKED.items(), ids=lambda value: value[:40])
def test_a_question_finds_its_answer(asked: str, heading: str) -> None:
    found = [(title, text) for title, text in ANSWERS if heading in title]
    assert len(found) == 1, [title for title, _ in found]
    text = " ".join(found[0]).lower()
    assert [word for word in asked.lower().split() if word not in text] == []


@pytest.mark.parametrize(("title", "text"), ANSWERS, ids=[title[:40] for title, _ in ANSWERS])
def test_answers_are_short_and_lead_on(title: str, text: str) -> None:
    assert "```" in text or re.search(r"\]\([\w-]+\.md", text) or words(text) < 30, title
    assert sum(words(sentence) for sentence in sentences(text)) <= 90, title


def test_there_are_enough() -> None:
    assert len(ANSWERS) >= 30
    assert len({title for title, _ in ANSWERS}) == len(ANSWERS)


WORDS = [
    "density", "mask", "null", "lift", "binade", "layout", "chunk", "window", "shard", "digest",
    "manifest", "stream", "marker", "graft", "gate", "z", "ULP", "rule", "store", "delta",
    "coverage", "quantised",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_are_explained(word: str) -> None:
    glossary = (DOCS / "glossary.md").read_text("utf-8")
    assert re.search(rf"^{word}\n(?:\w.*\n)*  [A-Z]", glossary, re.M | re.I)


def test_a_lift_under_magnitude_is_explained() -> None:
    for page in ("glossary", "overlap"):
        text = " ".join((DOCS / f"{page}.md").read_text("utf-8").split())
        assert "lift of 1.3 under `magnitude` means" in text, page
