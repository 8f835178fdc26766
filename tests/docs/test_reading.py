"""README and guides can be read: sentences are short."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentences import sentences, words

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST, AVERAGE = 45, 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    found = [(words(sentence), sentence) for sentence in sentences(page.read_text("utf-8"))]
    assert [sentence for count, sentence in found if count > LONGEST] == []
    if found:
        assert sum(count for count, _ in found) / len(found) <= AVERAGE


def test_sentences_are_found() -> None:
    text = "# No\n\nOne two. Three `four five` six: seven.\n\n- [Eight](x.md) nine\n\n| no | no |\n"
    assert [words(s) for s in sentences(text)] == [2, 3, 1, 2]
