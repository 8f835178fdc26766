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
from ckdiff.kernels.memory import bytes_at
from ckdiff.layout import IntArray


class _Merging(Protocol):
    """What the reader of a base with an adapter also says of the spans that it acquired."""

    unmerged: IntArray  #: addresses of the base's own bytes
    asked: IntArray  #: how many elements the adapter asks to change


def merged_tensors(sides: tuple[Side, Side], names: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """For each pair whether its base is made by an adapter and the other side has the same dtype;
    None where no base is.
    """
    merged = set(sides[0].checkpoint.merged)
    if not merged:
        return None
    table = sides[0].checkpoint.table.names
    columns = zip(sides[0].index.tolist(), sides[0].dtypes, sides[1].dtypes, strict=True)
    return np.array([table[i] in merged and one == other for i, one, other in columns], np.bool_)


def add(
    total: IntArray,
    flags: npt.NDArray[np.bool_],
    segments: IntArray,
    window: Window,
    sides: tuple[Side, Side],
    reader: SpanReader,
) -> None:
    """Add to ``total``, the columns of a Survival, what a window holds."""
    said = cast(_Merging, reader)
    _, _, nbytes = window.wanted[0]
    for at in np.flatnonzero(flags[window.spans.tensors]).tolist():
        size = int(nbytes[at])
        addresses = (
            int(said.unmerged[at]),
            int(segments[at, abi.SEG_BASE]),
            int(segments[at, abi.SEG_TUNED]),
        )
        before, expected, found = (bytes_at(address, size) for address in addresses)
        width = DTYPES[sides[0].dtypes[int(window.spans.tensors[at])]].bits // 8
        total += astuple(survival(before, expected, found, width, int(said.asked[at])))


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
