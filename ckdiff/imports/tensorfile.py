"""Masks in safetensors: one file, or a directory of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.header import read_header
from ckdiff.checkpoints.local import LocalCheckpoint, OpenFile, open_local
from ckdiff.errors import CheckpointError, printable
from ckdiff.imports.maskfile import PIECE, MaskFile, Notes, make_item
from ckdiff.writing.objects import file_digest
from ckdiff.writing.outputs import check_place

_DTYPES = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2",
    "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
}  # fmt: skip


def read_tensor_file(path: str, out: Path, stack: ExitStack) -> MaskFile:
    """The masks at ``path``; ``stack`` closes it. Raises CheckpointError, and StoreError where the
    output would damage it.
    """
    checkpoint = open_local(path)
    stack.callback(checkpoint.close)
    check_place(out, [checkpoint])
    notes = [_notes(file) for file in checkpoint.open_files]
    said = {(note.polarity, note.rule) for note in notes}
    if len(said) > 1:
        raise CheckpointError(f"{printable(path)}: its files differ in polarity or rule")
    polarity, rule = said.pop() if said else (None, None)
    described = {}
    for file, note in zip(checkpoint.open_files, notes, strict=True):
        described.update(note.described(printable(file.path)))
    items = []
    table = checkpoint.table
    for i, (name, dtype, shape) in enumerate(
        zip(table.names, table.dtypes, table.shapes, strict=True)
    ):
        index = int(checkpoint.file_index[i])
        kind = np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None
        reader = _Reader(checkpoint, i, kind or np.dtype("u1"))
        where = printable(checkpoint.open_files[index].path)
        items.append(make_item(where, name, kind, shape, reader, notes[index].encoding))
    files = [
        {"label": source.name, "digest": file_digest(Path(file.path))}
        for source, file in zip(checkpoint.files, checkpoint.open_files, strict=True)
    ]
    return MaskFile("safetensors", items, files, polarity, rule, described)


def _notes(file: OpenFile) -> Notes:
    header = read_header(file.fd, file.size, file.path)
    return Notes.of(header.metadata).checked(printable(file.path))


class _Reader:
    """Reads one tensor."""

    def __init__(self, checkpoint: LocalCheckpoint, tensor: int, dtype: np.dtype[Any]) -> None:
        self._file = checkpoint.open_files[int(checkpoint.file_index[tensor])]
        self._begin = int(checkpoint.offset[tensor])
        self._size = int(checkpoint.table.nbytes[tensor])
        self._dtype = dtype

    def __call__(self) -> Iterator[npt.NDArray[Any]]:
        step = PIECE * self._dtype.itemsize
        for at in range(0, self._size, step):
            wanted = min(step, self._size - at)
            data, begin = b"", self._begin + at
            try:
                while more := os.pread(self._file.fd, wanted - len(data), begin + len(data)):
                    data += more
            except OSError as error:
                where = printable(self._file.path)
                raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
            if len(data) < wanted:
                self._file.check()  # says that it was cut
            yield np.frombuffer(data, self._dtype)
        self._file.check()
