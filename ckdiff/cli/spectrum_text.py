"""What ``spectrum`` prints for people, and as CSV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckdiff.budget import format_size
from ckdiff.cli import csvs, formats
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable
from ckdiff.runs.spectrum import Spectrum


def planned(estimate: dict[str, Any]) -> list[str]:
    """For ``--dry-run``."""
    total = sum(group["matrices"] for group in estimate["groups"])
    out = [
        f"{printable(estimate['base'])} and {printable(estimate['tuned'])}: "
        f"{len(estimate['matrices']):,} of {total:,} matrices would be looked at",
        f"needs {format_size(estimate['memory_needed'])} of memory for "
        f"{formats.name(estimate['largest'])}, one matrix at a time; "
        f"{format_size(estimate['memory'])} are allowed",
    ]
    if estimate["bytes_to_download"]:
        out.append(f"downloads {format_size(estimate['bytes_to_download'])}")
    if estimate["refusal"] is not None:
        out.append(f"would be refused: {estimate['refusal']}")
    return [*out, "", *_groups(estimate["groups"])]


def _groups(groups: list[dict[str, Any]]) -> list[str]:
    heads = [
        Column("module", "left", "cyan", flexible=True),
        Column("shape"),
        Column("matrices"),
        Column("taken", style="bold"),
    ]
    rows = [
        [
            printable(group["group"]),
            formats.shape(group["shape"]),
            f"{group['matrices']:,}",
            f"{group['taken']:,}",
        ]
        for group in groups
    ]
    return table(heads, rows, Terminal())


def csv_lines(result: Spectrum) -> Iterator[str]:
    """A header and a line for each matrix, without what is a list: cosines and angles."""
    names = [key for key in result.rows[0] if key not in ("cosines", "angles")]
    yield csvs.line(names)
    for row in result.rows:
        yield csvs.line([row[name] for name in names])


def lines(result: Spectrum) -> list[str]:
    """A row for each matrix that was looked at."""
    terminal = Terminal()
    title = f"{printable(result.base)} {terminal.glyphs.arrow} {printable(result.tuned)}"
    many = f"{len(result.rows):,} of {result.matrices:,} matrices"
    turned = any("shift" in row for row in result.rows)
    heads = [
        Column("matrix", "left", "cyan", flexible=True),
        Column("shape", optional=True),
        Column("rank", style="bold"),
        Column("of the\nsmaller side"),
        Column("stable\nrank"),
        Column("rank of 99 %\nof the energy"),
        Column("largest\nsingular value"),
    ]
    if turned:
        heads += [Column("spectral\nshift"), Column("largest\nangle, rad")]
    out = [terminal.paint(title, "bold") + f": {many}", ""]
    out += table(heads, [_cells(row, turned=turned) for row in result.rows], terminal)
    if any(row["sampled"] for row in result.rows):
        out.append("A sample of each module and shape; --all looks at all matrices.")
    if result.without:
        out.append(f"Without numbers: {', '.join(map(formats.name, result.without[:3]))}.")
    return out


def _cells(row: dict[str, Any], *, turned: bool) -> list[str]:
    def whole(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    found = [
        printable(row["name"]),
        formats.shape(row["shape"]),
        whole(row["rank"]) if row["finite"] else "not finite",
        "-" if row["rank_share"] is None else formats.share(row["rank_share"]),
        formats.number(row["stable_rank"]),
        whole(row["rank99"]),
        formats.number(row["norm2"]),
    ]
    if turned:
        angles = row.get("angles")
        found += [formats.number(row.get("shift")), formats.number(max(angles) if angles else None)]
    return found
