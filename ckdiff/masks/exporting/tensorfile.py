"""Masks as a safetensors file: a byte for each element, packed bits, or the positions of ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT
from ckdiff.errors import StoreError, UsageError, printable
from ckdiff.masks.exporting.masks import Masks, Piece, compact, encoded
from ckdiff.outputs.writing import write_all
from ckdiff.stores.table import IntArray

#: how the masks lie in the file
ENCODINGS = ("bool", "packed", "indices")
INDICES = ".indices"  #: follows a tensor's name where the positions of its ones are stored
_NARROW = 1 << 31  # fewer elements than this have int32 positions
_BUFFER = 1 << 20


class TensorFile:
    """A file to be written: everything about it but the bits is known before."""

    def __init__(self, masks: Masks, chosen: IntArray, encoding: str) -> None:
        self._masks = masks
        self._chosen = chosen
        self._encoding = encoding
        elements, ones = masks.elements[chosen], masks.ones[chosen]
        self._wide = elements >= _NARROW
        if encoding == "bool":
            sizes = elements
        elif encoding == "packed":
            sizes = -(-elements // 8)
        else:
            sizes = ones * np.where(self._wide, 8, 4)
        # int64 positions come first, so that all are aligned; names stay in natural order
        order = np.argsort(~self._wide, kind="stable") if encoding == INDICES[1:] else slice(None)
        ends = np.cumsum(sizes[order])
        self._begins = np.empty(len(chosen), np.int64)
        self._begins[order] = ends - sizes[order]
        self._sizes = sizes
        self.data_size = int(sizes.sum())
        self._header = self._make_header()
        self.size = len(self._header) + self.data_size  #: bytes of the file

    @property
    def names(self) -> list[str]:
        """What the tensors of the file are called."""
        suffix = INDICES if self._encoding == "indices" else ""
        return [self._masks.names[i] + suffix for i in self._chosen.tolist()]

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        """Stream it; ``done`` is told of bytes. Raises OSError and StoreCorrupt."""
        rows = np.zeros(len(self._masks.names), np.int64)
        rows[self._chosen] = np.arange(len(self._chosen))
        cursor = self._begins + len(self._header)
        with _Output(path) as output:
            output.put(0, self._header)
            for piece in self._masks.pieces(self._chosen):
                row = int(rows[piece.tensor])
                data = self._data(piece, bool(self._wide[row]))
                output.put(int(cursor[row]), data)
                cursor[row] += len(data)
                done(len(data))
            output.flush()

    def _data(self, piece: Piece, wide: bool) -> bytes:
        if self._encoding == "packed":
            return piece.packed.tobytes()
        flags = piece.flags()
        if self._encoding == "bool":
            return flags.tobytes()
        return (np.flatnonzero(flags) + piece.first).astype("<i8" if wide else "<i4").tobytes()

    def _make_header(self) -> bytes:
        masks, entries = self._masks, dict[str, Any]()
        entries["__metadata__"] = masks.metadata(self._encoding, self._chosen)
        columns = (self._chosen, self._begins, self._sizes, self._wide)
        names = self.names
        for name, i, begin, size, wide in zip(names, *(c.tolist() for c in columns), strict=True):
            if name in entries:
                raise UsageError(f"a tensor called {printable(name)} cannot be exported")
            if self._encoding == "bool":
                dtype, shape = "BOOL", list(masks.shapes[i])
            elif self._encoding == "packed":
                dtype, shape = "U8", [size]
            else:
                dtype, shape = ("I64", [size // 8]) if wide else ("I32", [size // 4])
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        raw = encoded(compact(entries))
        raw += b" " * (-len(raw) % 8)  # readers that map the file want data aligned
        if len(raw) > HEADER_LIMIT:
            raise StoreError(
                f"the header would have {len(raw):,} bytes, more than the format allows",
                hint="use --like with a sharded checkpoint",
            )
        return len(raw).to_bytes(8, "little") + raw


class _Output:
    """Writes at offsets; what follows on itself is written in one call."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._parts: list[bytes] = []
        self._begin = self._end = 0

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def put(self, offset: int, data: bytes) -> None:
        if offset != self._end or self._end - self._begin >= _BUFFER:
            self.flush()
            self._begin = offset
        self._parts.append(data)
        self._end = offset + len(data)

    def flush(self) -> None:
        if self._parts:
            os.lseek(self._fd, self._begin, os.SEEK_SET)
            write_all(self._fd, b"".join(self._parts))
            self._parts.clear()
            self._begin = self._end
