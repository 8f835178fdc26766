"""From sections to HTML. What others chose (names, paths) is text here, wherever it stands."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from ckdiff.errors import printable
from ckdiff.figures.figure import Figure, shown
from ckdiff.figures.style import themed
from ckdiff.reports.numbers import counted, percent
from ckdiff.reports.page.library import library
from ckdiff.reports.sections import Section, Table

Data = dict[str, Any]

BEGINS = b"<!doctype html>\n<!-- ckdiff report: the next run replaces this file -->\n"
#: nothing is loaded, and nothing that is text can act
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?([eE][-+][0-9]+)?( %)?")
_ON_PAPER = 60  #: tensors that are printed: those that changed most


def document(data: Data, parts: list[Section], tensors: Data | None) -> bytes:
    """The whole file. ``tensors`` are columns, as ``contents.tensors`` makes them."""
    figures = [figure for section in parts for figure in section.every_figure()]
    place = {id(figure): i for i, figure in enumerate(figures)}
    body = [
        *_head(data, parts, tensors),
        "<main>",
        *(line for section in parts for line in _section(section, place)),
        *([] if tensors is None else _every_tensor(tensors, data)),
        "</main>",
        f"<footer>Made by ckdiff {text(data['version'])}. "
        "This file needs no network and no other file.</footer>",
        _json("page", _page(data, figures)),
        *([] if tensors is None else [_packed("table", _columns(tensors))]),
        f'<script type="module">{_script(library())}\n{_script(_asset("page.js"))}</script>',
        "</body></html>",
    ]
    return BEGINS + "\n".join(body).encode("utf-8", "replace") + b"\n"


def text(value: object) -> str:
    """A text that others chose, as it stands between tags and in attributes."""
    return escape(printable(str(value)), quote=True)


def _page(data: Data, figures: list[Figure]) -> Data:
    return {
        "runs": shown([run["label"] for run in data["runs"]]),
        "figures": [{"spec": shown(fig.spec), "rows": shown(fig.rows)} for fig in figures],
        "light": themed(dark=False),
        "dark": themed(dark=True),
    }


def _columns(tensors: Data) -> Data:
    """What the page needs of them: it divides by itself."""
    found = {key: column for key, column in tensors.items() if key != "density"}
    return found | {"name": shown(tensors["name"])}


def _head(data: Data, parts: list[Section], tensors: Data | None) -> Iterator[str]:
    title = text(data["title"])
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{_asset('page.css')}</style></head><body>"
    yield f"<header><h1>{title}</h1><nav>"
    yield from (f'<a href="#{part.name}">{text(part.title)}</a>' for part in parts)
    yield '<a href="#tensors">All tensors</a>' if tensors is not None else ""
    yield '<button id="theme" aria-pressed="false">Dark</button></nav><ul class="runs">'
    for run in data["runs"]:
        yield _tile(run, data["rule"])
    yield "</ul></header>"


def _tile(run: Data, rule: str) -> str:
    counts = run["rules"][rule]
    share = percent(counts["changed"], run["elements"])
    lines = [
        f"<b>{share}</b>",
        f"<span>{text(run['label'])}: changed ({text(rule)})</span>",
        f"<span>{counts['changed']:,} of {counted(run['elements'], 'element')}</span>",
        f"<span>{run['tensors_changed']:,} of {counted(run['tensors'], 'tensor')} changed</span>",
    ]
    return f"<li>{''.join(lines)}</li>"


def _section(section: Section, place: dict[int, int]) -> Iterator[str]:
    yield f'<section id="{section.name}"><h2>{text(section.title)}</h2>'
    yield from (f"<p>{text(line)}</p>" for line in section.words)
    if section.tabs:
        names = [f"{section.name}-tab-{i}" for i in range(len(section.tabs))]
        if len(names) > 1:
            buttons = (
                f'<button data-shows="{name}">{text(label)}</button>'
                for name, (label, _) in zip(names, section.tabs, strict=True)
            )
            yield f'<div class="tabs">{"".join(buttons)}</div>'
        for name, (_, figures) in zip(names, section.tabs, strict=True):
            yield f'<div id="{name}">'
            yield from (_figure(figure, place[id(figure)]) for figure in figures)
            yield "</div>"
    yield from (_figure(figure, place[id(figure)]) for figure in section.figures)
    for table in section.tables:
        yield from _table(table)
    yield "</section>"


def _figure(figure: Figure, position: int) -> str:
    return (
        f'<figure id="{figure.name}" data-figure="{position}"><figcaption>'
        f"<h3>{text(figure.title)}</h3><span><button class='svg'>SVG</button> "
        f"<button class='csv'>CSV</button></span><p>{text(figure.says)}</p></figcaption>"
        '<div class="plot"></div></figure>'
    )


def _table(table: Table) -> Iterator[str]:
    numbers = [
        bool(table.rows) and all(_NUMBER.fullmatch(row[i]) or not row[i] for row in table.rows)
        for i in range(len(table.heads))
    ]
    kind = [' class="number"' if number else "" for number in numbers]
    yield f'<div class="tools"><h3>{text(table.title)}</h3>'
    yield f'<button data-csv="{table.name}">CSV</button></div>'
    yield f'<div class="scroll"><table class="sorted" id="{table.name}"><thead><tr>'
    for head, cls in zip(table.heads, kind, strict=True):
        yield f"<th{cls}><button>{text(head)}</button></th>"
    yield "</tr></thead><tbody>"
    for row in table.rows:
        cells = (f"<td{cls}>{text(cell)}</td>" for cell, cls in zip(row, kind, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.more:
        yield f'<p class="soft">and {table.more:,} more; all of them are in --json</p>'


def _every_tensor(tensors: Data, data: Data) -> Iterator[str]:
    yield '<section id="tensors"><h2>All tensors</h2><div class="tools">'
    yield '<input id="filter" type="search" placeholder="filter by name: layers.1. proj" '
    yield 'aria-label="filter tensors by name"><span id="count" class="soft" role="status"></span>'
    yield '<button id="csv">CSV</button></div>'
    yield '<div id="every-tensor" class="tall" role="table" tabindex="0"><div class="rows"></div>'
    yield "</div>"
    yield from _on_paper(tensors, data)
    yield "</section>"


def _on_paper(tensors: Data, data: Data) -> Iterator[str]:
    """What is printed in place of the long table: the tensors that changed most."""
    changed, elements = tensors["changed"], tensors["elements"]
    total = [sum(column[i] or 0 for column in changed) for i in range(len(elements))]
    most = sorted(range(len(elements)), key=lambda i: -total[i])[:_ON_PAPER]
    heads = ["tensor", "dtype", "shape", *(text(run["label"]) for run in data["runs"])]
    yield '<table class="paper"><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>"
    for i in most:
        shares = ("" if c[i] is None else percent(c[i], elements[i]) for c in changed)
        cells = [tensors["name"][i], tensors["dtype"][i], tensors["shape"][i], *shares]
        yield "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table>"


def _json(name: str, data: Data) -> str:
    """JSON in the page: no text in it can end the script that it stands in."""
    found = json.dumps(data, allow_nan=False, separators=(",", ":"))
    found = found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{found}</script>'


def _packed(name: str, data: Data) -> str:
    """The same, compressed: for tables with a row for every tensor."""
    found = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    packed = base64.b64encode(gzip.compress(found, 6, mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def _script(code: str) -> str:
    """Code of ours, or the library's: a text in it that would end the script does not."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return files("ckdiff.reports.page").joinpath("assets", name).read_text("utf-8")
