"""The parts of an indices delta that its windows need.

The part of a window is read and checked on its own: what
``ckdiff.frames`` says of it are its positions (bytes, where the tensor is whole) and a digest of
those positions and the values at them (of the bytes).
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.container import Delta
from ckdiff.deltas.parts import called
from ckdiff.deltas.streamplan import INDICES, VALUES, Plan

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bits = npt.NDArray[np.unsignedinteger]


class Streams:
    """An open indices delta, window by window. For all threads."""

    def __init__(self, delta: Delta) -> None:
        # what is found by a delta must not keep it
        self._delta: Delta = weakref.proxy(delta)
        self._plan = Plan(delta.blueprint, delta.windows)
        first = delta.windows.first[delta.windows.tensor]
        #: what the windows before it in the same tensor have
        self._at: IntArray = delta.frame_starts - delta.frame_starts[first]

    def whole(self, window: int) -> memoryview | None:
        """The bytes of a window of a tensor that is stored whole; None where nothing changed.

        Raises DeltaError, as all of these do.
        """
        delta, tensor = self._delta, self._tensor(window)
        size = int(delta.frame_sizes[window])
        if not size:
            return None
        data = delta.read(delta.blueprint.names[tensor], int(self._at[window]), size)
        if xxhash.xxh3_64_intdigest(data) != int(delta.frame_digests[window]):
            raise self._altered(tensor)
        return data

    def stored_whole(self, tensor: int) -> bool:
        """Whether a tensor, where it is stored, is stored whole."""
        return bool(self._plan.packed[tensor] or not self._delta.tensors.based[tensor])

    def changes(self, window: int) -> tuple[Positions, Bits]:
        """The positions in the tensor of a window's changed elements, and their tuned bits."""
        delta, tensor = self._delta, self._tensor(window)
        count, at = int(delta.frame_sizes[window]), int(self._at[window])
        name = delta.blueprint.names[tensor]
        where_dtype, dtype = self._plan.positions(tensor), self._plan.values(tensor)
        if not count:
            return np.empty(0, where_dtype), np.empty(0, dtype)
        each = where_dtype.itemsize
        where = delta.read(name + INDICES, at * each, count * each)
        values = delta.read(name + VALUES, at * dtype.itemsize, count * dtype.itemsize)
        digest = xxhash.xxh3_64(where)
        digest.update(values)
        if digest.intdigest() != int(delta.frame_digests[window]):
            raise self._altered(tensor)
        positions = np.frombuffer(where, where_dtype)
        low, high = self.elements(window)
        if (
            int(positions[0]) < low
            or int(positions[-1]) >= high
            or bool((positions[1:] <= positions[:-1]).any())
        ):
            raise delta.damaged(f"positions in {called(name)} make no sense")
        return positions, np.frombuffer(values, dtype)

    def elements(self, window: int) -> tuple[int, int]:
        """The elements [first, end) of a window."""
        windows = self._delta.windows
        width = int(self._plan.width[self._tensor(window)])
        start = int(windows.start[window])
        return start // width, (start + int(windows.size[window])) // width

    # inside

    def _tensor(self, window: int) -> int:
        return int(self._delta.windows.tensor[window])

    def _altered(self, tensor: int) -> Exception:
        name = called(self._delta.blueprint.names[tensor])
        return self._delta.damaged(f"the changes of {name} are not what was written")


_open: weakref.WeakKeyDictionary[Delta, Streams] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def streams_of(delta: Delta) -> Streams:
    """The streams of a delta, made once however many threads ask."""
    with _lock:
        found = _open.get(delta)
        if found is None:
            found = _open[delta] = Streams(delta)
        return found
