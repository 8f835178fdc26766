"""A run over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.channels import SHARE, across, amount, counted, kinds, listed
from ckdiff.figures.channels import densities as by_density
from ckdiff.figures.figure import Figure, of_rows, tooltip
from ckdiff.figures.style import step as step_width

_CURVES = {
    "changed_since_first": "changed since the first",
    "changed_since_previous": "changed since the one before",
}
_FATES = {
    "never": "never touched",
    "returned": "touched and returned",
    "final": "changed at the end",
}
_LENGTHS = {
    "distance": "away from the first",
    "step_length": "gone in the step",
    "path_length": "gone so far",
}
_LINE = {"type": "line", "point": True}
_MOST_LAYERS = 160
_MOST_STEPS = 240  #: columns of the map of layers
_CHECKPOINT = ("checkpoint", "checkpoint", "")


def densities(steps: Sequence[dict[str, Any]], elements: int) -> Figure:
    """Density of each step; ``steps`` and ``elements`` as in the JSON of a timeline."""
    rows = [
        {"step": i, "checkpoint": step["checkpoint"], "curve": text, "changed": step[key]}
        | {"density": step[key] / elements if elements else 0.0}
        for i, step in enumerate(steps, 1)
        for key, text in _CURVES.items()
    ]
    said = ("curve", "", ""), ("density", "density", SHARE), ("changed", "elements", ",")
    encoding = {
        "x": counted("step", "checkpoint", rows),
        "y": amount("density", form=SHARE),
        "color": kinds("curve", order=[*_CURVES.values()]),
        "tooltip": tooltip(_CHECKPOINT, *said),
    }
    spec = of_rows({"width": 760, "height": 220, "mark": _LINE, "encoding": encoding})
    says = "How much of the model differs from where it began, and from the step before."
    return Figure("timeline", "Density over the run", says, rows, spec)


def coverage(steps: Sequence[dict[str, Any]]) -> Figure:
    """How much of the final mask each step had already, as in the JSON of a timeline."""
    rows = [
        {"step": i, "checkpoint": step["checkpoint"], "coverage": step["coverage"]}
        for i, step in enumerate(steps, 1)
        if step["coverage"] is not None
    ]
    encoding = {
        "x": counted("step", "checkpoint", rows),
        "y": amount("coverage", form=".0%", domain=[0, 1]),
        "tooltip": tooltip(_CHECKPOINT, ("coverage", "coverage", ".4~%")),
    }
    spec = of_rows({"width": 760, "height": 160, "mark": _LINE, "encoding": encoding})
    says = "Of the elements that differ at the end, the share that differed at each step."
    return Figure("coverage", "How early the final mask was there", says, rows, spec)


def lengths(steps: Sequence[dict[str, Any]]) -> Figure:
    """How far the weights went, of a timeline with statistics; of another no rows."""
    rows = [
        {"step": i, "checkpoint": step["checkpoint"], "curve": text, "length": step[key]}
        for i, step in enumerate(steps, 1)
        for key, text in _LENGTHS.items()
        if key in step
    ]
    encoding = {
        "x": counted("step", "checkpoint", rows),
        "y": amount("length", "sum of |difference|", form="~s"),
        "color": kinds("curve", order=[*_LENGTHS.values()]),
        "tooltip": tooltip(_CHECKPOINT, ("curve", "", ""), ("length", "length", ".4~s")),
    }
    spec = of_rows({"width": 760, "height": 220, "mark": _LINE, "encoding": encoding})
    says = "How far all weights together moved. A longer path means that moves were undone."
    return Figure("lengths", "The way and the distance", says, rows, spec)


def directions(steps: Sequence[dict[str, Any]]) -> Figure:
    """Whether what moved again went onward, of a timeline with statistics; of another no rows."""
    keys = "checkpoint", "onward", "back"
    rows = [
        {"step": i, **{key: step[key] for key in keys}, "share": step["sign_agreement"]}
        for i, step in enumerate(steps, 1)
        if step.get("sign_agreement") is not None
    ]
    said = ("share", "onward", ".4~%"), ("onward", "elements onward", ","), ("back", "back", ",")
    encoding = {
        "x": counted("step", "checkpoint", rows),
        "y": amount("share", "went onward", form=".0%", domain=[0, 1]),
        "tooltip": tooltip(_CHECKPOINT, *said),
    }
    spec = of_rows({"width": 760, "height": 160, "mark": _LINE, "encoding": encoding})
    says = (
        "Of the weights that had moved before and moved again in this step, the share that moved "
        "on in the same direction. Chance gives one half."
    )
    return Figure("directions", "Onward or back", says, rows, spec)


def layers(rows: Sequence[dict[str, Any]], checkpoints: Sequence[str]) -> Figure:
    """Density of each layer at each step: rows of a timeline's summary by layer.

    ``checkpoints`` are those of the steps.
    """
    largest = sorted(range(len(rows)), key=lambda i: -rows[i]["elements"])[:_MOST_LAYERS]
    count = len(checkpoints)
    each = -(-count // _MOST_STEPS)
    chosen = sorted({min(k, count) for k in range(each, count + each, each)})
    drawn = [
        {"layer": rows[i]["group"], "step": k, "checkpoint": checkpoints[k - 1]}
        | {"density": step["density"], "changed": step["changed_since_first"]}
        for i in sorted(largest)
        for k, step in ((k, rows[i]["steps"][k - 1]) for k in chosen)
    ]
    said = ("density", "density", SHARE), ("changed", "elements", ",")
    encoding = {
        "x": across("step", "checkpoint"),
        "y": listed("layer"),
        "color": by_density([row["density"] for row in drawn], "datum.changed === 0"),
        "tooltip": tooltip(("layer", "layer", ""), _CHECKPOINT, *said),
    }
    shape = {"width": {"step": step_width(len(chosen), 760, 3, 40)}, "height": {"step": 14}}
    spec = of_rows({**shape, "mark": {"type": "rect", "stroke": None}, "encoding": encoding})
    says = "How much of each layer differs from the first checkpoint; grey has not changed."
    if each > 1:
        says += f" Of {each} neighbouring checkpoints the last is drawn."
    return Figure("layers-over-time", "Density by layer over the run", says, drawn, spec)


def fates(counts: dict[str, int]) -> Figure:
    """Elements never touched, touched and returned, and changed at the end."""
    total = sum(counts.values()) or 1
    rows = [
        {"fate": text, "elements": counts[key], "share": counts[key] / total, "order": i}
        for i, (key, text) in enumerate(_FATES.items())
    ]
    said = ("fate", "", ""), ("share", "share", ".4~%"), ("elements", "elements", ",")
    share = amount("share", "share of the elements", form=".0%") | {"stack": "normalize"}
    encoding = {
        "x": share,
        "color": kinds("fate", order=[*_FATES.values()]),
        "order": {"field": "order"},
        "tooltip": tooltip(*said),
    }
    spec = of_rows({"width": 760, "height": 44, "mark": "bar", "encoding": encoding})
    says = "What happened to the elements over all checkpoints."
    return Figure("fates", "Never touched, returned, changed", says, rows, spec)
