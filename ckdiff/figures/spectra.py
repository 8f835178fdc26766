"""Ranks and norms of updates, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ckdiff.figures.channels import SHARE, amount, counted, kinds, listed
from ckdiff.figures.figure import Figure, of_rows, tooltip

_NAMES = {"rank": "rank", "rank99": "rank of 99 % of the energy", "stable_rank": "stable rank"}


def ranks(rows: Sequence[dict[str, Any]]) -> Figure:
    """How much of its full rank each update has.

    ``rows`` as in the JSON of ``ckdiff spectrum``: ``name``, ``shape``, ``rank``, ``rank99``,
    ``stable_rank``; a matrix without a rank is left out.
    """
    drawn = []
    for row in rows:
        full = min(row["shape"][0], prod(row["shape"][1:])) if row["shape"] else 0
        for kind, text in _NAMES.items():
            if full and row[kind] is not None:
                value = {"value": row[kind], "share": row[kind] / full}
                drawn.append({"name": row["name"], "measure": text, **value})
    encoding = {
        "y": listed("measure"),
        "x": amount("share", "share of the full rank", form=".0%", domain=[0, 1]),
        "color": kinds("measure") | {"legend": None},
        "tooltip": tooltip(
            ("name", "tensor", ""), ("measure", "measure", ""), ("value", "rank", ".4~f"),
            ("share", "of full rank", SHARE),
        ),
    }  # fmt: skip
    mark = {"type": "tick", "thickness": 1.5, "opacity": 0.7}
    spec = of_rows({"width": 560, "height": {"step": 44}, "mark": mark, "encoding": encoding})
    says = (
        "One mark for each matrix. The rank counts directions above rounding; the other numbers "
        "show how few directions carry most of the update."
    )
    return Figure("ranks", "Rank of the updates", says, drawn, spec)


def norms(rows: Sequence[dict[str, Any]]) -> Figure:
    """The spectral norm of each update, in the order of the tensors."""
    drawn = [
        {"name": row["name"], "position": i, "norm2": row["norm2"]}
        for i, row in enumerate(rows)
        if row["norm2"] is not None
    ]
    encoding = {
        "x": counted("position", "matrix, in the order of the model", drawn),
        "y": amount("norm2", "norm"),
        "tooltip": tooltip(("name", "tensor", ""), ("norm2", "norm", ".4~g")),
    }
    spec = of_rows({"width": 760, "height": 180, "mark": "point", "encoding": encoding})
    says = "The largest singular value of each update."
    return Figure("norms", "Spectral norm of the updates", says, drawn, spec)
