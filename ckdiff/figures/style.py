"""How pictures look: quiet, readable in print and on a dark screen, and without colour vision.

Categories take the colours of Okabe and Ito, which stay apart for all common kinds of colour
blindness. Amounts take scales whose lightness only rises.
"""

from __future__ import annotations

import math
from typing import Any

CATEGORIES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#999999",
)
AMOUNTS = "viridis"  #: from nothing to much
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
#: of a cell in which nothing changed: no colour of the scale
NOTHING = "#8885"

_INKS = {False: ("#1f2328", "#59636e", "#d1d9e0"), True: ("#e6edf3", "#9198a1", "#3d444d")}


def themed(*, dark: bool) -> dict[str, Any]:
    """Vega-Lite's ``config`` for light or dark pages; both are transparent."""
    ink, soft, line = _INKS[dark]
    text = {"labelColor": soft, "titleColor": ink, "labelFont": FONT, "titleFont": FONT}
    return {
        "background": None,
        "font": FONT,
        "axis": {
            **text,
            "domainColor": line,
            "gridColor": line,
            "gridOpacity": 0.6,
            "tickColor": line,
            "titleFontWeight": "normal",
        },
        "legend": {
            **text,
            "titleFontWeight": "normal",
            "labelLimit": 320,
            "symbolBaseFillColor": soft,
            "symbolBaseStrokeColor": soft,
        },
        "header": text,
        "title": {"color": ink, "font": FONT, "fontWeight": "normal", "anchor": "start"},
        "view": {"stroke": None},
        "range": {"category": list(CATEGORIES), "ramp": {"scheme": AMOUNTS}},
        "text": {"color": ink, "font": FONT},
        "rule": {"color": soft},
        "line": {"strokeWidth": 2},
        "point": {"size": 28, "filled": True},
        "bar": {"color": CATEGORIES[0]},
    }


def span(values: list[float]) -> tuple[float, float, str]:
    """The ends of a scale for positive values, and ``log`` or ``linear``.

    It is logarithmic where the values span more than an order of magnitude, so that 0.3 % and 36 %
    are told apart; differences of less than a tenth are not blown up.
    """
    some = [value for value in values if value > 0]
    if not some:
        return 0.0, 1.0, "linear"
    low, high = min(some), max(some)
    if high > _WIDE * low:
        return low, high, "log"
    below = 0.9 * high
    return (min(low, below) if below < high else 0.0), high, "linear"  # the least float has none


_WIDE = 12.0


def marks(low: float, high: float, kind: str) -> list[float] | None:
    """Where the legend of such a scale says a number; None leaves it to Vega-Lite."""
    if kind != "log":
        return None
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    most = 3 if last - first <= 3 else 1
    steps = (1, 2, 5)[:most]
    return [
        step * 10.0**k
        for k in range(first, last)
        for step in steps
        if low <= step * 10.0**k <= high
    ]


def step(count: int, room: int, least: float, most: float) -> float:
    """How wide each of ``count`` cells is, so that they fit ``room`` points if they can."""
    return round(max(least, min(most, room / max(count, 1))), 2)
