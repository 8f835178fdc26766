"""Content hashes of what is on a device: of whole units there, of what is left after them here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.kernels import abi
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.hashcode import WORDS, digest, ends, starts
from ckdiff.kernels.gpu.tables import COLUMNS, PROGRAM, SIDES, Int64, Table, sent
from ckdiff.kernels.hashing import UNIT

__all__ = ["Digests", "Ends", "tails"]

_OPTIONS = {"num_warps": 2}


class Digests:
    """The code for a device."""

    def __init__(self, device: torch.device) -> None:
        self._words = torch.from_numpy(np.array(WORDS, np.uint64).view(np.int64)).to(device)

    def __call__(self, table: Table, sums: torch.Tensor, bits: int) -> None:
        """Write ``sums``, int64 (4, programs), of digests of whole units with their weights: low
        and high halves of base and tuned, modulo 2**64.

        The table is on the device, its addresses are multiples of 8, its elements have so many
        bits.
        """
        size = UNIT * bits // 8
        low, high = starts(size)
        digest[(table.programs,)](
            **table.arguments(), sums=sums, words=self._words, programs=table.programs,
            SIZE=size, LOW=low, HIGH=high, UNITS=PROGRAM // UNIT, COLUMNS=COLUMNS, **_OPTIONS,
        )  # fmt: skip


def tails(segments: Int64, bits: npt.NDArray[np.int64]) -> Int64:
    """What is left of segments of elements of so many bits after their whole units."""
    ragged = segments[:, abi.SEG_ELEMENTS] % UNIT > 0
    rest, bits = segments[ragged].copy(), bits[ragged]
    units = rest[:, abi.SEG_ELEMENTS] // UNIT
    for column in (abi.SEG_BASE, abi.SEG_TUNED):
        rest[:, column] += units * UNIT * bits // 8
    rest[:, abi.SEG_POSITION] += units * UNIT
    rest[:, abi.SEG_UNIT] += units
    rest[:, abi.SEG_ELEMENTS] %= UNIT
    return rest


class Ends:
    """What is left after the whole units of tensors that are on the device, fetched from there."""

    def __init__(
        self, segments: Int64, bits: npt.NDArray[np.int64], resident: npt.NDArray[np.bool_]
    ) -> None:
        """``resident``, (segments, 2), says which sides are on the device."""
        ragged = segments[:, abi.SEG_ELEMENTS] % UNIT > 0
        rest, bits = tails(segments, bits), bits[ragged]
        self._which = resident[ragged]
        nbytes = rest[:, abi.SEG_ELEMENTS] * bits // 8
        self._rows = np.concatenate(
            [
                np.stack([rest[which, column], nbytes[which]], axis=1)
                for column, which in zip(SIDES, self._which.T, strict=True)
            ]
        )
        self._room = UNIT * int(bits.max(initial=8)) // 8  # a power of two, but for 6 bits
        self._room = 1 << (self._room - 1).bit_length()
        self._here: torch.Tensor | None = None

    def fetch(self, device: Device) -> None:
        """Put the copy on the current stream."""
        count = len(self._rows)
        if not count:
            return
        there = device.memory(count * self._room)
        ends[(count,)](sent(self._rows, device.device), there, N=self._room)
        self._here = device.pinned(count * self._room)
        self._here.copy_(there, non_blocking=True)

    def place(self, rest: Int64) -> None:
        """Put the addresses of what was fetched into the rows that ``tails`` gives."""
        if self._here is None:
            return
        at = self._here.data_ptr() + self._room * np.arange(len(self._rows))
        first = int(self._which[:, 0].sum())
        for column, which, some in zip(SIDES, self._which.T, (at[:first], at[first:]), strict=True):
            rest[which, column] = some
