"""Where an indices delta has what became of each tensor, and the parts of it that windows need.

    NAME.indices   I32, or I64 from 2**31 elements on: positions of the changed elements, ascending
    NAME.values    what they are in the tuned checkpoint, in the tensor's dtype
    NAME           the whole tensor, where it has no base or elements of less than a byte

A tensor that did not change has nothing. The part of a window is read and checked on its own: what
``ckdiff.frames`` says of it are its positions (bytes, where the tensor is whole) and a digest of
those positions and the values at them (of the bytes).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.container import FRAMES, HEADS, MANIFEST, PREFIX, TENSORS, Delta
from ckdiff.errors import PairingError, printable
from ckdiff.layout import bits_of

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bits = npt.NDArray[np.unsignedinteger]

INDICES, VALUES = ".indices", ".values"
_NARROW = 1 << 31  # fewer elements than this have int32 positions


class Stream(NamedTuple):
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Plan:
    """Which streams the tensors of a checkpoint have. A tensor is known by its position."""

    def __init__(self, blueprint: Blueprint, windows: Windows) -> None:
        self._blueprint, self._windows = blueprint, windows
        bits = bits_of(blueprint.dtypes)
        #: whether elements have no bytes of their own, so that a changed tensor is stored whole
        self.packed: npt.NDArray[np.bool_] = bits < 8
        self.width: IntArray = np.maximum(bits // 8, 1)  #: bytes of a value
        self.wide: npt.NDArray[np.bool_] = blueprint.nbytes // self.width >= _NARROW

    def positions(self, tensor: int) -> np.dtype[np.signedinteger]:
        """The dtype of a tensor's positions."""
        return np.dtype("<i8" if self.wide[tensor] else "<i4")

    def values(self, tensor: int) -> np.dtype[np.unsignedinteger]:
        """The dtype that holds the bits of a value."""
        return np.dtype(f"<u{self.width[tensor]}")

    def streams(
        self, sizes: IntArray, based: npt.NDArray[np.bool_]
    ) -> list[tuple[int, Stream | None, Stream]]:
        """For each tensor that has any: its position, its positions' stream, and the other one.

        ``sizes`` are those of the windows' parts.
        """
        blueprint = self._blueprint
        ends = np.concatenate(([0], np.cumsum(sizes)))
        totals = np.diff(ends[self._windows.first])
        found: list[tuple[int, Stream | None, Stream]] = []
        for tensor in np.flatnonzero((totals > 0) | ~based).tolist():
            name, dtype = blueprint.names[tensor], blueprint.dtypes[tensor]
            if self.packed[tensor] or not based[tensor]:
                found.append((tensor, None, Stream(name, dtype, blueprint.shapes[tensor])))
                continue
            count, wide = int(totals[tensor]), self.wide[tensor]
            positions = Stream(name + INDICES, "I64" if wide else "I32", (count,))
            found.append((tensor, positions, Stream(name + VALUES, dtype, (count,))))
        return found


def check_names(names: Sequence[str]) -> None:
    """Raise PairingError for names that would be taken for something else.

    Whatever changed, so that a pair that works today does not fail tomorrow.
    """
    known = set(names)
    for name in names:
        clash = next((name + s for s in (INDICES, VALUES) if name + s in known), None)
        if clash is not None or name.startswith(PREFIX):
            other = "a part of the delta" if clash is None else printable(clash)
            raise PairingError(
                f"{printable(name)} and {other} could not be told apart with the indices encoding",
                hint="use the packed encoding",
            )


class Streams:
    """An open indices delta, window by window; making one raises DeltaError. For all threads."""

    def __init__(self, delta: Delta) -> None:
        # what is found by a delta must not keep it
        self._delta: Delta = weakref.proxy(delta)
        self._plan = Plan(delta.blueprint, delta.windows)
        first = delta.windows.first[delta.windows.tensor]
        #: what the windows before it in the same tensor have
        self._at: IntArray = delta.frame_starts - delta.frame_starts[first]
        self._check_header()
        self._check_sizes()

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
            raise delta.damaged(f"positions in {printable(name)} make no sense")
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
        name = printable(self._delta.blueprint.names[tensor])
        return self._delta.damaged(f"the changes of {name} are not what was written")

    def _check_header(self) -> None:
        """The file must have exactly the streams that the windows speak of."""
        delta, header = self._delta, self._delta.header
        columns = zip(header.names, header.dtypes, header.shapes, strict=True)
        found = {name: Stream(name, dtype, shape) for name, dtype, shape in columns}
        for part in (TENSORS, HEADS, FRAMES, MANIFEST):
            found.pop(part, None)
        for _, *streams in self._plan.streams(delta.frame_sizes, delta.tensors.based):
            for stream in streams:
                if stream is not None and found.pop(stream.name, None) != stream:
                    raise delta.damaged(f"{printable(stream.name)} is not as it should be")
        if found:
            raise delta.damaged(f"{printable(next(iter(found)))} should not be there")

    def _check_sizes(self) -> None:
        """No window may have more than fits into it, and none of a whole tensor less."""
        delta, windows, tensors = self._delta, self._delta.windows, self._delta.tensors
        tensor = windows.tensor
        whole = (self._plan.packed | ~tensors.based)[tensor]
        room = np.where(whole, windows.size, windows.size // self._plan.width[tensor])
        wrong = delta.frame_sizes > room
        held = np.zeros(len(tensors.based), np.bool_)
        held[tensor[delta.frame_sizes > 0]] = True
        wrong |= whole & (held | ~tensors.based)[tensor] & (delta.frame_sizes != room)
        if wrong.any():
            name = delta.blueprint.names[int(tensor[int(wrong.argmax())])]
            raise delta.damaged(f"{printable(name)} has another size")


_open: weakref.WeakKeyDictionary[Delta, Streams] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def streams_of(delta: Delta) -> Streams:
    """The streams of a delta, looked through once however many threads ask. Raises DeltaError."""
    with _lock:
        found = _open.get(delta)
        if found is None:
            found = _open[delta] = Streams(delta)
        return found
