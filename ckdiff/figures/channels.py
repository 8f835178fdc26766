"""What pictures are described with: positions, colours and words, each in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckdiff.figures.style import CATEGORIES, NOTHING, marks, span

Channel = dict[str, Any]
SHARE = ".3~%"
COUNTS = (("changed", "changed", ","), ("elements", "elements", ","))


def amount(field: str, title: str | None = None, *, form: str = "", **scale: Any) -> Channel:
    """A number along an axis; ``form`` is how the axis writes it."""
    axis: Channel = {} if title is None else {"title": title}
    if form:
        axis["format"] = form
    found = {"field": field, "type": "quantitative", "axis": axis}
    return found | ({"scale": scale} if scale else {})


def counted(field: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Channel:
    """Whole numbers along an axis: those of the rows."""
    axis = {"title": title, "tickMinStep": 1, "format": "d"}
    return amount(field, title) | {"axis": axis | whole([row[field] for row in rows])}


def whole(numbers: Sequence[int]) -> Channel:
    """Where an axis of these has its ticks. Vega puts some between two or three whole numbers,
    whatever the least step is, and rounds what it writes there; of more it finds whole ones.
    """
    low, high = min(numbers, default=0), max(numbers, default=0)
    return {"values": list(range(low, high + 1))} if high - low < 3 else {}


def listed(field: str, *, room: int = 260, order: Sequence[str] | None = None) -> Channel:
    """Names down the side, in the order of the rows or in ``order``."""
    axis = {"title": None, "labelLimit": room, "domain": False, "ticks": False}
    sort = None if order is None else list(order)
    return {"field": field, "type": "ordinal", "sort": sort, "axis": axis}


def across(
    field: str, title: str | None, *, angle: int = 0, order: Sequence[str] | None = None
) -> Channel:
    """Names side by side, in the order of the rows or in ``order``; where they are too many some
    are left out.
    """
    axis = {"title": title, "labelAngle": angle, "labelOverlap": "greedy"}
    sort = None if order is None else list(order)
    return {"field": field, "type": "ordinal", "sort": sort, "axis": axis}


def kinds(field: str, title: str | None = None, order: Sequence[str] | None = None) -> Channel:
    """A colour, or a shape, for each name."""
    sort = None if order is None else list(order)
    return {"field": field, "type": "nominal", "sort": sort, "title": title}


def runs(labels: Sequence[str]) -> Channel:
    """A colour for each run, in the order in which they were given; one needs no legend."""
    known = list(dict.fromkeys(labels))
    colour = {"range": [CATEGORIES[i % len(CATEGORIES)] for i in range(len(known))]}
    scale = {"scale": {"domain": known, **colour}}
    return kinds("run", order=known) | scale | ({"legend": None} if len(known) < 2 else {})


def dashes(labels: Sequence[str]) -> dict[str, Channel]:
    """What tells the lines of runs apart where there are more than colours; else nothing."""
    known = list(dict.fromkeys(labels))
    if len(known) <= len(CATEGORIES):
        return {}
    # the same domain and title as the colours have, so that one legend says both
    legend = {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 2}
    more = {"scale": {"domain": known}, "legend": legend}
    return {"strokeDash": kinds("run", order=known) | more}


def densities(values: list[float], nothing: str) -> Channel:
    """Colour by density; grey where ``nothing``, an expression, holds."""
    low, high, kind = span(values)
    legend = {"title": "density", "format": SHARE, "values": marks(low, high, kind)}
    return {
        "condition": {"test": nothing, "value": NOTHING},
        "field": "density",
        "type": "quantitative",
        "scale": {"type": kind, "domain": [low, high], "scheme": "viridis"},
        "legend": legend,
    }
