"""How much the masks of several runs agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.channels import SHARE, across, amount, listed
from ckdiff.figures.figure import Figure, Row, of_rows, tooltip
from ckdiff.figures.style import step


def matrix(labels: Sequence[str], pairs: Sequence[dict[str, Any]], *, null: str) -> Figure:
    """Jaccard and lift of each pair; ``pairs`` as in the JSON of an overlap's ``model`` row."""
    rows = [
        _cell(pair, labels[x], labels[y], null)
        for pair in pairs
        for x, y in ((pair["a"], pair["b"]), (pair["b"], pair["a"]))
    ]
    most = max((row["jaccard"] or 0.0 for row in rows), default=0.0)
    size = step(len(labels), 560, 10, 64)
    place = {"x": listed("a", order=labels), "y": listed("b", order=labels)}
    place["x"]["axis"] |= {"labelAngle": -40}
    shade = {"scheme": "viridis", "domainMin": 0}
    colour = amount("jaccard") | {"scale": shade, "legend": {"title": "Jaccard"}}
    del colour["axis"]
    tips = tooltip(
        ("a", "run", ""), ("b", "run", ""), ("jaccard", "Jaccard", ".4~f"),
        ("expected", "by chance", ".4~f"), ("lift", "lift", ".4~f"),
        ("intersection", "changed in both", ","),
    )  # fmt: skip
    layers: list[dict[str, Any]] = [
        {"mark": "rect", "encoding": {**place, "color": colour, "tooltip": tips}}
    ]
    if size >= 36:  # there is room for words
        bright = {"test": f"datum.jaccard > {0.6 * most}", "value": "black"}
        words = {"text": {"field": "text"}, "color": {"condition": bright, "value": "white"}}
        layers.append({"mark": "text", "encoding": {**place, **words}})
    spec = of_rows({"width": {"step": size}, "height": {"step": size}, "layer": layers})
    says = (
        "Colour: the Jaccard index, elements changed in both runs / elements changed in either. "
        f"Number: the lift, shared elements / those that chance gives (null {null})."
    )
    return Figure("overlap", "Agreement of each pair of runs", says, rows, spec)


def _cell(pair: dict[str, Any], one: str, other: str, null: str) -> Row:
    found = pair["nulls"][null]
    return {
        "a": one,
        "b": other,
        "jaccard": pair["jaccard"],
        "lift": found["lift"],
        "expected": found["expected_jaccard"],
        "intersection": pair["intersection"],
        "text": "" if found["lift"] is None else f"{found['lift']:.3g}×",
    }


def votes(counts: Sequence[int]) -> Figure:
    """How many elements changed in exactly j runs; ``counts[j]``, from 0."""
    total = sum(counts) or 1
    rows = [
        {"runs": j, "elements": count, "share": count / total} for j, count in enumerate(counts)
    ]
    encoding = {
        "x": across("runs", "runs that changed it"),
        "y": amount("share", "share of all elements", form=SHARE),
        "tooltip": tooltip(
            ("runs", "runs", "d"), ("share", "share", ".4~%"), ("elements", "elements", ",")
        ),
    }
    width = {"step": step(len(counts), 560, 8, 48)}
    spec = of_rows({"width": width, "height": 180, "mark": "bar", "encoding": encoding})
    says = "How many elements no run changed, one run, two, and so on."
    return Figure("votes", "In how many runs an element changed", says, rows, spec)
