"""How far elements moved, and how large those were that did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, of_rows, tooltip
from ckdiff.figures.style import runs_colour

_SHARE = ".3~%"


def distances(runs: Sequence[tuple[str, list[int]]]) -> Figure:
    """How many representable values changed elements moved by.

    ``runs`` are (label, histogram): position 0 counts distance 0, k distances from 2**(k-1) to
    2**k - 1. Changed elements whose distance is 0 went from 0 to -0, or back.
    """
    rows = []
    for label, histogram in runs:
        total = sum(histogram) or 1
        for k, count in enumerate(histogram):
            text = _between(k)
            rows.append({"run": label, "moved": text, "count": count, "share": count / total})
    spec = of_rows(
        {
            "width": {"step": min(16 + 8 * len(runs), 46), "for": "position"},
            "height": 200,
            "mark": "bar",
            "encoding": {
                "x": {
                    "field": "moved", "type": "ordinal", "sort": None,
                    "axis": {"title": "steps between representable values", "labelAngle": -45},
                },
                "xOffset": {"field": "run", "type": "nominal", "sort": None},
                "y": {
                    "field": "share", "type": "quantitative",
                    "axis": {"title": "share of the changed elements", "format": _SHARE},
                },
                "color": runs_colour([label for label, _ in runs]),
                "tooltip": tooltip(
                    ("run", "run", ""), ("moved", "steps", ""), ("share", "share", _SHARE),
                    ("count", "elements", ","),
                ),
            },
        }
    )  # fmt: skip
    says = (
        "One step (ULP) is the distance from one number of the dtype to the next. "
        "Small updates in bfloat16 are mostly one step."
    )
    return Figure("distances", "How far changed elements moved", says, rows, spec)


def _between(k: int) -> str:
    if k < 2:
        return str(k)
    low, high = 1 << (k - 1), (1 << k) - 1
    return f"{low}-{high}" if high < 10_000 else f"2^{k - 1} and more"


def magnitudes(rows: list[dict[str, Any]]) -> Figure:
    """Density by the size of the base's weights.

    Each row has ``run``, ``exponent`` (k where 2**k <= |w| < 2**(k+1)), ``elements``, ``changed``
    and ``density``.
    """
    x = {
        "field": "exponent", "type": "quantitative",
        "axis": {"title": None, "tickMinStep": 1, "labelExpr": "'2^' + datum.label"},
    }  # fmt: skip
    color = runs_colour([row["run"] for row in rows])
    tips = tooltip(
        ("run", "run", ""), ("exponent", "|w| from 2^", "d"), ("density", "density", _SHARE),
        ("changed", "changed", ","), ("elements", "elements", ","),
    )  # fmt: skip
    spec = of_rows(
        {
            "vconcat": [
                {
                    "width": 760,
                    "height": 200,
                    "mark": {"type": "line", "point": True},
                    "encoding": {
                        "x": x,
                        "y": {
                            "field": "density", "type": "quantitative",
                            "axis": {"format": _SHARE},
                        },
                        "color": color,
                        "tooltip": tips,
                    },
                },
                {
                    "width": 760,
                    "height": 70,
                    "transform": [{"filter": {"field": "first", "equal": True}}],
                    "mark": {"type": "bar", "color": "#8888", "binSpacing": 1},
                    "encoding": {
                        "x": {**x, "axis": {**x["axis"], "title": "|weight| of the base"}},  # type: ignore[dict-item]
                        "y": {
                            "field": "elements", "type": "quantitative",
                            "axis": {"format": "~s", "tickCount": 3},
                        },
                        "tooltip": tips,
                    },
                },
            ]
        }
    )  # fmt: skip
    says = (
        "Above: the share of the weights of each size that changed. Below: how many there are. "
        "In floats of few bits small weights change more easily, whatever the training."
    )
    first = rows[0]["run"] if rows else ""
    drawn = [row | {"first": row["run"] == first} for row in rows]
    return Figure("magnitudes", "Density by size of the weight", says, drawn, spec)
