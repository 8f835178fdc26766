"""What ``structure`` prints for people, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ckdiff.cli import csvs, formats
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable
from ckdiff.runs.structures.result import RATIOS, Structure
from ckdiff.stores.shortnames import short_names

_FOURS = ("none", "1", "2", "3", "all 4")
_GINI = [RATIOS.index("gini_rows"), RATIOS.index("gini_columns")]


def csv_lines(result: Structure) -> Iterator[str]:
    """A header and a line for each row."""
    first = True
    for row in result.each_row():
        fours = {f"fours_{k}": count for k, count in enumerate(row.pop("fours"))}
        cells = row | fours
        if first:
            yield csvs.line(list(cells))
            first = False
        yield csvs.line(list(cells.values()))


def lines(result: Structure, top: int) -> list[str]:
    """For each store a few sentences and the ``top`` most unequal matrices; then what is shared."""
    terminal = Terminal()
    labels = short_names(result.stores) if len(result.stores) > 1 else result.stores
    out: list[str] = []
    for store, label in enumerate(labels):
        changed = int(result.counted[store, :, 0].sum())
        elements = sum(math.prod(shape) for shape in result.shapes)
        title = f"{formats.name(label)}: {result.rule} mask of "
        title += "1 matrix" if len(result.names) == 1 else f"{len(result.names):,} matrices"
        share = f"{changed:,} changed, {formats.percent(changed, elements)}"
        out += [*([""] if out else []), terminal.paint(title, "bold") + f", {share}", ""]
        out += _matrices(result, store, top, terminal)
        out += ["", _fours(result, store)]
    if len(result.stores) > 1:
        out += ["", *_shared(result, labels, top, terminal)]
    out += ["", *_notes(result)]
    return out


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else formats.share(value)


def _matrices(result: Structure, store: int, top: int, terminal: Terminal) -> list[str]:
    unequal = np.nan_to_num(result.ratios[store][:, _GINI], nan=-1.0).max(axis=1)
    order = np.argsort(-unequal, kind="stable")[:top].tolist()
    heads = [
        Column("matrix", "left", "cyan", flexible=True),
        Column("shape", optional=True),
        Column("density", style="bold"),
        Column("rows\ntouched", optional=True),
        Column("columns\ntouched", optional=True),
        Column("in top 10 %\nof rows"),
        Column("of\ncolumns"),
        Column("Gini\nrows"),
        Column("Gini\ncolumns"),
        Column("16x16 blocks\ntouched", optional=True),
    ]
    if result.energies is not None:
        heads.append(Column("energy in\ntop 1 %"))
    rows = [_cells(result.row(store, i)) for i in order]
    out = table(heads, rows, terminal)
    if len(order) < len(result.names):
        out.append(
            f"the {len(order)} most unequal of {len(result.names):,} matrices; all of them are in "
            "--csv and --json"
        )
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    found = [
        printable(row["name"]),
        formats.shape(row["shape"]),
        formats.percent(row["changed"], row["elements"]),
        formats.percent(row["rows_touched"], row["rows"]),
        formats.percent(row["columns_touched"], row["columns"]),
        _share(row["top10_rows"]),
        _share(row["top10_columns"]),
        _ratio(row["gini_rows"]),
        _ratio(row["gini_columns"]),
        formats.percent(row["blocks16_touched"], row["blocks16"]),
    ]
    return [*found, _share(row["energy_top1"])] if "energy_top1" in row else found


def _fours(result: Structure, store: int) -> str:
    counts = result.fours[store].sum(axis=0).tolist()
    total = sum(counts)
    if not total:
        return "No row has four elements."
    parts = [
        f"{name} in {formats.percent(count, total)}"
        for name, count in zip(_FOURS, counts, strict=True)
    ]
    return f"Of every four elements in a row changed: {', '.join(parts)}."


def _shared(result: Structure, labels: Sequence[str], top: int, terminal: Terminal) -> list[str]:
    """How far the stripes of two runs are the same ones: the median over the matrices."""
    heads = [
        Column("runs", "left", "cyan", flexible=True),
        Column("rows\nshared", style="bold"),
        Column("by\nchance"),
        Column("columns\nshared", style="bold"),
        Column("by\nchance"),
    ]
    rows = []
    every = result.shared_rows()
    for pair, (a, b) in enumerate(result.pairs[:top]):
        mine = every[pair * len(result.names) : (pair + 1) * len(result.names)]
        cells = [f"{printable(labels[a])}, {printable(labels[b])}"]
        for key in ("rows", "rows_chance", "columns", "columns_chance"):
            values = [row[key] for row in mine if row[key] is not None]
            cells.append(_share(float(np.median(values))) if values else "-")
        rows.append(cells)
    return [
        "The most changed 10 % of rows and columns that two runs share: medians over matrices",
        *table(heads, rows, terminal),
    ]


def _notes(result: Structure) -> list[str]:
    out = [
        "Gini: 0 if all rows (columns) have the same number of changes, near 1 if a few have all."
    ]
    if result.not_matrices:
        tensors = formats.counted(result.not_matrices, "tensor")
        out.append(f"Left out: {tensors} with fewer than two dimensions.")
    if result.unmeasured:
        named = ", ".join(map(formats.name, result.unmeasured[:3]))
        more = len(result.unmeasured) - 3
        out.append(f"No energy: {named}{f' and {more:,} more' if more > 0 else ''}.")
    if result.profiles is not None:
        out.append(f"profiles written to {printable(result.profiles)}")
    return out
