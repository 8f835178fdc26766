"""What ``show`` prints for people, and as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckdiff.cli import csvs, formats, made
from ckdiff.cli.heatmap import heat_map
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal
from ckdiff.cli.unpaired_text import unlike_lines, unpaired_lines
from ckdiff.errors import printable
from ckdiff.stores.summaries import By, Row, columns, relative_delta, stacks, summarise
from ckdiff.stores.table import MaskTable

if TYPE_CHECKING:
    from ckdiff.stores.maskstore import MaskStore

_BAR = 10


def csv_lines(source: MaskTable, by: By, rows: Sequence[Row]) -> Iterator[str]:
    """A header and a line for each row."""
    known = columns(source, by)
    yield csvs.line([column.name for column in known])
    for row in rows:
        yield csvs.line([column.value(row) for column in known])


def lines(store: MaskStore, by: By, rows: Sequence[Row]) -> list[str]:
    """The table, on a terminal a map of each stack of layers, and what was not compared."""
    terminal = Terminal()
    title = printable(_title(store.manifest, terminal))
    stored = ", ".join(row["group"] for row in store.summary("dtype"))
    out = [
        f"{terminal.paint(title, 'bold')}: "
        f"{formats.extent(store.table.total_elements, len(store.tensors))}, stored as {stored}",
        "",
        *row_table(store.table, by, rows, terminal),
    ]
    if terminal.interactive and by in ("layer", "module"):
        rule = next(iter(store.table.changed))
        for stack in stacks(store.table, rule):
            out += ["", *heat_map(stack, terminal, rule)]
    for part in (
        unlike_lines(store.table.retyped_tensors(), store.table.resized_tensors(), (), terminal),
        unpaired_lines(store.manifest.get("unpaired", ()), terminal),
    ):
        if part:
            out += ["", *part]
    return out


def _title(manifest: dict[str, Any], terminal: Terminal) -> str:
    """What the masks are of."""
    if "made_by" in manifest:
        return made.title(manifest["made_by"])
    sides = [manifest.get(side, {}) for side in ("base", "tuned")]
    base, tuned = (formats.at_commit(s.get("label", "?"), s.get("commit")) for s in sides)
    return f"{base} {terminal.glyphs.arrow} {tuned}"


def row_table(
    source: MaskTable, by: By, rows: Sequence[Row], terminal: Terminal, *, statistics: bool = True
) -> list[str]:
    """The lines of a table of summary rows; a last row adds up the model where there is room."""
    rules = list(source.changed)
    moved = statistics and source.statistics is not None
    heads = [Column("tensor" if by == "tensor" else by, "left", "cyan", flexible=True)]
    if by == "tensor":
        heads += [Column("dtype", "left"), Column("shape", optional=True)]
    heads.append(Column("elements"))
    for rule in rules:
        over = f"{rule}\n" if len(rules) > 1 else ""
        heads += [Column(f"{over}changed"), Column("density", style="bold", joined=True)]
    if moved:
        glyphs = terminal.glyphs
        heads += [
            Column(glyphs.norm, optional=True),
            Column(glyphs.max_delta, optional=True),
            Column("cosine", optional=True),
        ]
    heads.append(Column("", "left", "green", optional=True))
    highest = max((row["rules"][rules[0]]["density"] for row in rows), default=0.0) or 1.0

    def cells(row: Row, *, bar: bool = True) -> list[str]:
        texts = [printable(row["name"] if by == "tensor" else row["group"])]
        if by == "tensor":
            texts += [row["dtype"], formats.shape(row["shape"])] if "dtype" in row else ["", ""]
        texts.append(f"{row['elements']:,}")
        for rule in rules:
            changed = row["rules"][rule]["changed"]
            texts += [f"{changed:,}", formats.percent(changed, row["elements"])]
        if moved:
            measured = row.get("statistics") or {}
            texts += [
                formats.number(relative_delta(row)),
                formats.number(measured.get("max_abs_delta")),
                formats.cosine(measured.get("cosine")),
            ]
        share = row["rules"][rules[0]]["density"] / highest
        return [*texts, terminal.bar(share, _BAR) if bar else ""]

    footer = None
    if by != "model":
        total = summarise(source, "model")[0]
        footer = cells(total | {"name": "model", "group": "model"}, bar=False)
    return table(heads, map(cells, rows), terminal, footer=footer)
