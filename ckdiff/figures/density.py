"""Where a model changed: by layer and module, by depth, by kind of module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, Row, of_rows, tooltip
from ckdiff.figures.style import NOTHING, marks, runs_colour, span, step

_MOST_MODULES = 60  #: rows of a map; of more, those with the most elements
_MOST_COLUMNS = 200  #: layers side by side; of more, neighbours share a column
_MOST_KINDS = 40
_COUNTS = (("changed", "changed", ","), ("elements", "elements", ","))
_SHARE = ".3~%"


def heat_map(stack: dict[str, Any], *, run: str, rule: str, name: str = "heatmap") -> Figure:
    """A map of one stack of layers.

    ``stack`` has ``name``, ``layers`` and ``modules`` (texts), and ``elements`` and ``changed``:
    for each module a list with a count for each layer; without elements there is no cell.
    """
    largest = sorted(range(len(stack["modules"])), key=lambda i: -sum(stack["elements"][i]))
    chosen = sorted(largest[:_MOST_MODULES])
    merged = -(-len(stack["layers"]) // _MOST_COLUMNS)
    rows = [row for i in chosen for row in _cells(stack, i, merged)]
    columns = -(-len(stack["layers"]) // merged)
    low, high, kind = span([row["density"] for row in rows])
    says = "Each cell is one module of one layer; grey cells did not change at all."
    if kind == "log":
        says += " The scale is logarithmic."
    if len(largest) > len(chosen):
        says += f" The {len(chosen)} largest of {len(largest):,} modules are drawn."
    if merged > 1:
        says += f" {merged} neighbouring layers share a column."
    spec = of_rows(
        {
            "width": {"step": step(columns, 760, 5, 30)},
            "height": {"step": 18},
            "mark": {"type": "rect", "stroke": None},
            "encoding": {
                "x": {
                    "field": "layer", "type": "ordinal", "sort": None,
                    "axis": {"title": "layer", "labelAngle": 0, "labelOverlap": "greedy"},
                },
                "y": {
                    "field": "module", "type": "ordinal", "sort": None,
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
                    ("module", "module", ""), ("layer", "layer", ""),
                    ("density", "density", _SHARE), *_COUNTS,
                ),
            },
        }
    )  # fmt: skip
    where = stack["name"] or "the layers"
    return Figure(name, f"{run}: density of {where} by layer and module ({rule})", says, rows, spec)


def _cells(stack: dict[str, Any], module: int, merged: int) -> list[Row]:
    """The cells of one module that there are; ``merged`` neighbouring layers make one."""
    elements, changed = stack["elements"][module], stack["changed"][module]
    out = []
    for first in range(0, len(elements), merged):
        every = sum(elements[first : first + merged])
        some = sum(changed[first : first + merged])
        if every:
            out.append(
                {
                    "layer": stack["layers"][first],
                    "module": stack["modules"][module],
                    "elements": every,
                    "changed": some,
                    "density": some / every,
                }
            )
    return out


def by_depth(runs: Sequence[tuple[str, list[dict[str, Any]]]], *, rule: str) -> Figure:
    """Density over the depth of the model, a line for each run.

    ``runs`` are (label, rows of a summary by layer); groups that are no numbered layer are left to
    the other pictures. A row has ``group`` and ``rules``.
    """
    rows = []
    for label, layers in runs:
        for row in layers:
            stack, _, number = row["group"].rpartition(".")
            if number.isascii() and number.isdigit():
                counts = row["rules"][rule]
                rows.append(
                    {
                        "run": label,
                        "stack": stack,
                        "layer": int(number),
                        "density": counts["density"],
                        "changed": counts["changed"],
                        "elements": row["elements"],
                    }
                )
    stacks = {row["stack"] for row in rows}
    encoding: dict[str, Any] = {
        "x": {"field": "layer", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}},
        "y": {
            "field": "density",
            "type": "quantitative",
            "axis": {"format": _SHARE},
            "scale": {"zero": True},
        },
        "color": runs_colour([label for label, _ in runs]),
        "tooltip": tooltip(
            ("run", "run", ""), ("stack", "layers", ""), ("layer", "layer", "d"),
            ("density", "density", _SHARE), *_COUNTS,
        ),
    }  # fmt: skip
    if len(stacks) > 1:
        encoding["strokeDash"] = {"field": "stack", "type": "nominal"}
        encoding["detail"] = {"field": "stack"}
    spec = of_rows(
        {"width": 760, "height": 220, "mark": {"type": "line", "point": True}, "encoding": encoding}
    )
    says = "The share of each layer's elements that changed, from the first layer to the last."
    return Figure("depth", f"Density by depth ({rule})", says, rows, spec)


def by_kind(runs: Sequence[tuple[str, list[dict[str, Any]]]], *, rule: str) -> Figure:
    """Density of each kind of module, a bar for each run: rows of a summary by module."""
    sizes: dict[str, int] = {}
    for _, modules in runs:
        for row in modules:
            sizes[row["group"]] = max(sizes.get(row["group"], 0), row["elements"])
    largest = set(sorted(sizes, key=lambda group: -sizes[group])[:_MOST_KINDS])
    rows = [
        {
            "run": label,
            "module": row["group"],
            "density": row["rules"][rule]["density"],
            "changed": row["rules"][rule]["changed"],
            "elements": row["elements"],
        }
        for label, modules in runs
        for row in modules
        if row["group"] in largest
    ]
    encoding: dict[str, Any] = {
        "y": {
            "field": "module", "type": "nominal", "sort": None,
            "axis": {"title": None, "labelLimit": 260, "domain": False, "ticks": False},
        },
        "x": {"field": "density", "type": "quantitative", "axis": {"format": _SHARE}},
        "color": runs_colour([label for label, _ in runs]),
        "tooltip": tooltip(
            ("run", "run", ""), ("module", "module", ""), ("density", "density", _SHARE), *_COUNTS
        ),
    }  # fmt: skip
    if len(runs) > 1:
        encoding["yOffset"] = {"field": "run", "type": "nominal", "sort": None}
    spec = of_rows(
        {
            "width": 560,
            "height": {"step": 18 + 7 * min(len(runs) - 1, 8), "for": "position"},
            "mark": {"type": "bar", "tooltip": True},
            "encoding": encoding,
        }
    )
    says = "Layers are added up: * stands for their numbers."
    if len(sizes) > len(largest):
        says += f" The {_MOST_KINDS} largest of {len(sizes):,} kinds are drawn."
    return Figure("kinds", f"Density by kind of module ({rule})", says, rows, spec)
