"""Row and column profiles as a safetensors file, which lies beside a store and is no part of it.

Of each matrix ``NAME#rows`` and ``NAME#columns`` are there: U32, or U64 for a matrix in which one
count may not fit, with a line for each store. Everything about the file but the counts is known
before, so that they are written in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT
from ckdiff.errors import StoreError, UsageError
from ckdiff.options import checked_output
from ckdiff.outputs.place import Place, write_errors
from ckdiff.outputs.writing import write_at
from ckdiff.runs.structures.counting import Counts, Integers
from ckdiff.runs.structures.result import Structure, as_matrix

_MARK = '{"__metadata__":{"format":"ckdiff profiles 1"'  # how the header begins


class ProfileFile:
    """The file while it is written. A context manager: what is not committed is removed."""

    def __init__(self, out: str | os.PathLike[str], result: Structure, *, overwrite: bool) -> None:
        """Raises OutputError where something else is in the way."""
        self.out = checked_output(out)
        self._place = Place(self.out, directory=False, overwrite=overwrite, in_the_way=_foreign)
        self._place.keep_away_from((), [Path(store) for store in result.stores])
        self._place.check()
        self._stores = len(result.stores)
        self._entries, self._size = _layout(result)
        self._header = _header(result, self._entries)
        self._fd = -1

    def __enter__(self) -> ProfileFile:
        self._place.__enter__()
        try:
            self._place.check_disk(len(self._header) + self._size)
            with write_errors(self.out):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._fd = os.open(self._place.path, flags, 0o666)
                os.ftruncate(self._fd, len(self._header) + self._size)
                write_at(self._fd, self._header, 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._place.__exit__()

    def put(self, counts: Counts) -> None:
        """Write the profiles of a whole matrix; on any thread. Raises OutputError."""
        entries = self._entries[2 * counts.tensor : 2 * counts.tensor + 2]
        both: tuple[Sequence[Integers], ...] = list(counts.rows), counts.columns
        for (_, kind, _, begin), lines in zip(entries, both, strict=True):
            data = np.array(lines, "<u4" if kind == "U32" else "<u8").tobytes()
            with write_errors(self.out):
                write_at(self._fd, data, len(self._header) + begin)

    def commit(self) -> None:
        """Give the whole file its name. Raises OutputError."""
        self._place.commit()


def _layout(result: Structure) -> tuple[list[tuple[str, str, list[int], int]], int]:
    """(name, dtype, shape, first byte) of each profile, and the bytes of all."""
    found, wide = [], []
    for name, shape in zip(result.names, result.shapes, strict=True):
        matrix = as_matrix(shape)
        kind = "U32" if max(matrix) < 1 << 32 else "U64"
        for what, size in zip(("rows", "columns"), matrix, strict=True):
            wide.append(8 if kind == "U64" else 4)
            found.append((f"{name}#{what}", kind, [len(result.stores), size]))
    if len({name for name, *_ in found}) < len(found):
        raise UsageError("names of tensors clash once '#rows' and '#columns' are added")
    begins = np.zeros(len(found), np.int64)
    at = 0
    for width in (8, 4):  # what is wide comes first, so that all is aligned
        for i, (_, _, (lines, size)) in enumerate(found):
            if wide[i] == width:
                begins[i] = at
                at += width * lines * size
    return [(*entry, int(begin)) for entry, begin in zip(found, begins, strict=True)], at


def _header(result: Structure, entries: list[tuple[str, str, list[int], int]]) -> bytes:
    metadata = {
        "format": "ckdiff profiles 1",
        "rule": result.rule,
        "stores": json.dumps([os.path.basename(os.path.abspath(s)) for s in result.stores]),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, kind, shape, begin in entries:
        size = shape[0] * shape[1] * (4 if kind == "U32" else 8)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, begin + size]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > HEADER_LIMIT:
        raise StoreError(
            f"the header would have {len(raw):,} bytes, more than the format allows",
            hint="choose matrices with --include",
        )
    return len(raw).to_bytes(8, "little") + raw


def _foreign(out: Path) -> str | None:
    """See Policy: only a file of profiles may be replaced."""
    with open(out, "rb") as file:
        begin = file.read(8 + len(_MARK))
    return None if begin[8:] == _MARK.encode() else "is no file of profiles"
