"""Safetensors files of pieces of tensors: each file's metadata says where in the tensors they lie.

``torch.distributed.checkpoint`` writes them so, one for each process, with its writer for Hugging
Face: ``DCP_SHARDING_INFO`` in the metadata is ``{NAME: {"saved_offsets": [...]}}``. The whole shape
is written nowhere. It is what the pieces cover, and they have to cover it exactly.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from ckdiff.checkpoints.contents import SHARDING
from ckdiff.checkpoints.formats.covering import FURTHEST, Joining, Shape, is_shape
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.formats.strictjson import any_value, key_at, shown, skip_blank
from ckdiff.checkpoints.pieces import Contents, Piece, packed_strides
from ckdiff.checkpoints.places.place import Files
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError

_HINT = "copy the files of the whole run, or save it again"


def read_contents(files: Files) -> Contents:
    """What safetensors files of pieces hold together. Raises HeaderError and CheckpointError."""
    found: dict[str, _Found] = {}
    for i in range(len(files)):
        where = files.where(i)
        header = header_from(partial(files.read, i), files.size(i), where)
        files.check(i)
        offsets = saved_offsets(header, where)
        columns = zip(
            header.names, header.dtypes, header.shapes, header.begins.tolist(), strict=True
        )
        for name, dtype, shape, begin in columns:
            at = offsets.get(name, (0,) * len(shape))
            piece = Piece(files.first + i, begin, at, shape, packed_strides(shape))
            found.setdefault(name, _Found(dtype, where)).add(name, dtype, piece, where)
    joining = Joining(files.described, files.first)
    for name, tensor in found.items():
        joining.add(name, tensor.dtype, tensor.shape(files.described, name), tensor.pieces)
    return joining.finish([])


class _Found:
    """What is known of one tensor."""

    def __init__(self, dtype: str, where: str) -> None:
        self.dtype = dtype
        self.pieces: list[Piece] = []
        self._where = where

    def add(self, name: str, dtype: str, piece: Piece, where: str) -> None:
        if dtype != self.dtype:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} is {dtype} here and {self.dtype} in {self._where}",
                hint=_HINT,
            )
        if self.pieces and len(piece.shape) != len(self.pieces[0].shape):
            raise CheckpointError(
                f"{where}: tensor {shown(name)} has {len(piece.shape)} dimensions here and "
                f"{len(self.pieces[0].shape)} in {self._where}",
                hint=_HINT,
            )
        if (self.pieces or any(piece.at)) and DTYPES[dtype].bits % 8:
            raise CheckpointError(
                f"{where}: tensor {shown(name)} is in pieces of {dtype}, which is less than a byte",
                hint="save it whole",
            )
        self.pieces.append(piece)

    def shape(self, where: str, name: str) -> Shape:
        """The least shape that has room for all pieces."""
        there = [piece for piece in self.pieces if math.prod(piece.shape)] or self.pieces
        ends = ([a + n for a, n in zip(p.at, p.shape, strict=True)] for p in there)
        shape = tuple(map(max, zip(*ends, strict=True)))
        if not is_shape(shape):
            raise CheckpointError(
                f"{where}: tensor {shown(name)} has pieces too far apart", hint=_HINT
            )
        return shape


def saved_offsets(header: Header, where: str) -> dict[str, Shape]:
    """For tensors of a file the index, in the whole tensor, of their first element.

    Raises CheckpointError where the metadata cannot be read, or does not fit a tensor.
    """
    text = header.metadata.get(SHARDING)
    if text is None:
        return {}
    ranks = {name: len(shape) for name, shape in zip(header.names, header.shapes, strict=True)}
    found: dict[str, Shape] = {}
    try:
        raw = text.encode()
        pos = skip_blank(raw, 0)
        mark = raw[pos : pos + 1]
        if mark != b"{":
            raise ValueError("it is not an object")
        after = skip_blank(raw, pos + 1)
        pos = after if raw[after : after + 1] == b"}" else pos
        while raw[pos : pos + 1] in (b"{", b","):
            name, pos = key_at(raw, pos + 1)
            entry, pos = any_value(raw, pos, whole_numbers=True)
            if name in found:
                raise ValueError(f"{shown(name)} is there twice")
            if name in ranks:
                found[name] = _offsets(entry, ranks[name], name)
            pos = skip_blank(raw, pos)
        if raw[pos : pos + 1] != b"}" or skip_blank(raw, pos + 1) != len(raw):
            raise ValueError("it does not end where it should")
    except ValueError as error:
        raise CheckpointError(
            f"{where}: its {SHARDING} cannot be read: {error}", hint=_HINT
        ) from None
    return found


def _offsets(entry: Any, rank: int, name: str) -> Shape:
    numbers = entry.get("saved_offsets") if type(entry) is dict else None
    if type(numbers) is not list or len(numbers) != rank:
        raise ValueError(f"it has no saved_offsets for the {rank} dimensions of {shown(name)}")
    if not all(type(n) is int and 0 <= n < FURTHEST for n in numbers):
        raise ValueError(f"the saved_offsets of {shown(name)} are no indices")
    return tuple(numbers)
