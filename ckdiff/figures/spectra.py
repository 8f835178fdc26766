"""Ranks and norms of updates, matrix by matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip


def ranks(rows: Sequence[dict[str, Any]]) -> Figure:
    """How much of its full rank each update has.

    ``rows`` as in the JSON of ``ckdiff spectrum``: ``name``, ``shape``, ``rank``, ``rank99``,
    ``stable_rank``; a matrix without a rank is left out.
    """
    drawn = []
    for row in rows:
        full = min(_matrix(row["shape"]))
        for kind in ("rank", "rank99", "stable_rank"):
            if full and row[kind] is not None:
                share = row[kind] / full
                drawn.append(
                    {
                        "name": row["name"],
                        "measure": _NAMES[kind],
                        "value": row[kind],
                        "share": share,
                    }
                )
    spec = of_rows(
        {
            "width": 560,
            "height": {"step": 44},
            "mark": {"type": "tick", "thickness": 1.5, "opacity": 0.7},
            "encoding": {
                "y": {
                    "field": "measure", "type": "nominal", "sort": None,
                    "axis": {"title": None, "domain": False, "ticks": False},
                },
                "x": {
                    "field": "share", "type": "quantitative", "scale": {"domain": [0, 1]},
                    "axis": {"title": "share of the full rank", "format": ".0%"},
                },
                "color": {"field": "measure", "type": "nominal", "legend": None, "sort": None},
                "tooltip": tooltip(
                    ("name", "tensor", ""), ("measure", "measure", ""), ("value", "rank", ".4~f"),
                    ("share", "of full rank", ".3~%"),
                ),
            },
        }
    )  # fmt: skip
    says = (
        "A mark for each matrix. The rank counts directions that are more than rounding; the "
        "others say how few of them hold most of the update."
    )
    return Figure("ranks", "Rank of the updates", says, drawn, spec)


_NAMES = {"rank": "rank", "rank99": "rank of 99 % of the energy", "stable_rank": "stable rank"}


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    rest = 1
    for size in shape[1:]:
        rest *= size
    return (shape[0], rest) if shape else (0, 0)


def norms(rows: Sequence[dict[str, Any]]) -> Figure:
    """The spectral norm of each update, in the order of the tensors."""
    drawn = [
        {"name": row["name"], "position": i, "norm2": row["norm2"]}
        for i, row in enumerate(rows)
        if row["norm2"] is not None
    ]
    spec = of_rows(
        {
            "width": 760,
            "height": 180,
            "mark": "point",
            "encoding": {
                "x": {
                    "field": "position", "type": "quantitative",
                    "axis": {"title": "matrix, in the order of the model", "tickMinStep": 1},
                },
                "y": {"field": "norm2", "type": "quantitative", "axis": {"title": "norm"}},
                "tooltip": tooltip(("name", "tensor", ""), ("norm2", "norm", ".4~g")),
            },
        }
    )  # fmt: skip
    says = "The largest singular value of each update."
    return Figure("norms", "Spectral norm of the updates", says, drawn, spec)
