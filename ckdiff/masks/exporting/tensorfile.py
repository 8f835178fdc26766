"""Masks as a safetensors file, whatever their bits are stored as: the header, and the writing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT
from ckdiff.errors import StoreError, UsageError, printable
from ckdiff.masks.exporting.masks import Masks, Piece, compact, encoded
from ckdiff.outputs.writing import write_all
from ckdiff.stores.table import IntArray

_BUFFER = 1 << 20


class TensorFile(ABC):
    """A file to be written: everything about it but the bits is known before."""

    encoding: ClassVar[str]  #: what the file says of how its masks lie in it
    suffix: ClassVar[str] = ""  #: follows the names of tensors

    def __init__(self, masks: Masks, chosen: IntArray) -> None:
        self._masks = masks
        self._chosen = chosen
        elements = masks.elements[chosen]
        sizes = self._sizes(elements, masks.ones[chosen])
        self._are_wide = self._wide(elements)
        # what is wide comes first, so that all is aligned; names stay in natural order
        order = np.argsort(~self._are_wide, kind="stable")
        ends = np.cumsum(sizes[order])
        self._begins = np.empty(len(chosen), np.int64)
        self._begins[order] = ends - sizes[order]
        self.data_size = int(sizes.sum())
        self._header = self._make_header(sizes)
        self.size = len(self._header) + self.data_size  #: bytes of the file

    @abstractmethod
    def _sizes(self, elements: IntArray, ones: IntArray) -> IntArray:
        """Bytes of tensors."""

    @abstractmethod
    def _entry(self, position: int, size: int, wide: bool) -> tuple[str, list[int]]:
        """Dtype and shape of what is stored of the mask at ``position``, in ``size`` bytes."""

    @abstractmethod
    def _data(self, piece: Piece, wide: bool) -> bytes:
        """What is stored of a piece."""

    def _wide(self, elements: IntArray) -> npt.NDArray[np.bool_]:
        """Which tensors have numbers of 8 bytes."""
        return np.zeros(len(elements), np.bool_)

    @property
    def names(self) -> list[str]:
        """See Output."""
        return [self._masks.names[i] + self.suffix for i in self._chosen.tolist()]

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        """See Output."""
        rows = np.zeros(len(self._masks.names), np.int64)
        rows[self._chosen] = np.arange(len(self._chosen))
        cursor = self._begins + len(self._header)
        with _Output(path) as output:
            output.put(0, self._header)
            for piece in self._masks.pieces(self._chosen):
                row = int(rows[piece.tensor])
                data = self._data(piece, bool(self._are_wide[row]))
                output.put(int(cursor[row]), data)
                cursor[row] += len(data)
                done(len(data))
            output.flush()

    def _make_header(self, sizes: IntArray) -> bytes:
        entries: dict[str, Any] = {
            "__metadata__": self._masks.metadata(self.encoding, self._chosen)
        }
        columns = (self._chosen, self._begins, sizes, self._are_wide)
        rows = zip(self.names, *(c.tolist() for c in columns), strict=True)
        for name, position, begin, size, wide in rows:
            if name in entries:
                raise UsageError(f"a tensor called {printable(name)} cannot be exported")
            dtype, shape = self._entry(position, size, wide)
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
