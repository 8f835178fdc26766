"""Masks as the positions of their ones, in a safetensors file: NAME.indices of one dimension."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckdiff.masks.exporting.format import Format
from ckdiff.masks.exporting.masks import Piece
from ckdiff.masks.exporting.tensorfile import TensorFile
from ckdiff.stores.table import IntArray

INDICES = ".indices"  #: follows a tensor's name where the positions of its ones are stored
_NARROW = 1 << 31  # fewer elements than this have int32 positions


class Indices(TensorFile):
    """Positions of ones, ascending: int32, or int64 where a tensor is large."""

    encoding = "indices"
    suffix = INDICES

    def _wide(self, elements: IntArray) -> npt.NDArray[np.bool_]:
        return elements >= _NARROW

    def _sizes(self, elements: IntArray, ones: IntArray) -> IntArray:
        sizes: IntArray = ones * np.where(self._wide(elements), 8, 4)
        return sizes

    def _entry(self, position: int, size: int, wide: bool) -> tuple[str, list[int]]:
        return ("I64", [size // 8]) if wide else ("I32", [size // 4])

    def _data(self, piece: Piece, wide: bool) -> bytes:
        positions = np.flatnonzero(piece.flags()) + piece.first
        return positions.astype("<i8" if wide else "<i4").tobytes()


FORMAT = Format(Indices, suffixes=(".safetensors",), shards=True)
