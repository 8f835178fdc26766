"""The picture of a terminal in the README is what the command prints now."""

from __future__ import annotations

import html
import importlib.util
import re
from typing import Any

from source import ROOT

PROGRAM = ROOT / "examples/tiny_rl/terminal.py"


def program() -> Any:
    spec = importlib.util.spec_from_file_location("terminal", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(picture: str) -> list[str]:
    """The texts of an SVG, in order."""
    return [html.unescape(text) for text in re.findall(r">([^<>\n]+)</text>", picture)]


def test_the_terminal_shows_what_is_printed() -> None:
    terminal = program()
    picture = terminal.PICTURE.read_text("utf-8")
    again = f"python {PROGRAM.relative_to(ROOT)} makes it again"
    assert words(terminal.drawn(terminal.printed())) == words(picture), again
    assert any("160,573" in text for text in words(picture))
    # it must look the same wherever it is shown
    assert "url(http" not in picture
    assert "@font-face" not in picture
