"""docs/architecture.md says where things are, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_lead_somewhere(page: Path) -> None:
    spans = re.findall(r"`((?:ckdiff|tests|docs)/[^`\s]*)`", page.read_text("utf-8"))
    assert len(spans) > 5
    missing = [span for span in spans if not (ROOT / span).exists() and "NAME" not in span]
    assert missing == []


def test_every_room_is_on_the_page() -> None:
    text = PAGES[0].read_text("utf-8")
    rooms = [path.parent.name for path in (ROOT / "ckdiff").glob("*/__init__.py")]
    assert [room for room in rooms if f"`ckdiff/{room}/`" not in text] == []


def test_what_is_marked_slow_exists() -> None:
    from conftest import SLOW

    text = {path.stem: path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [
        f"{file}::{name}"
        for file, names in SLOW.items()
        for name in names.split()
        if f"def {name}(" not in text.get(file, "")
    ]
    assert missing == []
