"""The tensors of a safetensors header in columns, and what they must be to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.dtypes import DTYPES
from ckdiff.errors import HeaderError

#: the largest number of elements, bits and bytes
LARGEST = 2**63 - 1
_CUT = "the file was cut: fetch it or save it again"


@dataclass(slots=True)
class Columns:
    """A parsed header before validation: offsets count from the start of the data area."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    elements: IntArray
    begins: IntArray
    ends: IntArray
    metadata: dict[str, str]


def validate(columns: Columns, data_bytes: int, file: str) -> IntArray:
    """Check the tensors against each other and against the data area; their sizes in bytes.

    The ranges must cover the ``data_bytes`` bytes exactly, without holes or overlaps, and each
    must have the size that its dtype and shape ask for. Raises HeaderError.
    """
    names, begins, ends = columns.names, columns.begins, columns.ends
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise wrong(file, name, "is there twice (duplicate key)")
            seen.add(name)
    if (bad := _first(begins > ends)) is not None:
        raise wrong(file, names[bad], f"begins at {begins[bad]} but ends at {ends[bad]}")
    if (bad := _first(ends > data_bytes)) is not None:
        raise wrong(
            file,
            names[bad],
            f"ends at byte {ends[bad]:,} of the data but there are only {data_bytes:,}",
            hint=_CUT,
        )

    bits = _bits(columns.dtypes)
    if (bad := _first(columns.elements > LARGEST // bits)) is not None:
        raise wrong(file, names[bad], f"{shape_text(columns.shapes[bad])} is too large (overflow)")
    wanted = columns.elements * bits
    if (bad := _first(wanted % 8 != 0)) is not None:
        raise wrong(
            file,
            names[bad],
            f"{columns.elements[bad]} elements of {columns.dtypes[bad]} do not fill whole bytes",
        )
    nbytes = ends - begins
    if (bad := _first(nbytes != wanted // 8)) is not None:
        raise wrong(
            file,
            names[bad],
            f"has {nbytes[bad]:,} bytes but {columns.dtypes[bad]} "
            f"{shape_text(columns.shapes[bad])} needs {wanted[bad] // 8:,}",
        )

    # Empty tensors sit between their neighbours: at equal begins the one with the smaller end first
    order = np.lexsort((ends, begins))
    expected = np.zeros(len(names) + 1, np.int64)
    expected[1:] = ends[order]
    if (bad := _first(begins[order] != expected[:-1])) is not None:
        name, at = names[order[bad]], int(begins[order[bad]])
        if at > expected[bad]:
            raise wrong(
                file,
                name,
                f"begins at byte {at:,}: a hole, the data before ends at {expected[bad]:,}",
            )
        raise wrong(file, name, f"overlaps {shown(names[order[bad - 1]])} at byte {at:,}")
    if expected[-1] != data_bytes:
        raise HeaderError(
            f"{file}: {data_bytes - int(expected[-1]):,} bytes after the last tensor belong to no "
            "tensor"
        )
    return nbytes


def _bits(dtypes: list[str]) -> IntArray:
    width = {name: dtype.bits for name, dtype in DTYPES.items()}
    return np.fromiter(map(width.__getitem__, dtypes), np.int64, len(dtypes))


def _first(bad: Any) -> int | None:
    """The position of the first True of a boolean column."""
    return int(np.argmax(bad)) if bad.any() else None


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for a message."""
    return shown(str(list(shape)), 80)[1:-1]


def wrong(file: str, name: str, reason: str, *, hint: str | None = None) -> HeaderError:
    """The error for one tensor of a file."""
    return HeaderError(f"{file}: tensor {shown(name)}: {reason}", hint=hint)
