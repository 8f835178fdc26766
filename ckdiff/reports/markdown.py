"""A diff as markdown, for the summary of a pull request.

Names of tensors and paths come from others: nothing in them is markdown or HTML here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ckdiff.diffs.result import DiffResult
from ckdiff.errors import printable
from ckdiff.reports.numbers import counted, extent, percent
from ckdiff.stores.summaries import By, summarise

BEGINS = b"<!-- ckdiff diff: the next run replaces this file -->\n"
_TOP = 10  #: rows of a table of layers or modules
_LISTED = 100  #: names of a list; what shows such files has limits
_LONGEST = 200  #: characters of a name
#: neither of these ends a code span or a cell of a table, nor begins HTML
_PLAIN = re.compile(r"(?=\S)[A-Za-z0-9_.,:;/@=+*?~^%#()\[\]{}'!\- ]+(?<=\S)")


def markdown(result: DiffResult) -> bytes:
    """A verdict, the rules, the densest layers and modules, and lists of what was not compared."""
    base, tuned = code(result.base), code(result.tuned)
    parts = [
        [f"## ckdiff: {_verdict(result)}"],
        [f"{base} → {tuned}: {_extent(result)}"],
        _table(("gate", "", "found", "allowed", "why"), map(_gate, result.gates)),
        _rules(result),
        *(_densest(result, by) for by in ("layer", "module")),
        *_lists(result),
    ]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines)
    return BEGINS + text.encode() + b"\n"


def code(text: str, longest: int = _LONGEST) -> str:
    """A text that others chose as code, also in a table: nothing in it ends the code, or acts."""
    text = printable(text[: 4 * longest])
    text = text if len(text) <= longest else text[:longest] + "..."
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    escaped = "".join(c if c.isalnum() or c in ". " else f"&#{ord(c)};" for c in text)
    return f"<code>{escaped}</code>"


def _verdict(result: DiffResult) -> str:
    failed = sum(not verdict.ok for verdict in result.gates)
    if failed:
        return f"{failed} of {counted(len(result.gates), 'gate')} failed"
    if result.gates:
        count = len(result.gates)
        return "the gate is passed" if count == 1 else f"all {count} gates are passed"
    return "what differs" if result.differs else "nothing differs"


def _extent(result: DiffResult) -> str:
    text = extent(result.elements, len(result.table))
    text += f"; {result.tensors_identical:,} of {counted(len(result.table), 'tensor')} "
    text += "equal in value" if result.retyped else "bit-identical"
    lost = result.uncompared
    if lost["tensors"]:
        text += f"; **{extent(lost['elements'], lost['tensors'])} not compared**"
    return text + "."


def _gate(verdict: Any) -> list[str]:
    mark = "passed" if verdict.ok else "**failed**"
    gate = verdict.gate if verdict.glob is None else f"{verdict.gate} {verdict.glob}"
    numbers = (
        f"{number:,.6g}" if number % 1 else f"{int(number):,}"
        for number in (verdict.value, verdict.threshold)
    )
    return [code(gate), mark, *numbers, code(verdict.reason, 5 * _LONGEST)]


def _rules(result: DiffResult) -> list[str]:
    rows = [
        [
            code(rule),
            f"{counts['changed']:,}",
            percent(counts["changed"], result.elements),
            percent(result.elements - counts["changed"], result.elements),
        ]
        for rule, counts in result.rules.items()
    ]
    return _table(("rule", "changed", "density", "sparsity"), rows)


def _densest(result: DiffResult, by: By) -> list[str]:
    """The groups of the highest density under the first rule; nothing where nothing changed."""
    rule = next(iter(result.rules))
    if not result.rules[rule]["changed"]:
        return []
    rows = []
    for row in summarise(result.table, by, sort=f"density:{rule}", top=_TOP):
        changed, elements = row["rules"][rule]["changed"], row["elements"]
        if changed:
            share = percent(changed, elements)
            rows.append([code(row["group"]), f"{elements:,}", f"{changed:,}", share])
    return _table((by, "elements", f"changed ({rule})", "density"), rows)


def _lists(result: DiffResult) -> Iterable[list[str]]:
    unpaired = [
        [code(item["name"]), item["reason"], _side(item, "base"), _side(item, "tuned")]
        for item in result.unpaired_details[:_LISTED]
    ]
    count = len(result.unpaired_details)
    yield _folded("not compared", count, ("tensor", "why", "base", "tuned"), unpaired)
    for title, items in (
        ("compared by value, of two dtypes", result.retyped),
        ("compared in the rows that both sides have", result.resized),
    ):
        rows = [
            [code(i["name"]), code(shown(i["base"])), code(shown(i["tuned"]))]
            for i in items[:_LISTED]
        ]
        yield _folded(title, len(items), ("tensor", "base", "tuned"), rows)
    tied = [[code(i["name"]), i["side"], code(i["same_as"])] for i in result.tied[:_LISTED]]
    yield _folded("tied to another", len(result.tied), ("tensor", "side", "the same as"), tied)


def shown(value: Any) -> str:
    """A dtype, or a shape: ``[4096, 4096]``."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _side(detail: dict[str, Any], which: str) -> str:
    if f"{which}_dtype" not in detail:
        return ""
    return code(f"{detail[f'{which}_dtype']} {shown(detail[f'{which}_shape'])}")


def _folded(
    title: str, count: int, heads: Sequence[str], rows: Iterable[Sequence[str]]
) -> list[str]:
    listed = list(rows)
    if not listed:
        return []
    more = [f"\nand {count - len(listed):,} more"] if count > len(listed) else []
    summary = f"<details><summary>{counted(count, 'tensor')} {title}</summary>"
    return [summary, "", *_table(heads, listed), *more, "", "</details>"]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; nothing without rows. Cells are safe: made of numbers, our words and ``code``."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *lines] if lines else []
