"""Where inside the matrices an update is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip
from ckdiff.figures.style import NOTHING, span

_SHARE = ".3~%"
_SIDES = {"top10_rows": "rows", "top10_columns": "columns"}
_MOST_KINDS = 40


def concentration(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> Figure:
    """How much of the changes the busiest tenth of rows and of columns holds, by kind of module.

    ``rows`` have ``store`` (a position in ``labels``), ``module``, ``changed``, ``top10_rows`` and
    ``top10_columns``; a kind without changes is left out.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["module"]] = sizes.get(row["module"], 0) + row["changed"]
    largest = set(sorted(sizes, key=lambda module: -sizes[module])[:_MOST_KINDS])
    drawn = [
        {"run": labels[row["store"]], "module": row["module"], "side": side, "share": row[key]}
        for row in rows
        for key, side in _SIDES.items()
        if row[key] is not None and row["module"] in largest
    ]
    encoding: dict[str, Any] = {
        "y": {
            "field": "module", "type": "nominal", "sort": None,
            "axis": {"title": None, "labelLimit": 260, "domain": False, "grid": True},
        },
        "x": {
            "field": "share", "type": "quantitative", "scale": {"domain": [0, 1]},
            "axis": {"title": "share of the changes", "format": ".0%"},
        },
        "color": {"field": "side", "type": "nominal", "sort": None, "title": "busiest tenth of"},
        "tooltip": tooltip(
            ("run", "run", ""), ("module", "module", ""), ("side", "busiest tenth of", ""),
            ("share", "share", _SHARE),
        ),
    }  # fmt: skip
    if len(labels) > 1:
        encoding["shape"] = {"field": "run", "type": "nominal", "sort": None, "title": None}
    chance = {"mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": {"x": {"datum": 0.1}}}
    points = {"mark": {"type": "point", "size": 60}, "encoding": encoding}
    spec = of_rows({"width": 560, "height": {"step": 20}, "layer": [points, chance]})
    says = (
        "The dashed line is a tenth: where changes spread evenly, the busiest tenth of the rows "
        "holds little more than that."
    )
    return Figure(
        "concentration", "Changes in the busiest tenth of rows and columns", says, drawn, spec
    )


def stripes(rows: Sequence[dict[str, Any]], *, run: str, name: str = "stripes") -> Figure:
    """Density along the rows and columns of single matrices: ``name``, ``rows``, ``columns``."""
    drawn = [
        {
            "line": f"{row['name']}: {side}",
            "bin": i,
            "from": i / len(row[side]),
            "to": (i + 1) / len(row[side]),
            "density": value,
        }
        for row in rows
        for side in ("rows", "columns")
        for i, value in enumerate(row[side])
    ]
    low, high, kind = span([row["density"] for row in drawn])
    spec = of_rows(
        {
            "width": 480,
            "height": {"step": 20},
            "mark": {"type": "rect", "stroke": None},
            "encoding": {
                "x": {
                    "field": "from", "type": "quantitative", "scale": {"domain": [0, 1]},
                    "axis": {"title": "from the first to the last", "format": ".0%", "grid": False},
                },
                "x2": {"field": "to"},
                "y": {
                    "field": "line", "type": "ordinal", "sort": None,
                    "axis": {"title": None, "labelLimit": 340, "domain": False, "ticks": False},
                },
                "color": {
                    "condition": {"test": "datum.density === 0", "value": NOTHING},
                    "field": "density", "type": "quantitative",
                    "scale": {"type": kind, "domain": [low, high], "scheme": "viridis"},
                    "legend": {"format": _SHARE},
                },
                "tooltip": tooltip(("line", "", ""), ("density", "density", _SHARE)),
            },
        }
    )  # fmt: skip
    says = "The matrices whose changes gather most in few rows or columns; neighbours share a bin."
    return Figure(name, f"{run}: stripes", says, drawn, spec)
