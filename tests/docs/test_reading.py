"""README and all pages can be read: sentences are short, and say it as one would say it aloud."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sentences import sentences, words

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST, AVERAGE = 45, 25
#: what readers had to read twice
RIDDLES = re.compile(
    r"\b(anew|passed over|held against|(?:is|are) said|of ours|that are ours|is meant|such "
    r"ones|as it lies|where it lies|what lies|what nobody|in silence|without a word|"
    r"(?:that|which) (?:is|are) no (?!longer|more|less|worse))\b"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    found = [(words(sentence), sentence) for sentence in sentences(page.read_text("utf-8"))]
    assert [sentence for count, sentence in found if count > LONGEST] == []
    if found:
        assert sum(count for count, _ in found) / len(found) <= AVERAGE


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "paper.md"],
    ids=lambda page: page.name,
)
def test_nothing_is_a_riddle(page: Path) -> None:
    text = " ".join(page.read_text("utf-8").split())
    found = [text[max(0, m.start() - 60) : m.end() + 20] for m in RIDDLES.finditer(text)]
    assert found == []


def test_sentences_are_found() -> None:
    text = "# No\n\nOne two. Three `four five` six: seven.\n\n- [Eight](x.md) nine\n\n| no | no |\n"
    text += "\n    n = o\n"
    assert [words(s) for s in sentences(text)] == [2, 3, 1, 2]
