"""Tables of counts: by tensor, layer, module, dtype or model. Counts are added, never ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from ckdiff.errors import UsageError
from ckdiff.naming import natural_key
from ckdiff.table import MaskTable, TensorRecord

By = Literal["tensor", "layer", "module", "dtype", "model"]


def layer_of(name: str) -> str:
    """The name up to and including its first integer part: ``model.layers.7``.

    A name without an integer part is its own layer.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if _is_integer(part):
            return ".".join(parts[: i + 1])
    return name


def module_of(name: str) -> str:
    """What follows the layer, without the last part, integers written ``*``.

    ``model.layers.7.self_attn.q_proj.weight`` -> ``self_attn.q_proj``; a name without an integer
    part is its own module.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if _is_integer(part):
            inner = parts[i + 1 :]
            inner = inner[:-1] or inner  # a bare parameter of the layer keeps its own name
            return ".".join("*" if _is_integer(p) else p for p in inner) or name
    return name


def _is_integer(part: str) -> bool:
    return part.isascii() and part.isdigit()


_KEYS: dict[str, Callable[[TensorRecord], str]] = {
    "layer": lambda t: layer_of(t.name),
    "module": lambda t: module_of(t.name),
    "dtype": lambda t: t.dtype,
    "model": lambda t: "model",
}


def density(changed: int, elements: int) -> float:
    """changed / elements, and 0 where there are no elements."""
    return changed / elements if elements else 0.0


def rule_counts(changed: dict[str, int], elements: int) -> dict[str, dict[str, Any]]:
    """The ``rules`` object of the JSON contracts."""
    return {
        rule: {"changed": count, "density": density(count, elements)}
        for rule, count in changed.items()
    }


def summarise(table: MaskTable, by: By = "layer") -> list[dict[str, Any]]:
    """Rows of counts. Raises UsageError for an unknown ``by``."""
    if by == "tensor":
        return [_tensor_row(record) for record in table]
    if by not in get_args(By):
        raise UsageError(f"cannot group by {by!r}", hint=f"one of {', '.join(get_args(By))}")
    groups: dict[str, tuple[list[int], dict[str, int]]] = {}
    if by == "model":
        groups["model"] = [0], dict.fromkeys(table.changed, 0)
    for record in table:
        elements, changed = groups.setdefault(
            _KEYS[by](record), ([0], dict.fromkeys(table.changed, 0))
        )
        elements[0] += record.elements
        for rule, count in record.changed.items():
            changed[rule] += count
    order = sorted(groups, key=natural_key) if by in ("module", "dtype") else list(groups)
    return [
        {
            "group": group,
            "elements": groups[group][0][0],
            "rules": rule_counts(groups[group][1], groups[group][0][0]),
        }
        for group in order
    ]


def _tensor_row(record: TensorRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": record.name,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "elements": record.elements,
        "rules": rule_counts(record.changed, record.elements),
    }
    if record.statistics is not None:
        row["statistics"] = record.statistics
    return row
