"""What content hashes want of what is left after whole units: the CPU hashes it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.kernels import abi
from ckdiff.kernels.copying import copy_runs
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.tables import SIDES, Int64, sent
from ckdiff.kernels.hashing import UNIT

__all__ = ["Ends", "tails"]


def tails(segments: Int64, bits: npt.NDArray[np.int64]) -> Int64:
    """What is left of segments of elements of so many bits after their whole units."""
    ragged = segments[:, abi.SEG_ELEMENTS] % UNIT > 0
    rest, bits = segments[ragged].copy(), bits[ragged]
    units = rest[:, abi.SEG_ELEMENTS] // UNIT
    rest[:, SIDES] += (units * UNIT * bits // 8)[:, None]
    rest[:, abi.SEG_POSITION] += units * UNIT
    rest[:, abi.SEG_UNIT] += units
    rest[:, abi.SEG_ELEMENTS] %= UNIT
    return rest


class Ends:
    """What is left after the whole units of both sides on a device, fetched from there."""

    def __init__(self, segments: Int64, bits: npt.NDArray[np.int64]) -> None:
        """The addresses of ``segments`` are the device's."""
        rest = tails(segments, bits)
        nbytes = rest[:, abi.SEG_ELEMENTS] * bits[segments[:, abi.SEG_ELEMENTS] % UNIT > 0] // 8
        self._rows = np.stack([rest[:, SIDES].T.ravel(), np.tile(nbytes, 2)], axis=1)
        self._room = 1 << (UNIT * int(bits.max(initial=8)) // 8 - 1).bit_length()
        self._here: torch.Tensor | None = None

    def fetch(self, device: Device) -> None:
        """Put the copy on the current stream."""
        if not len(self._rows):
            return
        there = device.memory(len(self._rows) * self._room)
        if device.fused:
            from ckdiff.kernels.gpu.hashcode import ends

            ends[(len(self._rows),)](sent(self._rows, device.device), there, N=self._room)
        else:
            copy_runs(np.stack([self._places(there), *self._rows.T], axis=1))
        self._here = device.pinned(len(there))
        self._here.copy_(there, non_blocking=True)

    def place(self, rest: Int64) -> None:
        """Put the addresses of what was fetched into the rows that ``tails`` gives."""
        if self._here is not None:
            rest[:, SIDES] = self._places(self._here).reshape(2, -1).T

    def _places(self, of: torch.Tensor) -> Int64:
        return of.data_ptr() + self._room * np.arange(len(self._rows))
