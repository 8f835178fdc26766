"""Comparing windows on a device: the interface of the CPU's kernels, and their results to the bit.

A window is cut into pieces that go through the stages of :mod:`ckdiff.kernels.gpu.staging`. The CPU
copies the next piece meanwhile, adds up the hashes of the last one, and takes statistics where they
are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DType
from ckdiff.errors import CkdiffError
from ckdiff.kernels import BLOCK, Kernels, Results, abi
from ckdiff.kernels.gpu.device import HINT, Device, failed, out_of_memory
from ckdiff.kernels.gpu.preparing import make_slots
from ckdiff.kernels.gpu.sizes import Sizes
from ckdiff.kernels.gpu.staging import Pool, Stage
from ckdiff.kernels.gpu.tables import SIDES
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["DeviceKernels"]

Int64 = npt.NDArray[np.int64]


class DeviceKernels:
    """Runs windows on a device; shared by all workers.

    Memory for all of them is taken at once: where there is less than may be used, pieces are
    smaller. Where it runs out all the same, windows are compared on the CPU. ``messages`` says so.
    Raises BudgetError where ``memory`` is too little, CkdiffError where the device's code cannot be
    trusted, and what torch raises.
    """

    def __init__(
        self,
        cpu: Kernels,
        dtypes: Sequence[DType],
        rules: Sequence[Rule],
        device: Device,
        *,
        window: int,
        workers: int,
        memory: int,
        resident: Sequence[tuple[int, int]] = (),
        copied: bool = True,
    ) -> None:
        """``resident`` are the addresses, from and to, of tensors in the device's memory; without
        ``copied`` there are no others.
        """
        self.slot_of = cpu.slot_of
        self.device = device
        self._cpu = cpu
        ranges = np.array([(0, 0), *sorted(resident)], np.int64)  # the first one holds nothing
        self._begins, self._ends = ranges[:, 0], np.maximum.accumulate(ranges[:, 1])
        self._slots = make_slots(cpu, dtypes, rules, device, hashing=True)
        self._bits = np.array([dtype.bits for dtype in dtypes], np.int64)
        self.gave_up = False  #: whether windows are compared on the CPU from now on
        sizes = Sizes(window, len(rules), int(self._bits.max(initial=8)), copied=copied)
        self._pool = Pool(device, sizes, workers, memory)

    @property
    def messages(self) -> deque[str]:
        """For people, to be taken out by whoever reports them."""
        return self._pool.messages

    def run(self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """See :meth:`ckdiff.kernels.Kernels.run`. Raises CkdiffError where the device fails."""
        todo = segments[segments[:, abi.SEG_ELEMENTS] > 0]
        if not self.gave_up and len(todo):
            try:
                todo = self._fly(todo, masks, into)
            except RuntimeError as error:
                raise failed(self.device, error) from error
        if len(todo):
            if self._resident(todo).any():
                raise CkdiffError(f"{self.device.name} is out of memory", hint=HINT)
            self._cpu.run(todo, masks, into)

    def _fly(self, todo: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> Int64:
        """Send what there is to do through stages, piece by piece; what is left if memory ends."""
        hashing = into.statistics is None
        with self._pool.lent() as free:
            flying: deque[Stage] = deque()  # by address: in this order statistics are summed
            while flying or (len(todo) and not self.gave_up):
                if len(flying) < len(free) and len(todo) and not self.gave_up:
                    piece, rest = _cut(todo, self._pool.elements, self._bits)
                    stage = next(stage for stage in free if stage not in flying)
                    if self._started(stage, piece, hashing=hashing):
                        flying.append(stage)
                        todo = rest
                else:
                    flying.popleft().finish(self._cpu, masks, into)
        return todo

    def _started(self, stage: Stage, piece: Int64, *, hashing: bool) -> bool:
        """False where memory does not suffice: only that can be done again, on the CPU. A piece
        that is on its way and does not come back is an error.
        """
        try:
            stage.start(piece, self._slots, hashing=hashing, resident=self._resident(piece))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if not self.gave_up:
                self.gave_up = True
                self._pool.warn("comparing on the CPU from here on")
            return False
        return True

    @property
    def has_tensors(self) -> bool:
        """Whether some tensors are in the device's memory, and read there."""
        return len(self._begins) > 1

    def _resident(self, segments: Int64) -> npt.NDArray[np.bool_]:
        """(segments, 2): whose addresses are in the device's memory, which no other memory has."""
        addresses = segments[:, SIDES]
        at = np.searchsorted(self._begins, addresses, side="right") - 1
        return np.asarray(addresses < self._ends[at])


def _cut(todo: Int64, elements: int, bits: Int64) -> tuple[Int64, Int64]:
    """The segments of the first so many positions, or a few less, and the rest.

    Cuts are at multiples of BLOCK, where sums of statistics are cut in any case. ``bits`` are those
    of an element of each slot.
    """
    starts = todo[:, abi.SEG_POSITION]
    stop = (int(starts[0]) + elements) // BLOCK * BLOCK
    before = int(np.searchsorted(starts, stop))
    piece, rest = todo[:before].copy(), todo[before:]
    over = int(starts[before - 1] + todo[before - 1, abi.SEG_ELEMENTS]) - stop
    if over > 0:
        rest = todo[before - 1 :].copy()
        done = stop - int(starts[before - 1])
        piece[-1, abi.SEG_ELEMENTS] = done
        rest[0, abi.SEG_ELEMENTS] = over
        rest[0, abi.SEG_POSITION] = stop
        rest[0, abi.SEG_UNIT] += done // UNIT
        rest[0, [abi.SEG_BASE, abi.SEG_TUNED]] += done * int(bits[rest[0, abi.SEG_SLOT]]) // 8
    return piece, rest
