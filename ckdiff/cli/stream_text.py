"""The table of a stream's weight versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckdiff.budget import format_size
from ckdiff.cli import formats, tables
from ckdiff.cli.tables import Column
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable

_COLUMNS = (
    Column("version"),
    Column("base"),
    Column("kind"),
    Column("encoding"),
    Column("tensors", optional=True),
    Column("changed bytes"),
    Column("size"),
    Column("of the model"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each version, below the columns' names. Nothing in it acts on a terminal."""
    return tables.table(_COLUMNS, map(_cells, rows), Terminal(colours=False))


def _cells(row: Mapping[str, Any]) -> list[str]:
    share = row["share"]
    return [
        printable(row["version"]),
        printable(row["base_version"] or "-"),
        "full" if row["full"] else "delta",
        printable(row["encoding"] or "-"),
        f"{row['tensors']:,}",
        f"{row['changed_bytes']:,}",
        format_size(row["bytes"]),
        "-" if share is None else formats.share(share),
    ]
