"""Where the elements of a launch are: a table of runs of elements, and whose each program is.

A *row* is a run of elements of both sides, each in one piece of the device's memory. A *program* is
what a launch does PROGRAM elements of a row with. Both parts of a table lie in one int64 array, so
that they are copied together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.kernels import abi
from ckdiff.kernels.hashing import UNIT

__all__ = ["COLUMNS", "MOST", "PROGRAM", "RAW", "SIDES", "Table", "sent", "table_bytes"]

Int64 = npt.NDArray[np.int64]

#: the torch dtype of raw bits, by their number
RAW = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}

SIDES = (abi.SEG_BASE, abi.SEG_TUNED)  #: the columns of addresses in segments

PROGRAM = 4096  #: elements of a program
MOST = 1 << 28  #: elements of a row, at most; the code counts them in 32 bits
#: base and tuned (addresses), elements, the unit of a mask where its bits begin, its first program,
#: and which unit of its tensor its first one is
BASE, TUNED, ELEMENTS, AT, FIRST, UNIT_OF = range(6)
COLUMNS = 6


def table_bytes(elements: int) -> int:
    """Bytes of the largest table of so many elements: each row ends a unit."""
    rows = -(-elements // UNIT)
    return 8 * (COLUMNS * rows + elements // PROGRAM + rows)


@dataclass(slots=True, eq=False)
class Table:
    """Rows of one dtype. ``numbers`` is on the device once they were copied there."""

    rows: int
    programs: int
    aligned: bool  #: whether all addresses are multiples of 16
    firsts: Int64  #: the first program of each row
    here: Int64  #: rows, then the owner of each program
    numbers: torch.Tensor | None = None

    @classmethod
    def of(
        cls, base: Int64, tuned: Int64, elements: Int64, units: Int64, begin: Int64 | int = 0
    ) -> Table:
        """The table of rows of ``elements``, each at most MOST and none of them 0.

        ``base`` and ``tuned`` are addresses in the device's memory, ``units`` say where in a mask
        the bits of each row begin, ``begin`` which units of their tensors the first ones are.
        """
        if len(elements) and not (elements.min() > 0 and elements.max() <= MOST):
            raise ValueError(f"a row of a launch has 1 to {MOST:,} elements")
        programs = -(-elements // PROGRAM)
        firsts = np.cumsum(programs) - programs
        rows = np.zeros((len(elements), COLUMNS), np.int64)
        for column, values in enumerate((base, tuned, elements, units, firsts, begin)):
            rows[:, column] = values
        owners = np.repeat(np.arange(len(elements)), programs)
        aligned = not ((base | tuned) & 15).any()
        here = np.concatenate([rows.ravel(), owners])
        return cls(len(elements), len(owners), aligned, firsts, here)

    @classmethod
    def one(cls, base: int, tuned: int, elements: int, device: torch.device) -> Table:
        """A single row, on a device."""
        return cls.of(*np.array([[base], [tuned], [elements], [0]])).sent(device)

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes of a table that is on the device."""
        assert self.numbers is not None
        cut = COLUMNS * self.rows
        both = {"rows": self.numbers[:cut], "owners": self.numbers[cut:]}
        return {**both, "N": PROGRAM, "COLUMNS": COLUMNS}

    def sent(self, device: torch.device) -> Table:
        """The table, copied to a device."""
        self.numbers = sent(self.here, device)
        return self

    @property
    def lasts(self) -> Int64:
        """The last program of each row."""
        return np.append(self.firsts[1:], self.programs) - 1

    def sums(self, counts: npt.NDArray[np.signedinteger]) -> Int64:
        """int64 (rows, n), modulo 2**64, of numbers for each program, (n, programs)."""
        return np.add.reduceat(counts, self.firsts, axis=1, dtype=np.int64).T


def sent(numbers: Int64, device: torch.device) -> torch.Tensor:
    """Numbers, copied to a device; nothing waits for what it does."""
    here = torch.from_numpy(numbers)
    if device.type != "cuda":
        return here
    return here.pin_memory().to(device, non_blocking=True)
