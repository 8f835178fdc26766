"""The documentation of the command line: nothing is missing, and nothing in it is wrong."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from commands import command_names, commands, option_names
from source import ROOT

from ckdiff.cli import main


def sections() -> dict[str, str]:
    """docs/cli.md by command; what belongs to no command is under the empty name."""
    found = {"": ""}
    current = ""
    for line in (ROOT / "docs" / "cli.md").read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = re.match(r"#+ `?ckdiff ([a-z-]+)", line)
            current = heading[1] if heading else "" if line.startswith(("# ", "## ")) else current
        found[current] = found.get(current, "") + line + "\n"
    return found


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


@pytest.mark.parametrize("name", command_names())
def test_commands_and_their_options_are_documented(name: str) -> None:
    text = sections()
    assert name in text, f"docs/cli.md has no heading `## ckdiff {name}`"
    assert option_names(commands()[name]) - options_in(text[name] + text[""]) == set()


def test_documented_options_exist() -> None:
    known = {"--help", "-h", "--version"}
    known |= {name for command in commands().values() for name in option_names(command)}
    for name, text in sections().items():
        code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # held against click below
        spans = " ".join(re.findall(r"`([^`]*)`", code))
        assert {o for o in options_in(spans) if o.startswith("--")} - known == set(), name


def pages() -> list[Path]:
    listed = ["README.md", "examples/hub.md"]
    return [*(ROOT / name for name in listed), *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every ``ckdiff`` command in a page's shell blocks."""
    for block in re.findall(r"^```(?:console|bash|sh|shell)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.commenters = "#"
            lexer.whitespace_split = True  # tcp://host:8786 is one word
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;<>()"):  # where the shell ends a command
                    if words[:1] == ["ckdiff"]:
                        yield words[1:]
                    words = []
                else:
                    words.append(word)


def parse(arguments: list[str]) -> None:
    """Have click parse a command line without running it; raises click.UsageError."""
    name, *rest = arguments
    command: click.Command = main
    if not name.startswith("-"):
        if name not in commands():
            raise click.UsageError(f"no command {name}")
        command, arguments = commands()[name], rest
    with contextlib.suppress(click.exceptions.Exit):  # --help, --version
        command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_command_lines_are_valid(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in command_lines(page.read_text("utf-8")):
        try:
            parse(arguments)
        except click.UsageError as error:
            pytest.fail(f"ckdiff {shlex.join(arguments)}: {error.format_message()}")


def test_wrong_command_lines_would_be_noticed() -> None:
    text = (
        "```console\n$ ckdiff diff a b --nonsense | less # why\nls; ckdiff show x --by=layer\n```\n"
    )
    first, second = command_lines(text)
    assert first == ["diff", "a", "b", "--nonsense"]
    assert second == ["show", "x", "--by=layer"]
    parse(second)
    for wrong in (first, ["nonsense"], ["diff", "a"], ["show", "x", "--by", "nonsense"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_readme_shows_how_to_begin() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    shown = set(re.findall(r"make ([a-z]+)", text))
    assert {"demo", "test"} <= shown <= targets
    assert any(True for _ in command_lines(text))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_ours_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:bench|ckdiff|docs|examples|tests)/[\w./-]+)`", page.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
