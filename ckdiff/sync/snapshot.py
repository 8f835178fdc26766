"""The bytes of the newest version, as a publisher keeps them: in memory, or in a file."""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.budget import MIB, format_size
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader, TensorTable
from ckdiff.deltas.room import available_memory
from ckdiff.deltas.versions.spool import nameless
from ckdiff.errors import BudgetError, UsageError, printable
from ckdiff.kernels.memory import Bytes
from ckdiff.outputs.checks import free_space
from ckdiff.outputs.place import write_errors
from ckdiff.sync.casting import PublishedView
from ckdiff.sync.shadow import Shadow

KINDS = ("memory", "disk", "auto", "device")
_ALIGNED = 64  # bytes: of a cache line
_SPARE = 512 * MIB  # that have to be free besides, for one in memory


class Snapshot(Checkpoint):
    """A checkpoint of tensors of ``table`` that can be written to, byte by byte; zeros at first.

    It is one copy of the model's bytes: anonymous memory, or a file without a name in ``folder``
    of which the system keeps in memory what fits. Of kind ``device`` it is as ``auto``, and there
    are copies of weights beside them on their device. Not for several writers of one tensor.
    """

    label = "the snapshot"

    def __init__(self, table: TensorTable, kind: str, folder: Path) -> None:
        """Raises BudgetError where there is no room, and OutputError."""
        self.table = table
        sizes = -(-table.nbytes // _ALIGNED) * _ALIGNED
        self._begins = np.cumsum(sizes) - sizes
        size = max(1, int(sizes.sum()))
        #: whether it is a file
        self.on_disk = kind == "disk" or (kind != "memory" and available_memory() < size + _SPARE)
        self.shadow = Shadow() if kind == "device" else None
        memory = _of_file(size, folder) if self.on_disk else _anonymous(size)
        self._bytes: Bytes | None = np.frombuffer(memory, np.uint8)
        self._address = int(self._bytes.__array_interface__["data"][0])

    def tensor(self, at: int) -> Bytes:
        """The bytes of a tensor, to read and to write."""
        assert self._bytes is not None, "it was closed"
        begin = int(self._begins[at])
        return self._bytes[begin : begin + int(self.table.nbytes[at])]

    def advanced(self, view: PublishedView, note: Callable[[str], None]) -> PublishedView:
        """The view as this is best made equal to it, all of it: see Shadow.over."""
        if self.shadow is None:
            return view
        at = {name: i for i, name in enumerate(self.table.names)}
        return self.shadow.over(view, lambda name: self.tensor(at[name]), note)

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        return _Reader(self._begins + self._address)

    def fingerprint(self) -> list[Any]:
        """See Checkpoint. It changes with each version."""
        return ["snapshot", uuid.uuid4().hex]

    def close(self) -> None:
        """Give the memory back; may be called more than once. No reader may be in use."""
        self._bytes = None  # what was mapped goes with the last array of it


class _Reader:
    """A SpanReader of a snapshot: everything is in its place."""

    def __init__(self, places: IntArray) -> None:
        self._places = places

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        found: IntArray = self._places[tensors] + starts
        return found

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader. There is nothing to wait for."""

    def release(self) -> None:
        """See SpanReader."""

    def close(self) -> None:
        """See SpanReader."""


def checked_kind(value: object) -> str:
    """``value`` if it says where a snapshot is kept; raises UsageError."""
    if value not in KINDS:
        raise UsageError(
            f"snapshot must be one of {', '.join(KINDS)}, not {printable(str(value)[:60])}"
        )
    return str(value)


def _anonymous(size: int) -> mmap.mmap:
    free = available_memory()
    if free < size:
        raise BudgetError(
            f"{format_size(free)} of memory are free, but a snapshot needs {format_size(size)}",
            hint='keep it on the disk: snapshot="disk"',
        )
    # private: what is shared counts elsewhere, and comes in small pages
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _of_file(size: int, folder: Path) -> mmap.mmap:
    """All of it is there at once: writing to a mapped hole of a full disk would end the process."""
    with write_errors(folder):
        free = free_space(folder)
        if free < size:
            where = printable(str(folder))
            raise BudgetError(
                f"{format_size(free)} free at {where}, but a snapshot needs {format_size(size)}",
                hint="free some space",
            )
        fd = nameless(folder)
        try:
            os.posix_fallocate(fd, 0, size)
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)
