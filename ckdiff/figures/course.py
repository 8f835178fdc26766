"""A run over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip

_SHARE = ".3~%"
_CURVES = {
    "changed_since_first": "changed since the first",
    "changed_since_previous": "changed since the one before",
}


def densities(steps: Sequence[dict[str, Any]], elements: int) -> Figure:
    """Density of each step; ``steps`` and ``elements`` as in the JSON of a timeline."""
    rows = [
        {
            "step": i,
            "checkpoint": step["checkpoint"],
            "curve": text,
            "changed": step[key],
            "density": step[key] / elements if elements else 0.0,
        }
        for i, step in enumerate(steps, 1)
        for key, text in _CURVES.items()
    ]
    spec = of_rows(
        {
            "width": 760,
            "height": 220,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": _STEP,
                "y": {"field": "density", "type": "quantitative", "axis": {"format": _SHARE}},
                "color": {"field": "curve", "type": "nominal", "sort": None, "title": None},
                "tooltip": tooltip(
                    ("checkpoint", "checkpoint", ""), ("curve", "", ""),
                    ("density", "density", _SHARE), ("changed", "elements", ","),
                ),
            },
        }
    )  # fmt: skip
    says = "How much of the model differs from where it began, and from the step before."
    return Figure("timeline", "Density over the run", says, rows, spec)


_STEP = {
    "field": "step", "type": "quantitative",
    "axis": {"title": "checkpoint", "tickMinStep": 1, "format": "d"},
}  # fmt: skip


def coverage(steps: Sequence[dict[str, Any]]) -> Figure:
    """How much of the final mask each step had already, as in the JSON of a timeline."""
    rows = [
        {"step": i, "checkpoint": step["checkpoint"], "coverage": step["coverage"]}
        for i, step in enumerate(steps, 1)
        if step["coverage"] is not None
    ]
    spec = of_rows(
        {
            "width": 760,
            "height": 160,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": _STEP,
                "y": {
                    "field": "coverage", "type": "quantitative", "scale": {"domain": [0, 1]},
                    "axis": {"format": ".0%"},
                },
                "tooltip": tooltip(
                    ("checkpoint", "checkpoint", ""), ("coverage", "coverage", ".4~%")
                ),
            },
        }
    )  # fmt: skip
    says = "Of the elements that differ at the end, the share that differed at each step."
    return Figure("coverage", "How early the final mask was there", says, rows, spec)


def fates(counts: dict[str, int]) -> Figure:
    """Elements never touched, touched and returned, and changed at the end."""
    total = sum(counts.values()) or 1
    rows = [
        {"fate": text, "elements": counts[key], "share": counts[key] / total, "order": i}
        for i, (key, text) in enumerate(_FATES.items())
    ]
    spec = of_rows(
        {
            "width": 760,
            "height": 44,
            "mark": "bar",
            "encoding": {
                "x": {
                    "field": "share", "type": "quantitative", "stack": "normalize",
                    "axis": {"title": "share of the elements", "format": ".0%"},
                },
                "color": {"field": "fate", "type": "nominal", "sort": None, "title": None},
                "order": {"field": "order"},
                "tooltip": tooltip(
                    ("fate", "", ""), ("share", "share", ".4~%"), ("elements", "elements", ",")
                ),
            },
        }
    )  # fmt: skip
    says = "What became of the elements, looked at in every checkpoint."
    return Figure("fates", "Never touched, returned, changed", says, rows, spec)


_FATES = {
    "never": "never touched",
    "returned": "touched and returned",
    "final": "changed at the end",
}
