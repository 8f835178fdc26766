"""Which tensors the file of a delta has: its parts, and with indices what became of each tensor.

    NAME.indices   I32, or I64 from 2**31 elements on: positions of the changed elements, ascending
    NAME.values    what they are in the tuned checkpoint, in the tensor's dtype
    NAME           the whole tensor, where it has no base or elements of less than a byte

A tensor that did not change has nothing. What a file has must be exactly what its tables speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.formats.safetensors import Header
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.form import FORMS, largest_frame
from ckdiff.deltas.parts import DATA, FRAMES, HEADS, MANIFEST, PREFIX, TENSORS, called
from ckdiff.errors import PairingError
from ckdiff.layout import bits_of

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
    ) -> Iterator[tuple[int, Stream | None, Stream]]:
        """For each tensor that has any: its position, its positions' stream, and the other one.

        ``sizes`` are those of the windows' parts.
        """
        blueprint = self._blueprint
        ends = np.concatenate(([0], np.cumsum(sizes)))
        totals = np.diff(ends[self._windows.first])
        for tensor in np.flatnonzero((totals > 0) | ~based).tolist():
            name, dtype = blueprint.names[tensor], blueprint.dtypes[tensor]
            if self.packed[tensor] or not based[tensor]:
                yield tensor, None, Stream(name, dtype, blueprint.shapes[tensor])
                continue
            count, wide = int(totals[tensor]), self.wide[tensor]
            positions = Stream(name + INDICES, "I64" if wide else "I32", (count,))
            yield tensor, positions, Stream(name + VALUES, dtype, (count,))


def check_names(names: Sequence[str]) -> None:
    """Raise PairingError for names that would be taken for something else.

    Whatever changed, so that a pair that works today does not fail tomorrow.
    """
    known = set(names)
    for name in names:
        clash = next((name + s for s in (INDICES, VALUES) if name + s in known), None)
        if clash is not None or name.startswith(PREFIX):
            other = "a part of the delta" if clash is None else called(clash)
            raise PairingError(
                f"{called(name)} and {other} could not be told apart with the indices encoding",
                hint="use the packed encoding",
            )


def check_streams(
    header: Header,
    encoding: str,
    blueprint: Blueprint,
    windows: Windows,
    sizes: IntArray,
    based: npt.NDArray[np.bool_],
) -> None:
    """Raise ValueError where a file has other tensors than it should, or windows have other sizes.

    ``sizes`` are those of the windows' frames, or parts.
    """
    where = {name: i for i, name in enumerate(header.names)}

    def has(stream: Stream) -> bool:
        at = where.get(stream.name, -1)
        return at >= 0 and (header.dtypes[at], header.shapes[at]) == stream[1:]

    parts = [TENSORS, HEADS, FRAMES, MANIFEST]
    if encoding == "packed":
        _check_frames(blueprint, windows, sizes)
        parts.append(DATA)
        total = int(sizes.sum())
        if not has(Stream(DATA, "U8", (total,))):
            raise ValueError("the frames are not all of the data")
    for name in parts:
        at = where.get(name, -1)
        if at < 0 or header.dtypes[at] != "U8" or len(header.shapes[at]) != 1:
            raise ValueError(f"{name} is not as it should be")
    count = len(parts)
    if encoding == "indices":
        plan = Plan(blueprint, windows)
        _check_sizes(plan, blueprint, windows, sizes, based)
        for _, *streams in plan.streams(sizes, based):
            for stream in streams:
                if stream is not None and not has(stream):
                    raise ValueError(f"{called(stream.name)} is not as it should be")
                count += stream is not None
    if count != len(header.names):
        raise ValueError("tensors that should not be there")


def _check_frames(blueprint: Blueprint, windows: Windows, sizes: IntArray) -> None:
    """No frame may be larger than the largest that its window can have."""
    tensor = windows.tensor
    lane = np.array([FORMS[dtype].bytes for dtype in blueprint.dtypes], np.int64)[tensor]
    wrong = sizes > largest_frame(windows.size, lane)
    if wrong.any():
        name = blueprint.names[int(tensor[int(wrong.argmax())])]
        raise ValueError(f"a frame of {called(name)} is larger than any")


def _check_sizes(
    plan: Plan,
    blueprint: Blueprint,
    windows: Windows,
    sizes: IntArray,
    based: npt.NDArray[np.bool_],
) -> None:
    """No window may have more than fits into it, and none of a whole tensor less."""
    tensor = windows.tensor
    whole = (plan.packed | ~based)[tensor]
    room = np.where(whole, windows.size, windows.size // plan.width[tensor])
    wrong = sizes > room
    held = np.zeros(len(based), np.bool_)
    held[tensor[sizes > 0]] = True
    wrong |= whole & (held | ~based)[tensor] & (sizes != room)
    if wrong.any():
        name = blueprint.names[int(tensor[int(wrong.argmax())])]
        raise ValueError(f"{called(name)} has another size")
