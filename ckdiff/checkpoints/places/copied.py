"""Reading local files by plain reads, where their file system refuses to map them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np

from ckdiff.checkpoints.places.openfile import OpenFile, read_into
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import CheckpointError, printable

_APART = 64  #: bytes that spans in the buffer are aligned to


class CopyingReader:
    """A SpanReader whose tensors are local files; one for each worker. Windows are copied."""

    def __init__(self, files: Sequence[OpenFile]) -> None:
        self._files = files
        self._buffer = np.empty(0, np.uint8)
        self._held: set[int] = set()

    @staticmethod
    def memory(window: int) -> int:
        """Bytes that a reader takes for windows of so many bytes."""
        return window + (1 << 18)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        places = np.cumsum([0, *(-(-nbytes // _APART) * _APART).tolist()])
        if places[-1] > len(self._buffer):
            self._buffer = np.empty(int(places[-1]), np.uint8)
        columns = zip(
            tensors.tolist(), starts.tolist(), nbytes.tolist(), places.tolist(), strict=False
        )
        view = self._buffer.data
        self._held = set(tensors.tolist())
        for index, start, size, at in columns:
            _read(self._files[index], start, view[at : at + size])
        return self._buffer.ctypes.data + places[:-1].astype(np.int64)

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index, start, size in zip(
            tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True
        ):
            with contextlib.suppress(OSError):  # advice only
                fd = self._files[index].fd
                os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)

    def release(self) -> None:
        """See SpanReader."""
        held, self._held = self._held, set()
        for index in held:
            self._files[index].check()

    def close(self) -> None:
        """See SpanReader."""
        self._held = set()
        self._buffer = np.empty(0, np.uint8)


def _read(file: OpenFile, start: int, into: memoryview) -> None:
    try:
        have = read_into(file.fd, into, start)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {printable(file.path)} at bytes {start}-{start + len(into)}: "
            f"{error.strerror}",
            hint="the disk or network file system failed; check its logs",
        ) from None
    if have < len(into):
        file.check()  # cut while it was read: SourceChanged says so
        raise CheckpointError(f"{printable(file.path)}: ended at byte {start + have:,}")
