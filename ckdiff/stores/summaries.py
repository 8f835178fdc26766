"""Tables of counts: by tensor, layer, module, dtype or model. Counts are added, never ratios."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from ckdiff.errors import CkdiffError, UsageError, one_of
from ckdiff.naming import BY, natural_key
from ckdiff.naming import By as By
from ckdiff.rules import Rule
from ckdiff.stores.table import IntArray, MaskTable, Statistics, TensorRecord, number

Row = dict[str, Any]


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


def density(changed: int, elements: int) -> float:
    """changed / elements, and 0 where there are no elements."""
    return changed / elements if elements else 0.0


def rule_counts(changed: dict[str, int], elements: int) -> dict[str, dict[str, Any]]:
    """The ``rules`` object of the JSON contracts."""
    return {
        rule: {"changed": count, "density": density(count, elements)}
        for rule, count in changed.items()
    }


def summarise(
    table: MaskTable, by: By = "layer", *, sort: str | None = None, top: int | None = None
) -> list[Row]:
    """Rows of counts, in natural order of what they stand for.

    ``sort`` names a column (see :func:`columns`): numbers are sorted largest first. ``top`` keeps
    that many rows; without ``sort`` those of the highest density under the first rule. Raises
    UsageError for an unknown ``by`` or ``sort``.
    """
    checked_by(by)
    if top is not None and top < 1:
        raise UsageError(f"top must be at least 1, not {top}")
    if sort is None and top is not None:
        sort = "density"
    order = None if sort is None else find_column(table, by, sort)
    rows = [_tensor_row(record) for record in table] if by == "tensor" else _grouped(table, by)
    if order is not None:
        rows.sort(key=order.sort_key)
    return rows if top is None else rows[:top]


def checked_by(by: str) -> By:
    """``by`` if there is such a grouping; raises UsageError."""
    if by not in BY:
        raise UsageError(f"cannot group by {by!r}", hint=one_of(by, BY))
    return by


def _tensor_row(record: TensorRecord) -> Row:
    row: Row = {
        "name": record.name,
        "dtype": record.dtype,
        "shape": list(record.shape),
        "elements": record.elements,
        "rules": rule_counts(record.changed, record.elements),
    }
    if record.tuned_dtype != record.dtype:
        row["tuned_dtype"] = record.tuned_dtype
    if record.rows is not None:
        row["rows"] = list(record.rows)
    if record.statistics is not None:
        row["statistics"] = record.statistics
    return row


def _grouped(table: MaskTable, by: By) -> list[Row]:
    groups, index = group_index(table.names, table.kinds, by)
    elements = _sums(index, table.elements, len(groups)).tolist()
    changed = {
        rule: _sums(index, counts, len(groups)).tolist() for rule, counts in table.changed.items()
    }
    moved = None if table.statistics is None else _statistics(table.statistics, index, len(groups))
    rows: list[Row] = []
    for i in group_order(groups, by):
        counts = {rule: totals[i] for rule, totals in changed.items()}
        row: Row = {
            "group": groups[i],
            "elements": elements[i],
            "rules": rule_counts(counts, elements[i]),
        }
        if moved is not None and moved[i] is not None:
            row["statistics"] = moved[i]
        rows.append(row)
    return rows


def group_index(names: Sequence[str], dtypes: Sequence[str], by: By) -> tuple[list[str], IntArray]:
    """(the groups of some tensors in order of appearance, which of them each tensor is in)."""
    if by == "model":
        return ["model"], np.zeros(len(names), np.int64)
    if by == "tensor":
        return list(names), np.arange(len(names), dtype=np.int64)
    if by == "dtype":
        return _index(dtypes)
    return _index(map(layer_of if by == "layer" else module_of, names))


def group_order(groups: Sequence[str], by: By) -> list[int]:
    """The positions of groups in the order in which they are shown."""
    if by in ("layer", "tensor"):  # met in natural order: the order of tensor names
        return list(range(len(groups)))
    return sorted(range(len(groups)), key=lambda i: natural_key(groups[i]))


def _index(keys: Iterable[str]) -> tuple[list[str], IntArray]:
    """(the distinct keys in order of appearance, which of them each item has)."""
    positions: dict[str, int] = {}
    index = np.array([positions.setdefault(key, len(positions)) for key in keys], np.int64)
    return list(positions), index


def _sums(index: IntArray, values: IntArray, groups: int) -> IntArray:
    """Exact integer sums of each group."""
    out = np.zeros(groups, np.int64)
    np.add.at(out, index, values)
    return out


def _histograms(found: Statistics, index: IntArray, groups: int) -> list[list[int]]:
    """The sum of the histograms of each group's tensors."""
    out: list[list[int]] = [[] for _ in range(groups)]
    for i in np.flatnonzero(found.defined).tolist():
        pairs = zip_longest(out[index[i]], found.ulp_histogram[i], fillvalue=0)
        out[index[i]] = [a + b for a, b in pairs]
    return out


def _statistics(found: Statistics, index: IntArray, groups: int) -> list[Row | None]:
    """The statistics of each group, of the tensors whose dtype has a numeric meaning.

    Sums are taken in tensor order, so they depend on nothing else. Values that are not finite in
    float64 stay so, and become null in the end.
    """
    of = index[found.defined]

    def sums(values: Any) -> Any:
        out = np.zeros(groups, np.float64)
        np.add.at(out, of, values[found.defined])
        return out

    with np.errstate(all="ignore"):
        norms = {
            name: np.sqrt(sums(np.square(getattr(found, name))))
            for name in ("l2_delta", "l2_base", "l2_tuned")
        }
        sum_abs, dot = sums(found.sum_abs_delta), sums(found.dot)
        cosines = np.clip(dot / (norms["l2_base"] * norms["l2_tuned"]), -1, 1)
        largest = np.zeros(groups, np.float64)
        np.maximum.at(largest, of, found.max_abs_delta[found.defined])
    flips = _sums(of, found.sign_flips[found.defined], groups)
    nonfinite = _sums(of, found.nonfinite[found.defined], groups)
    histograms = _histograms(found, index, groups)
    members = np.bincount(of, minlength=groups)
    return [
        {
            "sum_abs_delta": number(sum_abs[g]),
            "l2_delta": number(norms["l2_delta"][g]),
            "max_abs_delta": number(largest[g]),
            "l2_base": number(norms["l2_base"][g]),
            "l2_tuned": number(norms["l2_tuned"][g]),
            "cosine": number(cosines[g]),
            "sign_flips": int(flips[g]),
            "nonfinite": int(nonfinite[g]),
            "ulp_histogram": histograms[g],
        }
        if members[g]
        else None
        for g in range(groups)
    ]


def relative_delta(row: Row) -> float | None:
    """How far a row's elements moved, ‖Δ‖/‖base‖; None without statistics or a base norm."""
    found = row.get("statistics")
    if not found or found["l2_delta"] is None or not found["l2_base"]:
        return None
    return number(found["l2_delta"] / found["l2_base"])


@dataclass(frozen=True, slots=True)
class Column:
    """Something that every row has one value of, such as ``density:exact``."""

    name: str
    value: Callable[[Row], Any]  #: None where a row has none
    numeric: bool = True

    def sort_key(self, row: Row) -> Any:
        """Numbers: largest first and absent ones last; text: natural order."""
        value = self.value(row)
        if not self.numeric:
            return natural_key(str(value))
        return (value is None, 0 if value is None else -value)


#: statistics that are one number
_MEASURES = (
    "sum_abs_delta", "l2_delta", "max_abs_delta", "l2_base", "l2_tuned", "cosine", "sign_flips",
    "nonfinite",
)  # fmt: skip


def columns(table: MaskTable, by: By) -> list[Column]:
    """The columns of ``summarise(table, by)``: what ``--sort`` takes and ``--csv`` prints.

    ``changed:RULE`` and ``density:RULE`` are there for each rule; statistics, and what differs
    between the sides of a tensor, only where a store has any.
    """
    if by == "tensor":
        found = [
            Column("name", lambda row: row["name"], numeric=False),
            Column("dtype", lambda row: row["dtype"], numeric=False),
            Column("shape", lambda row: "x".join(map(str, row["shape"])), numeric=False),
        ]
        if table.tuned_dtypes is not None:
            found.append(Column("tuned_dtype", _tuned_dtype, numeric=False))
        if table.resized:
            found += [Column(f"{side}_rows", _rows(side)) for side in ("base", "tuned")]
    else:
        found = [Column("group", lambda row: row["group"], numeric=False)]
    found.append(Column("elements", lambda row: row["elements"]))
    for rule in table.changed:
        found.append(Column(f"changed:{rule}", _counted(rule, "changed")))
        found.append(Column(f"density:{rule}", _counted(rule, "density")))
    if table.statistics is not None:
        found.append(Column("relative_delta", relative_delta))
        found += [Column(name, _measured(name)) for name in _MEASURES]
    return found


def find_column(table: MaskTable, by: By, name: str) -> Column:
    """The column called ``name``; raises UsageError that lists them.

    A rule may be spelled any way, and left out for the first rule: ``density``.
    """
    known = {column.name: column for column in columns(table, by)}
    first = next(iter(table.changed))
    label = "name" if by == "tensor" else "group"
    synonyms = {"changed": f"changed:{first}", "density": f"density:{first}"}
    synonyms |= dict.fromkeys(("name", "group", by), label)
    wanted = synonyms.get(name, name)
    kind, colon, rule = wanted.partition(":")
    if colon:
        with contextlib.suppress(CkdiffError):  # not a rule: said below, with what there is
            wanted = f"{kind}:{Rule.parse(rule)}"
    if wanted not in known:
        raise UsageError(f"there is no column {name!r}", hint=one_of(name, known))
    return known[wanted]


def _counted(rule: str, what: str) -> Callable[[Row], Any]:
    return lambda row: row["rules"][rule][what]


def _tuned_dtype(row: Row) -> str:
    return str(row.get("tuned_dtype", row["dtype"]))


def _rows(side: str) -> Callable[[Row], Any]:
    """How many rows a side has; None for a tensor without any."""

    def value(row: Row) -> int | None:
        here = row["shape"][0] if row["shape"] else None
        return row.get("rows", [here, here])[side == "tuned"]  # type: ignore[no-any-return]

    return value


def _measured(name: str) -> Callable[[Row], Any]:
    return lambda row: (row.get("statistics") or {}).get(name)


_SMALL_GRID = 1 << 14  # cells of a map of layers and modules
_SPARSEST = 16  # cells for each tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers whose names differ in their number only, by module: the data of a heat map."""

    name: str  #: ``model.layers``; empty where names begin with the number
    layers: list[str]  #: the numbers, in natural order
    modules: list[str]  #: in natural order
    elements: IntArray  #: modules x layers; 0 where a layer lacks the module
    changed: IntArray


def stacks(table: MaskTable, rule: str) -> list[Stack]:
    """The stacks of layers of a model; tensors without an integer in their name are in none, nor
    are layers that have hardly a module in common.
    """
    found: dict[str, list[tuple[str, str, int]]] = {}
    for i, name in enumerate(table.names):
        layer = layer_of(name)
        prefix, _, last = layer.rpartition(".")
        if _is_integer(last):
            found.setdefault(prefix, []).append((last, module_of(name), i))
    made = (_stack(table, rule, prefix, members) for prefix, members in found.items())
    return [stack for stack in made if stack is not None]


def _stack(
    table: MaskTable, rule: str, name: str, members: Sequence[tuple[str, str, int]]
) -> Stack | None:
    """None where the layers have hardly a module in common: the grid would be empty, and huge."""
    layers = sorted({layer for layer, _, _ in members}, key=natural_key)
    modules = sorted({module for _, module, _ in members}, key=natural_key)
    if len(layers) * len(modules) > max(_SMALL_GRID, _SPARSEST * len(members)):
        return None
    column = {layer: i for i, layer in enumerate(layers)}
    row = {module: i for i, module in enumerate(modules)}
    tensors = np.array([i for _, _, i in members], np.int64)
    cells = (
        np.array([row[module] for _, module, _ in members], np.int64),
        np.array([column[layer] for layer, _, _ in members], np.int64),
    )
    grids = []
    for values in (table.elements, table.changed[rule]):
        grid = np.zeros((len(modules), len(layers)), np.int64)
        np.add.at(grid, cells, values[tensors])
        grids.append(grid)
    return Stack(name, layers, modules, *grids)
