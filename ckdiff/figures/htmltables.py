"""Small tables for notebooks: a headline in words, some rows, and what must not be missed.

Colours are those of the page around them, so that they are readable on a light and on a dark one.
Every text is escaped: names come from files that may be hostile.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ckdiff.errors import printable

MOST = 20  #: rows that are shown
Cell = str | int | float | None

_BOX = "font-variant-numeric: tabular-nums; margin: 0.3em 0"
_TABLE = "border-collapse: collapse; border: none; margin: 0.4em 0"
_CELL = "padding: 0.15em 0.8em; border: none; text-align: {}; {}"
_WRAP, _WHOLE = "overflow-wrap: anywhere", "white-space: nowrap"
_LONG = 32  # characters; shorter texts, and numbers, stay on one line
_HEAD = f"{_CELL}; border-bottom: 1px solid #8888; font-weight: 600; vertical-align: bottom"


def html_table(
    headline: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    texts: int = 1,
    words: Iterable[str] = (),
    more: int = 0,
) -> str:
    """A headline, a table and sentences below it, as HTML.

    The first ``texts`` columns are aligned left, numbers right; whole numbers get their commas,
    others four digits, and None is empty. ``more`` rows are not shown, and that is said.
    """
    said = [f"and {more:,} more: to_pandas() and to_polars() have all"] if more > 0 else []
    parts = [f"<div><strong>{escaped(headline)}</strong></div>"]
    if rows:
        parts.append(_table(heads, rows, texts))
    parts += [f'<div style="opacity: 0.8">{escaped(line)}</div>' for line in (*said, *words)]
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def spread(count: int) -> list[int]:
    """Which of ``count`` rows in an order are shown: some from the first to the last."""
    if count <= MOST:
        return list(range(count))
    return [i * (count - 1) // (MOST - 1) for i in range(MOST)]


def escaped(text: str) -> str:
    """A text in a page: no markup, and no character that moves or hides others."""
    return html.escape(printable(text))


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], texts: int) -> str:
    head = "".join(_cell("th", _HEAD, title, i < texts) for i, title in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(_cell('td', _CELL, _shown(c), i < texts) for i, c in enumerate(row))}</tr>"
        for row in rows
    )
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(tag: str, style: str, text: str, left: bool) -> str:
    look = style.format("left" if left else "right", _WRAP if len(text) > _LONG else _WHOLE)
    return f'<{tag} style="{look}">{escaped(text)}</{tag}>'


def _shown(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
