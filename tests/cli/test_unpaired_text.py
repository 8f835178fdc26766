"""What people are told of tensors that are not the same on both sides."""

from __future__ import annotations

from diff_results import HOSTILE, lacking

from ckdiff.cli.terminal import Terminal
from ckdiff.cli.unpaired_text import unlike_lines, unpaired_lines


def test_lines_of_unlike_tensors() -> None:
    retyped = [{"name": f"t.{i}", "base": "F32", "tuned": "BF16"} for i in range(7)]
    resized = [{"name": "e", "base": [8, 2], "tuned": [9, 2], "rows": 8}]
    tied = [{"name": "head", "same_as": "embed", "side": "tuned"}]
    arrow = Terminal().glyphs.arrow
    one, two, three = unlike_lines(retyped, resized, tied, Terminal())
    assert one.startswith(
        f"7 tensors have two dtypes and were compared by value: t.0 (F32 {arrow} BF16)"
    )
    assert one.endswith(" and 2 more")
    said = "1 tensor has another number of rows: those that both sides have were compared"
    assert two == f"{said}: e ([8, 2] {arrow} [9, 2])"
    assert three == "1 tensor is tied to another: head (as embed in tuned)"
    assert unlike_lines([], [], [], Terminal()) == unpaired_lines([], Terminal()) == []


def test_reasons_that_have_no_shapes() -> None:
    lines = unpaired_lines([{"name": "m", "reason": "missing"}, lacking("a")], Terminal())
    assert "missing" in lines[1]


def test_no_name_acts_on_a_terminal() -> None:
    item = {"name": HOSTILE, "base": "F32", "tuned": "F16", "same_as": HOSTILE, "side": "base"}
    for line in unlike_lines([item], [item], [item], Terminal()):
        assert line.isprintable()
    for line in unpaired_lines([lacking(HOSTILE)], Terminal()):
        assert line.isprintable()
