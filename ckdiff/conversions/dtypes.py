"""Which dtype each tensor of a converted checkpoint has."""

from __future__ import annotations

import re

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError, printable

#: dtype of safetensors -> what people call it
DTYPE_NAMES = {"BF16": "bf16", "F16": "f16", "F32": "f32"}

#: what quantised weights are stored in, besides floats of 8 bits and less
_PACKED = {"U8", "I8", "I32", "U32"}
#: the last part of the names of what quantised weights are multiplied with, or looked up in
_SCALE = re.compile(r".*(scale|absmax|quant_map|zero_?point|codebook).*|q?zeros", re.IGNORECASE)


def checked_dtype(value: str | None) -> str | None:
    """The dtype's name in safetensors; raises UsageError for what is none of the three."""
    if value is None:
        return None
    for dtype, name in DTYPE_NAMES.items():
        if value == name:
            return dtype
    raise UsageError(
        f"the dtype must be one of {', '.join(DTYPE_NAMES.values())}, "
        f"not {printable(str(value)[:60])}"
    )


def chosen_dtypes(table: TensorTable, wanted: str | None) -> tuple[list[str], list[str]]:
    """The dtype of each tensor as it is written, and the names of floats that stay as they are.

    These are what belongs to quantised weights, in a checkpoint that has some: 8-bit floats, which
    mean a number only together with a scale, and all that is called a scale. Whoever reads them
    knows them by their dtypes.
    """
    if wanted is None:
        return list(table.dtypes), []
    quantised = _is_quantised(table)
    found, untouched = [], []
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        is_float = DTYPES[dtype].kind == "float"
        if is_float and quantised and (_is_scale(name) or DTYPES[dtype].bits < 16):
            untouched.append(name)
            is_float = False
        found.append(wanted if is_float else dtype)
    return found, untouched


def _is_quantised(table: TensorTable) -> bool:
    """Whether some module has both packed numbers and a scale for them."""
    packed, scaled = set[str](), set[str]()
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        module = name.rpartition(".")[0]
        if _is_scale(name):
            # it may be called after its tensor, or lie in a module of its own
            scaled |= {module, module.rpartition(".")[0]}
        elif dtype in _PACKED or DTYPES[dtype].bits < 8 or dtype.startswith("F8_"):
            packed |= {module, name}
    return not packed.isdisjoint(scaled)


def _is_scale(name: str) -> bool:
    return _SCALE.fullmatch(name.rpartition(".")[2]) is not None
