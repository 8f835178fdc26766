"""The table of a stream's weight versions, plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckdiff.budget import format_size

_HEADS = ("version", "base", "kind", "encoding", "tensors", "changed bytes", "size", "of the model")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each version, below the columns' names."""
    cells = [_HEADS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = row["share"]
    return (
        row["version"],
        row["base_version"] or "-",
        "full" if row["full"] else "delta",
        row["encoding"] or "-",
        f"{row['tensors']:,}",
        f"{row['changed_bytes']:,}",
        format_size(row["bytes"]),
        "-" if share is None else f"{share:.2%}",
    )
