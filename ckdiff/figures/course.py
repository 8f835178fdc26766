"""A run over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip
from ckdiff.figures.style import NOTHING, marks, span
from ckdiff.figures.style import step as step_width

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


def layers(rows: Sequence[dict[str, Any]], checkpoints: Sequence[str]) -> Figure:
    """Density of each layer at each step: rows of a timeline's summary by layer.

    ``checkpoints`` are those of the steps.
    """
    largest = sorted(range(len(rows)), key=lambda i: -rows[i]["elements"])[:_MOST_LAYERS]
    drawn = [
        {
            "layer": rows[i]["group"],
            "step": k,
            "checkpoint": checkpoints[k - 1],
            "density": step["density"],
            "changed": step["changed_since_first"],
        }
        for i in sorted(largest)
        for k, step in enumerate(rows[i]["steps"], 1)
    ]
    low, high, kind = span([row["density"] for row in drawn])
    spec = of_rows(
        {
            "width": {"step": step_width(len(checkpoints), 760, 6, 40)},
            "height": {"step": 14},
            "mark": {"type": "rect", "stroke": None},
            "encoding": {
                "x": {
                    "field": "step", "type": "ordinal",
                    "axis": {"title": "checkpoint", "labelAngle": 0, "labelOverlap": "greedy"},
                },
                "y": {
                    "field": "layer", "type": "ordinal", "sort": None,
                    "axis": {"title": None, "labelLimit": 260, "domain": False, "ticks": False},
                },
                "color": {
                    "condition": {"test": "datum.changed === 0", "value": NOTHING},
                    "field": "density", "type": "quantitative",
                    "scale": {"type": kind, "domain": [low, high], "scheme": "viridis"},
                    "legend": {
                        "title": "density", "format": _SHARE, "values": marks(low, high, kind)
                    },
                },
                "tooltip": tooltip(
                    ("layer", "layer", ""), ("checkpoint", "checkpoint", ""),
                    ("density", "density", _SHARE), ("changed", "elements", ","),
                ),
            },
        }
    )  # fmt: skip
    says = "How much of each layer differs from the first checkpoint; grey has not changed."
    return Figure("layers-over-time", "Density by layer over the run", says, drawn, spec)


_MOST_LAYERS = 160


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
