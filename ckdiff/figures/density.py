"""Where a model changed: by layer and module, by depth, by kind of module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.channels import (
    COUNTS,
    SHARE,
    across,
    amount,
    counted,
    dashes,
    densities,
    kinds,
    listed,
)
from ckdiff.figures.channels import runs as by_run
from ckdiff.figures.figure import Figure, Row, of_rows, tooltip
from ckdiff.figures.style import span, step

_MOST_MODULES = 60  #: rows of a map; of more, those with the most elements
_MOST_COLUMNS = 200  #: layers side by side; of more, neighbours share a column
_MOST_KINDS = 40
_DENSITY = ("density", "density", SHARE)


def heat_map(stack: dict[str, Any], *, run: str, rule: str, name: str = "heatmap") -> Figure:
    """A map of one stack of layers.

    ``stack`` has ``name``, ``layers`` and ``modules`` (texts), and ``elements`` and ``changed``:
    for each module a list with a count for each layer; without elements there is no cell.
    """
    largest = sorted(range(len(stack["modules"])), key=lambda i: -sum(stack["elements"][i]))
    chosen = sorted(largest[:_MOST_MODULES])
    merged = -(-len(stack["layers"]) // _MOST_COLUMNS)
    rows = [row for i in chosen for row in _cells(stack, i, merged)]
    values = [row["density"] for row in rows]
    encoding = {
        "x": across("layer", "layer", order=stack["layers"][::merged]),
        "y": listed("module"),
        "color": densities(values, "datum.changed === 0"),
        "tooltip": tooltip(("module", "module", ""), ("layer", "layer", ""), _DENSITY, *COUNTS),
    }
    width = step(-(-len(stack["layers"]) // merged), 760, 5, 48)
    shape = {"width": {"step": width}, "height": {"step": 18}}
    spec = of_rows({**shape, "mark": {"type": "rect", "stroke": None}, "encoding": encoding})
    says = "Each cell is one module of one layer; grey cells did not change at all."
    if span(values)[2] == "log":
        says += " The scale is logarithmic."
    if len(largest) > len(chosen):
        says += f" The {len(chosen)} largest of {len(largest):,} modules are drawn."
    if merged > 1:
        says += f" {merged} neighbouring layers share a column."
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
            where = {"layer": stack["layers"][first], "module": stack["modules"][module]}
            out.append({**where, "elements": every, "changed": some, "density": some / every})
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
                where = {"run": label, "stack": stack, "layer": int(number)}
                rows.append(where | _counts(row, rule))
    said = ("run", "run", ""), ("stack", "layers", ""), ("layer", "layer", "d")
    encoding: dict[str, Any] = {
        "x": counted("layer", "layer", rows),
        "y": amount("density", form=SHARE, zero=True),
        "color": by_run([label for label, _ in runs]),
        "tooltip": tooltip(*said, _DENSITY, *COUNTS),
        **dashes([label for label, _ in runs]),
    }
    if len({row["stack"] for row in rows}) > 1:
        encoding |= {"strokeDash": kinds("stack", "layers"), "detail": {"field": "stack"}}
    line = {"mark": {"type": "line", "point": True}, "encoding": encoding}
    spec = of_rows({"width": 760, "height": 220, **line})
    says = "The share of each layer's elements that changed, from the first layer to the last."
    return Figure("depth", f"Density by depth ({rule})", says, rows, spec)


def _counts(row: dict[str, Any], rule: str) -> Row:
    counts = row["rules"][rule]
    return {
        "density": counts["density"],
        "changed": counts["changed"],
        "elements": row["elements"],
    }


def by_kind(runs: Sequence[tuple[str, list[dict[str, Any]]]], *, rule: str) -> Figure:
    """Density of each kind of module, a bar for each run: rows of a summary by module."""
    sizes: dict[str, int] = {}
    for _, modules in runs:
        for row in modules:
            sizes[row["group"]] = max(sizes.get(row["group"], 0), row["elements"])
    largest = set(sorted(sizes, key=lambda group: -sizes[group])[:_MOST_KINDS])
    rows = [
        {"run": label, "module": row["group"], **_counts(row, rule)}
        for label, modules in runs
        for row in modules
        if row["group"] in largest
    ]
    encoding: dict[str, Any] = {
        "y": listed("module"),
        "x": amount("density", form=SHARE),
        "color": by_run([label for label, _ in runs]),
        "tooltip": tooltip(("run", "run", ""), ("module", "module", ""), _DENSITY, *COUNTS),
    }
    if len(runs) > 1:
        encoding["yOffset"] = kinds("run")
    height = {"step": 18 + 7 * min(len(runs) - 1, 8), "for": "position"}
    spec = of_rows({"width": 560, "height": height, "mark": "bar", "encoding": encoding})
    says = "Layers are added up: * stands for their numbers."
    if len(sizes) > len(largest):
        says += f" The {_MOST_KINDS} largest of {len(sizes):,} kinds are drawn."
    return Figure("kinds", f"Density by kind of module ({rule})", says, rows, spec)
