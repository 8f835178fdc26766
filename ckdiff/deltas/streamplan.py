"""Which tensors the file of an indices delta has besides its parts: what became of each tensor.

    NAME.indices   I32, or I64 from 2**31 elements on: positions of the changed elements, ascending
    NAME.values    what they are in the tuned checkpoint, in the tensor's dtype
    NAME           the whole tensor, where it has no base or elements of less than a byte

A tensor that did not change has nothing. What a file has must be exactly what its tables speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.contents import Contents, Stream
from ckdiff.deltas.parts import PREFIX, called
from ckdiff.errors import PairingError
from ckdiff.layout import bits_of

INDICES, VALUES = ".indices", ".values"
_NARROW = 1 << 31  # fewer elements than this have int32 positions


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
    """See Encoding: raise PairingError for names that would be taken for something else.

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


def check(contents: Contents) -> int:
    """See Encoding."""
    plan = Plan(contents.blueprint, contents.windows)
    _check_sizes(plan, contents)
    count = 0
    for _, *streams in plan.streams(contents.sizes, contents.based):
        for stream in streams:
            if stream is not None and not contents.has(stream):
                raise ValueError(f"{called(stream.name)} is not as it should be")
            count += stream is not None
    return count


def _check_sizes(plan: Plan, contents: Contents) -> None:
    """No window may have more than fits into it, and none of a whole tensor less."""
    windows, sizes, based = contents.windows, contents.sizes, contents.based
    tensor = windows.tensor
    whole = (plan.packed | ~based)[tensor]
    room = np.where(whole, windows.size, windows.size // plan.width[tensor])
    wrong = sizes > room
    held = np.zeros(len(based), np.bool_)
    held[tensor[sizes > 0]] = True
    wrong |= whole & (held | ~based)[tensor] & (sizes != room)
    if wrong.any():
        name = contents.blueprint.names[int(tensor[int(wrong.argmax())])]
        raise ValueError(f"{called(name)} has another size")
