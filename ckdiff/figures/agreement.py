"""How much the masks of several runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip
from ckdiff.figures.style import step


def matrix(labels: Sequence[str], pairs: Sequence[dict[str, Any]], *, null: str) -> Figure:
    """Jaccard and lift of each pair; ``pairs`` as in the JSON of an overlap's ``model`` row."""
    rows = [
        {
            "a": labels[x],
            "b": labels[y],
            "jaccard": pair["jaccard"],
            "lift": pair["nulls"][null]["lift"],
            "expected": pair["nulls"][null]["expected_jaccard"],
            "intersection": pair["intersection"],
            "text": _said(pair["nulls"][null]["lift"]),
        }
        for pair in pairs
        for x, y in ((pair["a"], pair["b"]), (pair["b"], pair["a"]))
    ]
    most = max((row["jaccard"] or 0.0 for row in rows), default=0.0)
    size = step(len(labels), 560, 10, 64)
    axis = {"labelLimit": 200, "domain": False, "ticks": False, "title": None}
    place = {
        "x": {**_ordered("a", labels), "axis": {**axis, "labelAngle": -40}},
        "y": {**_ordered("b", labels), "axis": axis},
    }
    cells = {
        "mark": "rect",
        "encoding": {
            **place,
            "color": {
                "field": "jaccard", "type": "quantitative",
                "scale": {"scheme": "viridis", "domainMin": 0}, "legend": {"title": "Jaccard"},
            },
            "tooltip": tooltip(
                ("a", "run", ""), ("b", "run", ""), ("jaccard", "Jaccard", ".4~f"),
                ("expected", "by chance", ".4~f"), ("lift", "lift", ".4~f"),
                ("intersection", "changed in both", ","),
            ),
        },
    }  # fmt: skip
    layers: list[dict[str, Any]] = [cells]
    if size >= 36:
        ink = {
            "condition": {"test": f"datum.jaccard > {0.6 * most}", "value": "black"},
            "value": "white",
        }
        words = {"field": "text", "type": "nominal"}
        layers.append({"mark": "text", "encoding": {**place, "text": words, "color": ink}})
    spec = of_rows({"width": {"step": size}, "height": {"step": size}, "layer": layers})
    says = (
        "Colour is the Jaccard index: elements changed in both runs of those changed in either. "
        f"The number is the lift: shared elements for each one that chance gives (null {null})."
    )
    return Figure("overlap", "Agreement of each pair of runs", says, rows, spec)


def _ordered(field: str, labels: Sequence[str]) -> dict[str, Any]:
    return {"field": field, "type": "ordinal", "sort": list(labels)}


def _said(lift: float | None) -> str:
    return "" if lift is None else f"{lift:.3g}×"


def votes(counts: Sequence[int]) -> Figure:
    """How many elements changed in exactly j runs; ``counts[j]``, from 0."""
    total = sum(counts) or 1
    rows = [
        {"runs": j, "elements": count, "share": count / total} for j, count in enumerate(counts)
    ]
    spec = of_rows(
        {
            "width": {"step": step(len(counts), 560, 8, 48)},
            "height": 180,
            "mark": "bar",
            "encoding": {
                "x": {
                    "field": "runs", "type": "ordinal",
                    "axis": {"title": "runs that changed it", "labelAngle": 0},
                },
                "y": {
                    "field": "share", "type": "quantitative",
                    "axis": {"title": "share of all elements", "format": ".3~%"},
                },
                "tooltip": tooltip(
                    ("runs", "runs", "d"), ("share", "share", ".4~%"), ("elements", "elements", ",")
                ),
            },
        }
    )  # fmt: skip
    says = "How many elements no run changed, one run, two, and so on."
    return Figure("votes", "In how many runs an element changed", says, rows, spec)
