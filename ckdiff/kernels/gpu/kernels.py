"""Comparing windows on a device: the interface of the CPU's kernels, and their results to the bit.

A window is cut into pieces of one dtype that go through the stages of
:mod:`ckdiff.kernels.gpu.staging`. The CPU does what is left to it meanwhile: it copies the next
piece, hashes the last one, takes
statistics where they are asked for, and compares what is too short to be worth a journey.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DType
from ckdiff.kernels import BLOCK, Kernels, Results, abi
from ckdiff.kernels.gpu.pool import Pool, failed, out_of_memory
from ckdiff.kernels.gpu.preparing import make_slots
from ckdiff.kernels.gpu.sizes import STAGES, Sizes
from ckdiff.kernels.gpu.staging import Device, Slot, Stage
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["DeviceKernels"]

Int64 = npt.NDArray[np.int64]

#: elements of a tensor, on average in a row of one dtype; where there are fewer they are compared
#: on the CPU, as launches, and calls for each tensor, would take longer
LEAST = 1 << 16


class DeviceKernels:
    """Runs windows on a device; shared by all workers.

    When memory runs out there, pieces get smaller, and in the end windows are compared on the CPU;
    ``messages`` says so. Raises BudgetError where ``memory`` is too little from the start, and what
    torch raises.
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
    ) -> None:
        self.slot_of = cpu.slot_of
        self.device = device
        self._cpu = cpu
        self._slots, why = make_slots(cpu, dtypes, rules, device)
        eager = [slot.dtype for slot in self._slots if slot.fused is None]
        self._sizes = Sizes(dtypes, rules, window, eager)
        self._pool = Pool(device, self._sizes, self._sizes.side(workers, memory))
        if why is not None:
            self.messages.append(f"note: without Triton, in more steps: {why}")

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
            self._cpu.run(segments, masks, into)
            return
        todo: deque[Int64] = deque()
        short: list[Int64] = []
        for batch in _batches(segments):
            long = int(batch[:, abi.SEG_ELEMENTS].sum()) >= LEAST * len(batch)
            (todo if long else short).append(batch)
        if short:
            self._cpu.run(np.concatenate(short), masks, into)
        try:
            self._fly(todo, masks, into)
        except RuntimeError as error:
            raise failed(self.device, error) from error

    def _fly(
        self, todo: deque[Int64], masks: Sequence[npt.NDArray[np.uint8]], into: Results
    ) -> None:
        """Send what there is to do through stages, piece by piece."""
        flying: deque[Stage] = deque()  # in the order of addresses, in which statistics are summed
        stages = self._pool.take() if todo else None
        try:
            while todo and stages is not None:
                if len(flying) == STAGES:
                    flying.popleft().finish(self._cpu, masks, into)
                stage = next(stage for stage in stages.each if stage not in flying)
                slot = self._slots[todo[0][0, abi.SEG_SLOT]]
                elements = self._sizes.elements(slot.dtype, stages.side)
                piece, rest = _cut(todo[0], elements, slot.dtype.bits)
                if _started(stage, piece, slot):
                    flying.append(stage)
                    todo.popleft()
                    if len(rest):
                        todo.appendleft(rest)
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
        if todo:
            self._cpu.run(np.concatenate(todo), masks, into)


def _started(stage: Stage, piece: Int64, slot: Slot) -> bool:
    """False where memory does not suffice: only that can be done again, once it is on its way a
    piece that does not come back is an error."""
    try:
        stage.start(piece, slot)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _batches(segments: Int64) -> Iterator[Int64]:
    """Segments of one dtype that lie next to each other, but for what fills the last unit."""
    segments = segments[segments[:, abi.SEG_ELEMENTS] > 0]
    if not len(segments):
        return
    ends = segments[:, abi.SEG_POSITION] + segments[:, abi.SEG_ELEMENTS]
    follows = -(-ends[:-1] // UNIT) * UNIT == segments[1:, abi.SEG_POSITION]
    same = segments[:-1, abi.SEG_SLOT] == segments[1:, abi.SEG_SLOT]
    yield from np.split(segments, np.flatnonzero(~(follows & same)) + 1)


def _cut(batch: Int64, elements: int, bits: int) -> tuple[Int64, Int64]:
    """The first so many elements, or a few less, and the rest.

    Cuts are at multiples of BLOCK, where sums of statistics are cut in any case.
    """
    starts = batch[:, abi.SEG_POSITION]
    stop = (int(starts[0]) + elements) // BLOCK * BLOCK
    before = int(np.searchsorted(starts, stop))
    piece, rest = batch[:before].copy(), batch[before:]
    over = int(starts[before - 1] + batch[before - 1, abi.SEG_ELEMENTS]) - stop
    if over > 0:
        rest = batch[before - 1 :].copy()
        done = stop - int(starts[before - 1])
        piece[-1, abi.SEG_ELEMENTS] = done
        rest[0, abi.SEG_ELEMENTS] = over
        rest[0, abi.SEG_POSITION] = stop
        rest[0, abi.SEG_UNIT] += done // UNIT
        rest[0, [abi.SEG_BASE, abi.SEG_TUNED]] += done * bits // 8
    return piece, rest
