"""Where inside the matrices an update is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.channels import SHARE, amount, densities, kinds, listed
from ckdiff.figures.figure import Figure, of_rows, tooltip

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
    said = ("side", "busiest tenth of", ""), ("share", "share", SHARE)
    encoding: dict[str, Any] = {
        "y": listed("module", order=[module for module in sizes if module in largest]),
        "x": amount("share", "share of the changes", form=".0%", domain=[0, 1]),
        "color": kinds("side", "busiest tenth of", [*_SIDES.values()]),
        "tooltip": tooltip(("run", "run", ""), ("module", "module", ""), *said),
    }
    if len(labels) > 1:
        encoding["shape"] = kinds("run", order=labels)
    chance = {"mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": {"x": {"datum": 0.1}}}
    points = {"mark": {"type": "point", "size": 60}, "encoding": encoding}
    spec = of_rows({"width": 560, "height": {"step": 20}, "layer": [points, chance]})
    says = (
        "The dashed line is a tenth. If changes are spread evenly, the busiest tenth of the rows "
        "has little more than that."
    )
    title = "Changes in the busiest tenth of rows and columns"
    return Figure("concentration", title, says, drawn, spec)


def stripes(rows: Sequence[dict[str, Any]], *, run: str, name: str = "stripes") -> Figure:
    """Density along the rows and columns of single matrices: ``name``, ``rows``, ``columns``."""
    drawn = [
        {"line": f"{row['name']}: {side}", "bin": i, "density": value}
        | {"from": i / len(row[side]), "to": (i + 1) / len(row[side])}
        for row in rows
        for side in ("rows", "columns")
        for i, value in enumerate(row[side])
    ]
    encoding = {
        "x": amount("from", "from the first to the last", form=".0%", domain=[0, 1]),
        "x2": {"field": "to"},
        "y": listed("line", room=340),
        "color": densities([row["density"] for row in drawn], "datum.density === 0"),
        "tooltip": tooltip(("line", "", ""), ("density", "density", SHARE)),
    }
    mark = {"type": "rect", "stroke": None}
    spec = of_rows({"width": 480, "height": {"step": 20}, "mark": mark, "encoding": encoding})
    says = "The matrices with the most concentrated changes. Neighbours share a bin."
    return Figure(name, f"{run}: stripes", says, drawn, spec)
