"""Where inside the matrices an update is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip

_SHARE = ".3~%"
_SIDES = {"top10_rows": "rows", "top10_columns": "columns"}


def concentration(rows: Sequence[dict[str, Any]]) -> Figure:
    """How much of each matrix's changes its busiest tenth of rows and of columns holds.

    ``rows`` as in the JSON of ``ckdiff structure``; a matrix without changes is left out.
    """
    drawn = [
        {"name": row["name"], "position": i, "side": side, "share": row[key]}
        for i, row in enumerate(rows)
        for key, side in _SIDES.items()
        if row[key] is not None
    ]
    spec = of_rows(
        {
            "layer": [
                {
                    "width": 760,
                    "height": 220,
                    "mark": "point",
                    "encoding": {
                        "x": {
                            "field": "position", "type": "quantitative",
                            "axis": {"title": "matrix, in the order of the model"},
                        },
                        "y": {
                            "field": "share", "type": "quantitative", "scale": {"domain": [0, 1]},
                            "axis": {"title": "share of its changes", "format": ".0%"},
                        },
                        "color": {"field": "side", "type": "nominal", "sort": None},
                        "tooltip": tooltip(
                            ("name", "tensor", ""), ("side", "busiest tenth of the", ""),
                            ("share", "share", _SHARE),
                        ),
                    },
                },
                {
                    "mark": {"type": "rule", "strokeDash": [4, 4]},
                    "encoding": {"y": {"datum": 0.1}},
                },
            ]
        }
    )  # fmt: skip
    says = (
        "The dashed line is a tenth: where changes spread evenly, the busiest tenth of the rows "
        "holds little more."
    )
    return Figure(
        "concentration", "Changes in the busiest tenth of rows and columns", says, drawn, spec
    )
