"""How far elements moved, and how large those were that did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.channels import COUNTS, SHARE, across, amount, dashes, kinds, whole
from ckdiff.figures.channels import runs as by_run
from ckdiff.figures.figure import Figure, of_rows, tooltip


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
    encoding = {
        "x": across("moved", "steps between representable values", angle=-45),
        "xOffset": kinds("run"),
        "y": amount("share", "share of the changed elements", form=SHARE),
        "color": by_run([label for label, _ in runs]),
        "tooltip": tooltip(
            ("run", "run", ""), ("moved", "steps", ""), ("share", "share", SHARE),
            ("count", "elements", ","),
        ),
    }  # fmt: skip
    width = {"step": min(16 + 8 * len(runs), 46), "for": "position"}
    spec = of_rows({"width": width, "height": 200, "mark": "bar", "encoding": encoding})
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
    said = ("run", "run", ""), ("exponent", "|w| from 2^", "d"), ("density", "density", SHARE)
    tips = tooltip(*said, *COUNTS)
    exponents = [row["exponent"] for row in rows]
    upper = {
        "width": 760,
        "height": 200,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": _power(None, exponents),
            "y": amount("density", form=SHARE),
            "color": by_run([row["run"] for row in rows]),
            **dashes([row["run"] for row in rows]),
            "tooltip": tips,
        },
    }
    lower = {
        "width": 760,
        "height": 70,
        "transform": [{"filter": {"field": "first", "equal": True}}],
        "mark": {"type": "bar", "color": "#8888"},
        "encoding": {
            "x": _power("|weight| of the base", exponents),
            "y": amount("elements", form="~s"),
            "tooltip": tips,
        },
    }
    says = (
        "Above: the share of the weights of each size that changed. Below: how many there are. "
        "In floats of few bits small weights change more easily, whatever the training."
    )
    first = rows[0]["run"] if rows else ""
    drawn = [row | {"first": row["run"] == first} for row in rows]
    spec = of_rows({"vconcat": [upper, lower]})
    return Figure("magnitudes", "Density by size of the weight", says, drawn, spec)


def _power(title: str | None, exponents: Sequence[int]) -> dict[str, Any]:
    """The axis of both pictures, with the same ends in both: room for a bar at each."""
    axis = {"title": title, "tickMinStep": 1, "labelExpr": "'2^' + datum.label"} | whole(exponents)
    ends = [min(exponents, default=0) - 0.5, max(exponents, default=0) + 0.5]
    scale = {"domain": ends, "nice": False, "zero": False}
    return {"field": "exponent", "type": "quantitative", "axis": axis, "scale": scale}
