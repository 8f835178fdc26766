"""Which tensors are quantised, and where their scales are: by names, dtypes and shapes.

What is not known for certain is left as it is stored, and a note says so: a value that is made of
the wrong scale would be a wrong answer that nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.checkpoints.views.quantisedgrid import Declared, Grid, Kind, grid_of, mx_grid
from ckdiff.kernels.scaling import QUANTISED, Scaling

#: what a scale is called after a tensor, and after a module whose ``weight`` it scales
_OF_TENSOR = ("_scale_inv", "_scale")
_OF_MODULE = (".scale", ".qscale_weight", ".scale_weight", ".weight_scale_inv", ".weight_scale")
_SCALES = ("scale", "scale_inv", "scales", "qscale_weight", "scale_weight")
#: what bytes of FP4 in groups are called, their scales, and whether values are stored turned
_GROUPED = (("_blocks", "_scales", True), (".blocks", ".scales", False))
_PACKED = "_packed"  # elements of less than a byte, under the name of the tensor

_INTEGERS = "integers with zero points or an order of their own"
_BITSANDBYTES = "bitsandbytes"
_TWO = "NVFP4 or others with two scales"
_QUANTISED = (*QUANTISED, "U8", "I32", "U32")  # what may hold quantised elements
#: endings that tell of a scheme whose values are not one product, and of the tensor that they tell
_FOREIGN = (
    (".absmax", "", _BITSANDBYTES),
    (".quant_map", "", _BITSANDBYTES),
    (".SCB", ".weight", _BITSANDBYTES),
    ("_scale_2", "", _TWO),
    ("_global_scale", "", _TWO),
    ("_zero_point", "", _INTEGERS),
    ("_offset", "", _INTEGERS),
    ("_g_idx", "", _INTEGERS),
    (".weight_scales", ".weight", "EETQ"),
)
#: endings of quantised tensors themselves
_FOREIGN_TENSORS = (
    (".qweight", ("I32", "U32", "I16", "U8", "I8"), "GPTQ or AWQ"),
    ("_packed", ("I32",), "packed integers"),
    ("._data", QUANTISED, "quanto"),
    (".W_q", ("U8", "I8", "I32", "U32"), "HQQ"),
    (".codes", ("I8", "U8", "I16"), "AQLM"),
    ("_qdata", (*QUANTISED, "U8"), "torchao"),
)


#: scales of what goes in and out of a module, which static schemes store beside its weights
_OF_ACTIVATIONS = (
    ".input_scale", ".output_scale", ".act_scale", ".activation_scale", ".k_scale", ".v_scale",
    ".q_scale", ".prob_scale",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scaled:
    """The tensors that a tensor's values come of, by position in the table that has both."""

    elements: int
    scales: int
    scaling: Scaling | None  #: of what is stored; None where there are no elements
    turned: bool  #: whether the values have the last two dimensions exchanged


@dataclass(slots=True)
class Quantised:
    """A table by value: quantised tensors are F32, and their scales are gone."""

    table: TensorTable
    within: IntArray  #: for each tensor its position in the table as stored
    scaled: Mapping[int, Scaled]  #: by position in ``table``
    packed: str | None  #: the schemes whose values ckdiff does not know, and a tensor of each
    notes: list[str]  #: what is left as it is stored, one line each


@dataclass(slots=True)
class _Found:
    table: TensorTable
    declared: Declared
    at: dict[str, int]
    foreign: dict[int, str] = field(default_factory=dict)  #: the scheme, by position
    scaled: dict[int, tuple[str, tuple[int, ...], Scaled]] = field(default_factory=dict)
    odd: list[tuple[int, int]] = field(default_factory=list)  #: elements and scales
    lacking: list[int] = field(default_factory=list)

    grids: dict[object, Grid | None] = field(default_factory=dict)  #: many tensors are alike

    def kind(self, position: int) -> Kind:
        return Kind(self.table.dtypes[position], self.table.shapes[position])

    def grid(
        self, elements: int, scales: int, turned: bool | None, as_experts: bool
    ) -> Grid | None:
        """How a tensor is scaled; ``turned`` is given for FP4 in groups."""
        kinds = self.kind(elements), self.kind(scales)
        key = *kinds, turned, as_experts
        if key not in self.grids:
            self.grids[key] = (
                grid_of(*kinds, self.declared, as_experts=as_experts)
                if turned is None
                else mx_grid(*kinds, turned=turned)
            )
        return self.grids[key]


def quantised(table: TensorTable, declared: Declared | None = None) -> Quantised:
    """What of a table is quantised. Nothing is read, and nothing in a table is an error.

    Values are float32(element) * float32(scale). A tensor is left alone whose scheme is another, or
    whose scales are missing, there twice, or of a shape that does not say which is whose.
    """
    found = _Found(table, declared or Declared(), {n: i for i, n in enumerate(table.names)})
    for position, name in enumerate(table.names):
        _tell_foreign(found, position, name)
    for position, name in enumerate(table.names):
        if position not in found.foreign:
            _look(found, position, name)
    return _by_value(found)


def _tell_foreign(found: _Found, position: int, name: str) -> None:
    for ending, instead, scheme in _FOREIGN:
        if name.endswith(ending):
            stem = name.removesuffix(ending) + instead
            for of in (stem, stem + _PACKED):
                if of in found.at and found.table.dtypes[found.at[of]] in _QUANTISED:
                    found.foreign[found.at[of]] = scheme
    for ending, dtypes, scheme in _FOREIGN_TENSORS:
        if name.endswith(ending) and found.table.dtypes[position] in dtypes:
            found.foreign.setdefault(position, scheme)


def _look(found: _Found, position: int, name: str) -> None:
    """Find the scales of a tensor, if it is one that has them."""
    dtype = found.table.dtypes[position]
    if (dtype not in QUANTISED and dtype != "U8") or name.endswith(_SCALES):
        return
    for ending, of, turned in _GROUPED:
        if dtype == "U8" and name.endswith(ending):
            value = name.removesuffix(ending)
            scales = [found.at[value + of]] if value + of in found.at else []
            _take(found, position, value, scales, turned=turned)
            return
    value = name.removesuffix(_PACKED) if name.endswith(_PACKED) else name
    scales = [found.at[n] for n in dict.fromkeys(_names(value)) if n in found.at]
    if scales or (dtype in QUANTISED and dtype != "I8") or value != name:
        _take(found, position, value, scales)
    elif dtype == "I8" and name.endswith("weight") and len(found.table.shapes[position]) > 1:
        found.lacking.append(position)


def _names(value: str) -> Iterator[str]:
    """What the scales of a tensor may be called."""
    for ending in _OF_TENSOR:
        yield value + ending
    if value.endswith(".weight") or value == "weight":
        module = value.removesuffix("weight").removesuffix(".")
        for ending in _OF_MODULE:
            yield module + ending if module else ending[1:]


def _take(
    found: _Found, position: int, value: str, scales: list[int], *, turned: bool | None = None
) -> None:
    """Note how a tensor is scaled, or why it is not. ``turned`` is given for FP4 in groups."""
    if not scales:
        found.lacking.append(position)
        return
    alone = len(scales) == 1 and (value == found.table.names[position] or value not in found.at)
    as_experts = found.table.names[scales[0]] == f"{value}_scale" and value[-6:] != "weight"
    grid = found.grid(position, scales[0], turned, as_experts) if alone else None
    if grid is None:
        found.odd.append((position, scales[0]))
        return
    turned = bool(turned) and len(found.table.shapes[position]) == 4
    how = Scaled(position, scales[0], grid.scaling, turned)
    found.scaled[position] = value, grid.shape, how


def _of_activations(found: _Found) -> set[int]:
    """The scales of what goes through modules with quantised weights: they are no weights."""
    named = [(n, at) for n, at in found.at.items() if n.endswith(_OF_ACTIVATIONS)]
    if not named:
        return set()
    modules = {name.rpartition(".")[0] for name, _, _ in found.scaled.values()}
    modules |= {name.rpartition(".")[0] for name in modules}  # of a cache, beside the projections
    return {at for name, at in named if name.rpartition(".")[0] in modules}


def _by_value(found: _Found) -> Quantised:
    table = found.table
    _settle(found)
    gone = {how.scales for _, _, how in found.scaled.values()} | _of_activations(found)
    within = [i for i in range(len(table)) if i not in gone]
    names, dtypes, shapes = [], [], []
    nbytes = table.nbytes[within]
    scaled = {}
    for at, position in enumerate(within):
        name, dtype, shape = table.names[position], table.dtypes[position], table.shapes[position]
        if position in found.scaled:
            name, shape, scaled[at] = found.scaled[position]
            dtype, nbytes[at] = "F32", 4 * prod(shape)
        names.append(name)
        dtypes.append(dtype)
        shapes.append(shape)
    found.lacking = [i for i in found.lacking if i not in gone]
    packed = _packed(found)
    return Quantised(
        TensorTable(names, dtypes, shapes, nbytes, table.absent),
        np.array(within, np.int64),
        scaled,
        packed,
        _notes(found, packed),
    )


def _settle(found: _Found) -> None:
    """Leave alone what claims a scale, or a name, that another tensor claims as well."""
    scales: dict[int, list[int]] = {}
    names: dict[str, list[int]] = {}
    for position, (name, _, how) in found.scaled.items():
        scales.setdefault(how.scales, []).append(position)
        names.setdefault(name, []).append(position)
    alike = [*scales.values(), *names.values(), *([i, i] for i in scales if i in found.scaled)]
    for position in {i for claimants in alike if len(claimants) > 1 for i in claimants}:
        found.odd.append((position, found.scaled.pop(position)[2].scales))


def _packed(found: _Found) -> str | None:
    schemes: dict[str, list[int]] = {}
    for position, scheme in sorted(found.foreign.items()):
        schemes.setdefault(scheme, []).append(position)
    parts = [f"{scheme} ({_some(found.table, which)})" for scheme, which in sorted(schemes.items())]
    return ", ".join(parts) or None


def _notes(found: _Found, packed: str | None) -> list[str]:
    table, notes = found.table, []
    if packed is not None:
        notes.append(f"compared as bits, as they are stored: {packed}")
    if found.odd:
        position, scales = min(found.odd)
        kinds = [f"{table.dtypes[i]} {list(table.shapes[i])}" for i in (position, scales)]
        notes.append(
            "compared as bits, because it is not clear which scale belongs to which tensor: "
            f"{_some(table, sorted({i for i, _ in found.odd}))} ({kinds[0]}, and "
            f"{shown(table.names[scales], 80)} {kinds[1]})"
        )
    if found.lacking:
        some = _some(table, sorted(found.lacking))
        notes.append(f"compared as stored, because there are no scales: {some}")
    return notes


def _some(table: TensorTable, which: list[int]) -> str:
    """How many tensors, and one of them."""
    name = shown(table.names[which[0]], 80)
    return name if len(which) == 1 else f"{len(which):,} tensors, such as {name}"
