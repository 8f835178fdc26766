"""Every command that a page shows is one: it parses, with the options that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from commands import commands

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(?:console|bash|sh)\n(.*?)^```", re.S | re.M)
#: what stands for something in a line that is not for copying
_NOT_COPIED = re.compile(r"\.\.\.|…|\[-|[A-Z]{3,}|<|\$\(")


def lines() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in _BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\||[|;>]", line.split(" #")[0]):
                    if part.strip().startswith("ckdiff ") and not _NOT_COPIED.search(part):
                        yield page.name, part.strip()


LINES = sorted(set(lines()))


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: value[:60])
def test_it_parses(page: str, line: str) -> None:
    _, *words = shlex.split(line)
    while words and words[0].startswith("-"):
        words.pop(0)
    if not words:
        return
    name, *arguments = words
    assert name in commands(), line
    command = commands()[name]
    if "--help" in arguments:
        return
    with command.make_context(name, list(arguments)) as context:
        assert isinstance(context, click.Context)


def test_there_are_lines() -> None:
    assert len(LINES) > 80
