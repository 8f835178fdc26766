"""What became of an adapter's changes in the other side of a diff: counted while it is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import SpanReader
from ckdiff.checkpoints.views.adaptersurvival import Survival, survival
from ckdiff.diffs.sides import Side, Window
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi
from ckdiff.kernels.casting import narrow
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.layout import IntArray


class _Merging(Protocol):
    """What the reader of a base with an adapter also says of the spans that it acquired."""

    unmerged: IntArray  #: addresses of the base's own bytes
    asked: IntArray  #: how many elements the adapter asks to change


def merged_tensors(sides: tuple[Side, Side], names: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """For each pair whether its base is made by an adapter; None where no base is."""
    merged = set(sides[0].checkpoint.merged)
    if not merged:
        return None
    table = sides[0].checkpoint.table.names
    return np.array([table[i] in merged for i in sides[0].index.tolist()], np.bool_)


def add(
    total: IntArray,
    flags: npt.NDArray[np.bool_],
    segments: IntArray,
    window: Window,
    sides: tuple[Side, Side],
    reader: SpanReader,
) -> None:
    """Add to ``total``, the columns of a Survival, what a window holds.

    Two dtypes are held against each other in the narrower one: a change arrived where both sides
    are the same once they are rounded to it.
    """
    said = cast(_Merging, reader)
    (_, _, of_base), (_, _, of_tuned) = window.wanted
    for at in np.flatnonzero(flags[window.spans.tensors]).tolist():
        tensor = int(window.spans.tensors[at])
        base, tuned = (side.dtypes[tensor] for side in sides)
        shared = min(tuned, base, key=lambda name: DTYPES[name].bits)
        before, expected, found = (
            _rounded(bytes_at(int(address), int(size)), dtype, shared)
            for address, size, dtype in (
                (said.unmerged[at], of_base[at], base),
                (segments[at, abi.SEG_BASE], of_base[at], base),
                (segments[at, abi.SEG_TUNED], of_tuned[at], tuned),
            )
        )
        width = DTYPES[shared].bits // 8
        total += astuple(survival(before, expected, found, width, int(said.asked[at])))


def _rounded(data: Bytes, dtype: str, wanted: str) -> Bytes:
    """Floats in another dtype, or as they are."""
    if dtype == wanted:
        return data
    out = np.empty(len(data) * DTYPES[wanted].bits // DTYPES[dtype].bits, np.uint8)
    narrow(data, dtype, wanted, out)
    return out


def columns() -> IntArray:
    """A sum of nothing."""
    return np.array(astuple(Survival()), np.int64)


def as_json(total: IntArray | None) -> dict[str, Any] | None:
    """What ``diff --json`` says of it; None where no adapter was merged."""
    if total is None:
        return None
    found = Survival(*total.tolist())
    return {
        "elements": found.elements,
        "asked": found.asked,
        "visible": found.visible,
        "arrived": found.arrived,
        "lost": found.lost,
        "other": found.other,
        "extra": found.extra,
        "share": found.share,
    }
