"""Windows of two sides, one after the other, for records of what changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import available_memory
from ckdiff.deltas.streamplan import Plan
from ckdiff.deltas.streams import Bits, Bytes, Positions
from ckdiff.errors import BudgetError
from ckdiff.kernels.memory import views

Piece = tuple[Positions, Bits]


class Copier:
    """Copies windows of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, tensor: int, start: int, out: Bytes) -> None:
        """Fill ``out`` with bytes from ``start`` on."""
        tensors, starts, sizes = (np.array([x], np.int64) for x in (tensor, start, len(out)))
        # not open for longer: the guard is the process's, and records are given in between
        with closing(self._checkpoint.reader()) as reader:
            out[:] = views(reader.acquire(tensors, starts, sizes), sizes)[0]
            reader.release()


class Compared:
    """What both kinds of sources share: windows of both sides, compared."""

    def __init__(self, blueprint: Blueprint, windows: Windows) -> None:
        self.blueprint, self.windows = blueprint, windows
        self.plan = Plan(blueprint, windows)
        self._buffers = np.empty((2, FRAME_BYTES), np.uint8)

    def spans(self, tensor: int) -> Iterator[tuple[int, int, Bytes, Bytes]]:
        """Each window of a tensor: its number, its first byte, and two buffers of its size."""
        first, stop = self.windows.first[tensor : tensor + 2].tolist()
        for window in range(first, stop):
            start, size = int(self.windows.start[window]), int(self.windows.size[window])
            yield window, start, self._buffers[0, :size], self._buffers[1, :size]

    def room_for(self, tensor: int) -> Bytes:
        """An array for all bytes of a tensor. Raises BudgetError where memory does not suffice.

        A tensor is whole in a record, and what it takes is only declared: a delta of a few
        kilobytes may have terabytes of zeros, and so may a file of holes.
        """
        size, free = int(self.blueprint.nbytes[tensor]), available_memory()
        try:
            if size <= free:
                return np.empty(size, np.uint8)
        except MemoryError:
            pass  # a limit that is not looked at
        raise BudgetError(
            f"{called(self.blueprint.names[tensor])} comes whole, and its {format_size(size)} are "
            f"more than the {format_size(free)} of memory that are free",
            hint="apply the delta to files and read the tensor from there",
        )

    def changed(self, tensor: int, start: int, base: Bytes, tuned: Bytes) -> Piece:
        """The changed elements of a window that begins at byte ``start``."""
        dtype = self.plan.values(tensor)
        x, y = base.view(dtype), tuned.view(dtype)
        found = np.flatnonzero(x != y)
        positions: Positions = (found + start // dtype.itemsize).astype(self.plan.positions(tensor))
        return positions, y[found]
