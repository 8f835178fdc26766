"""The map of densities: nothing, next to nothing and a third look different, on any terminal."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from ckdiff.cli.heatmap import heat_map
from ckdiff.cli.terminal import ASCII, UNICODE, Terminal, visible_width
from ckdiff.cli.timeline_text import sparkline
from ckdiff.stores.summaries import Stack

MARKS = {"zero": (100_000_000, 0), "trace": (100_000_000, 3), "third": (3_000_000, 1_000_000)}


def stack(columns: list[tuple[int, int]], modules: int = 1, name: str = "m.layers") -> Stack:
    """One column for each (elements, changed); all modules alike."""
    elements, changed = (np.array([[c[i] for c in columns]] * modules, np.int64) for i in (0, 1))
    labels = [f"mlp.experts.*.a_long_common_prefix.part_{m}.projection" for m in range(modules)]
    return Stack(name, [str(i) for i in range(len(columns))], labels, elements, changed)


def draw(
    given: Stack, monkeypatch: pytest.MonkeyPatch, width: int = 100, **environment: str
) -> list[str]:
    known = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(width)}
    for key, value in (known | environment).items():
        monkeypatch.setenv(key, value)
    if not environment.get("NO_COLOR", "1"):
        monkeypatch.delenv("NO_COLOR")
    return heat_map(given, Terminal(io.StringIO()), "exact")


def cells(lines: list[str], glyphs: str = "│") -> list[str]:
    drawn = re.sub("\x1b\\[[0-9;]*m", "", lines[2]).split(glyphs)[1]
    each = len(drawn) // 8
    return [drawn[i : i + each] for i in range(0, len(drawn), each)]


@pytest.mark.parametrize("rest", [(3, 1), (100, 90), (1000, 3), (10, 9), (10**8, 40), (100, 100)])
@pytest.mark.parametrize("size", [10**3, 10**6, 10**10])
def test_nothing_a_few_and_a_third_look_different(
    rest: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However dense the other layers are, and however large."""
    bulk = (rest[0] * size, rest[1] * size)
    lines = draw(stack([*MARKS.values(), *[bulk] * 5]), monkeypatch)
    zero, trace, third = cells(lines)[:3]
    assert len({zero, trace, third}) == 3
    assert set(zero) == {UNICODE.zero}
    legend = "".join(lines[3:])
    assert all(mark in legend for mark in {zero[0], trace[0], third[0]})


def test_what_is_below_the_scale_is_in_the_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = [(10**9, 9 * 10**8), (10**9, 10**9)] * 3
    lines = draw(stack([MARKS["trace"], MARKS["third"], *bulk]), monkeypatch)
    assert lines[-1].strip() == "· 0 %   ◦ < 0.9 %   ▁ < 90 %   90 % ▂▃▄▅▆▇█ 100 %"
    trace, third, low, high = cells(lines)[:4]
    assert [trace[0], third[0], low[0], high[0]] == ["◦", "▁", "▂", "█"]


def test_it_is_the_same_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    terminal = Terminal(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = heat_map(stack([*MARKS.values(), *[(3 * 10**9, 10**9)] * 5]), terminal, "exact")
    drawn = cells(lines, "|")
    assert drawn[0][0] == ASCII.zero
    assert len(set(drawn[:3])) == 3
    assert "".join(lines).isascii()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("colour", ["", "1"])
def test_it_fits(width: int, colour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [*MARKS.values(), (10**13, 10**13 - 1), *[(3 * 10**9, 10**9)] * 90]
    for given in (stack(many, 20), stack(many[:9], 3), stack([(10**13, 10**13 - 1)] * 40, 2)):
        lines = draw(given, monkeypatch, width, NO_COLOR=colour)
        assert max(map(visible_width, lines[1:])) <= width
        labels = [line.split("│")[0] for line in lines if line.count("│") == 2]
        assert len(set(labels)) == len(labels) == len(given.modules)


def test_sparklines_tell_the_same_apart() -> None:
    terminal = Terminal(io.StringIO())
    assert sparkline([0.0, 1e-9, 0.003, 0.05, 0.33, 1.0], 1.0, terminal) == "·◦◦▁▃█"
