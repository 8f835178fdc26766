"""Masks as a safetensors file: a byte for each element, or packed bits."""

from __future__ import annotations

from ckdiff.masks.exporting.format import Format
from ckdiff.masks.exporting.masks import Piece
from ckdiff.masks.exporting.tensorfile import TensorFile
from ckdiff.stores.table import IntArray


class Bools(TensorFile):
    """A byte for each element, 0 or 1."""

    encoding = "bool"

    def _sizes(self, elements: IntArray, ones: IntArray) -> IntArray:
        return elements

    def _entry(self, position: int, size: int, wide: bool) -> tuple[str, list[int]]:
        return "BOOL", list(self._masks.shapes[position])

    def _data(self, piece: Piece, wide: bool) -> bytes:
        return piece.flags().tobytes()


class Packed(TensorFile):
    """A bit for each element, little-endian; one dimension."""

    encoding = "packed"

    def _sizes(self, elements: IntArray, ones: IntArray) -> IntArray:
        sizes: IntArray = -(-elements // 8)
        return sizes

    def _entry(self, position: int, size: int, wide: bool) -> tuple[str, list[int]]:
        return "U8", [size]

    def _data(self, piece: Piece, wide: bool) -> bytes:
        return piece.packed.tobytes()


FORMAT = Format(Bools, packed=Packed, suffixes=(".safetensors",), shards=True)
