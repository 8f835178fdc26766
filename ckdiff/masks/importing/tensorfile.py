"""Masks in safetensors: one file, or a directory of shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from ckdiff.checkpoints.formats.safetensors import read_header
from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, printable
from ckdiff.masks.importing.maskfile import MaskFile, Notes, check_number, make_item, read_exactly

_DTYPES = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2",
    "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
}  # fmt: skip


def read_tensor_file(path: str, stack: ExitStack) -> MaskFile:
    """The masks at ``path``; ``stack`` closes it. Raises CheckpointError."""
    checkpoint = open_local(path, of_ours=True)
    stack.callback(checkpoint.close)
    table = checkpoint.table
    check_number(printable(path), len(table))
    notes = [_notes(file) for file in checkpoint.open_files]
    said = {(note.polarity, note.rule) for note in notes}
    if len(said) > 1:
        raise CheckpointError(
            f"{printable(path)}: its files differ in polarity or rule",
            hint="import each of them by itself",
        )
    items = []
    for i, (name, dtype, shape) in enumerate(
        zip(table.names, table.dtypes, table.shapes, strict=True)
    ):
        index = int(checkpoint.file_index[i])
        kind = np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None
        where = printable(checkpoint.open_files[index].path)
        reader = _Reader(checkpoint, i)
        items.append(make_item(where, name, kind, shape, reader, notes[index].encoding))
    wanted = {item.name for item in items}
    described = {}
    for file, note in zip(checkpoint.open_files, notes, strict=True):
        described.update(note.described(printable(file.path), wanted))
    both = notes[0] if notes else Notes()
    both.ours = all(note.ours for note in notes)
    return MaskFile("safetensors", items, list(checkpoint.open_files), both, described, checkpoint)


def _notes(file: OpenFile) -> Notes:
    try:
        header = read_header(file.fd, file.size, file.path)
    except OSError as error:
        where = printable(file.path)
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
    return Notes.of(header.metadata).checked(printable(file.path))


class _Reader:
    """Reads one tensor."""

    __slots__ = ("_begin", "_file", "_size")

    def __init__(self, checkpoint: Checkpoint, tensor: int) -> None:
        self._file = checkpoint.open_files[int(checkpoint.file_index[tensor])]
        self._begin = int(checkpoint.offset[tensor])
        self._size = int(checkpoint.table.nbytes[tensor])

    def __call__(self) -> Iterator[bytes]:
        yield from read_exactly(self._file, self._begin, self._size)
