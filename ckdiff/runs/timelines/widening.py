"""Spans of a window as kernels take them: where they are, or a copy in a dtype that holds more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.diffs.sides import Side, Wanted
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.casting import widen
from ckdiff.kernels.memory import U8, Bytes, bytes_at, place
from ckdiff.layout import Spans
from ckdiff.runs.timelines.pairs import Fold


@dataclass(slots=True)
class Window:
    """Some addresses of a chunk, and what has to be read of each side for them."""

    first: int
    stop: int
    spans: Spans
    rows: IntArray
    wanted: list[Wanted]

    def nbytes(self, folds: Sequence[Fold]) -> int:
        """Bytes that are read, of all sides but those that are made of the one before."""
        sides = zip(self.wanted, folds, strict=True)
        return sum(int(nbytes.sum()) for (_, _, nbytes), fold in sides if fold.start is not None)


@dataclass(slots=True)
class Widening:
    """The spans of one window on all sides; copies of a side in a dtype are made once for it."""

    sides: Sequence[Side]
    window: Window
    addresses: list[IntArray]  #: of each side, as it is stored
    room: Callable[[int, str], Bytes]  #: where a window of a side in a wider dtype is kept
    _widened: dict[tuple[int, str], IntArray] = field(default_factory=dict)

    def column(self, side: int, wide: Mapping[int, str]) -> IntArray:
        """Addresses of a side's spans; ``wide`` says which tensors are wanted in which dtype."""
        if not wide:
            return self.addresses[side]
        found, dtypes = self.addresses[side].copy(), self.sides[side].dtypes
        for at, tensor in enumerate(self.window.spans.tensors.tolist()):
            kind = wide.get(tensor)
            if kind is not None and kind != dtypes[tensor]:
                found[at] = self._copy(side, at, dtypes[tensor], kind)
        return found

    def _copy(self, side: int, at: int, dtype: str, kind: str) -> int:
        spans = self.window.spans
        if (side, kind) not in self._widened:
            self._widened[side, kind] = np.zeros(len(spans), np.int64)
        places = self._widened[side, kind]
        if not places[at]:
            to, bits = self.room(side, kind), DTYPES[kind].bits
            begin = int(spans.addresses[at] - self.window.first) * bits // 8
            size = int(spans.elements[at]) * bits // 8
            nbytes = int(self.window.wanted[side][2][at])
            data = bytes_at(int(self.addresses[side][at]), nbytes)
            widen(data, dtype, kind, to[begin : begin + size])
            places[at] = place(to, U8) + begin
        return int(places[at])
