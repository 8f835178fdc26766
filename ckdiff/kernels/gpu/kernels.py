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
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.pool import HINT, Pool, failed, out_of_memory
from ckdiff.kernels.gpu.preparing import make_slots
from ckdiff.kernels.gpu.sizes import STAGES, Sizes
from ckdiff.kernels.gpu.staging import Slot, Stage
from ckdiff.kernels.gpu.tables import SIDES
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["DeviceKernels"]

Int64 = npt.NDArray[np.int64]


class DeviceKernels:
    """Runs windows on a device; shared by all workers.

    When memory runs out there, pieces get smaller, and in the end windows are compared on the CPU;
    ``messages`` says so. Raises BudgetError where ``memory`` is too little from the start,
    CkdiffError where the device's code cannot be trusted, and what torch raises.
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
    ) -> None:
        """``resident`` are the addresses, from and to, of tensors in the device's memory."""
        self.slot_of = cpu.slot_of
        self.device = device
        self._cpu = cpu
        ranges = np.array(sorted(resident), np.int64).reshape(-1, 2)
        self._begins, self._ends = ranges[:, 0], np.maximum.accumulate(ranges[:, 1])
        self._slots = make_slots(cpu, dtypes, rules, device)
        self._bits = np.array([dtype.bits for dtype in dtypes], np.int64)
        sizes = Sizes(window, len(rules), int(self._bits.max(initial=8)))
        self._pool = Pool(device, sizes, sizes.fitting(workers, memory))

    @property
    def messages(self) -> deque[str]:
        """For people, to be taken out by whoever reports them."""
        return self._pool.messages

    @property
    def gave_up(self) -> bool:
        """Whether windows are compared on the CPU from now on."""
        return self._pool.gave_up

    def run(self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """See :meth:`ckdiff.kernels.Kernels.run`. Raises CkdiffError where the device fails."""
        if self.gave_up:
            self._run_here(segments, masks, into)
            return
        segments = segments[segments[:, abi.SEG_ELEMENTS] > 0]
        try:
            self._fly(segments, masks, into)
        except RuntimeError as error:
            raise failed(self.device, error) from error

    def _fly(self, todo: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """Send what there is to do through stages, piece by piece."""
        hashing = self.device.fused and into.statistics is None
        flying: deque[Stage] = deque()  # in the order of addresses, in which statistics are summed
        stages = self._pool.take() if len(todo) else None
        try:
            while len(todo) and stages is not None:
                if len(flying) == STAGES:
                    flying.popleft().finish(self._cpu, masks, into)
                stage = next(stage for stage in stages.each if stage not in flying)
                piece, rest = _cut(todo, stages.elements, self._bits)
                there = self._resident(piece)
                if _started(stage, piece, self._slots, hashing=hashing, resident=there):
                    flying.append(stage)
                    todo = rest
                    continue
                while flying:
                    flying.popleft().finish(self._cpu, masks, into)
                del stage
                small, stages = stages, None
                self._pool.ran_out(small)
                stages = self._pool.take()
            while flying:
                flying.popleft().finish(self._cpu, masks, into)
        finally:
            for stage in flying:
                stage.abandon()
            if stages is not None:
                self._pool.give_back(stages)
        if len(todo):
            self._run_here(todo, masks, into)

    def _run_here(
        self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results
    ) -> None:
        if self._resident(segments).any():
            raise CkdiffError(f"{self.device.name} is out of memory", hint=HINT)
        self._cpu.run(segments, masks, into)

    @property
    def has_tensors(self) -> bool:
        """Whether some tensors are in the device's memory, and read there."""
        return bool(len(self._begins))

    def _resident(self, segments: Int64) -> npt.NDArray[np.bool_]:
        """(segments, 2): whose addresses are in the device's memory, which no other memory has."""
        addresses = segments[:, SIDES]
        if not self.has_tensors:
            return np.zeros(addresses.shape, np.bool_)
        at = np.searchsorted(self._begins, addresses, side="right") - 1
        return np.asarray((at >= 0) & (addresses < self._ends[at]))


def _started(
    stage: Stage,
    piece: Int64,
    slots: Sequence[Slot],
    *,
    hashing: bool,
    resident: npt.NDArray[np.bool_],
) -> bool:
    """False where memory does not suffice: only that can be done again, once it is on its way a
    piece that does not come back is an error."""
    try:
        stage.start(piece, slots, hashing=hashing, resident=resident)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


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
