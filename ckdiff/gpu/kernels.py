"""Comparing windows on a device: the interface of the CPU's kernels, and their results to the bit.

A window is cut into pieces of one dtype that go through the stages of :mod:`ckdiff.gpu.staging`.
The CPU does what is left to it meanwhile: it copies the next piece, hashes the last one, takes
statistics where they are asked for, and compares what is too short to be worth a journey.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.dtypes import DType
from ckdiff.errors import CkdiffError
from ckdiff.gpu import changes
from ckdiff.gpu.sizes import SMALLEST_SIDE, STAGES, Sizes
from ckdiff.gpu.staging import Device, Slot, Stage
from ckdiff.kernels import BLOCK, Kernels, Results, abi
from ckdiff.kernels.binding import bind
from ckdiff.kernels.hashing import UNIT
from ckdiff.rules import Rule

__all__ = ["DeviceKernels"]

Int64 = npt.NDArray[np.int64]

#: elements of one dtype in a row, in all and of a tensor on average; where there are fewer they are
#: compared on the CPU, as launches and calls would take longer
LEAST, LEAST_EACH = 1 << 15, 1 << 12


class DeviceKernels:
    """Runs windows on a device; shared by all workers.

    When memory runs out there, pieces get smaller, and in the end windows are compared on the CPU;
    ``messages`` says so. Raises BudgetError where ``memory`` is too little from the start.
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
        self.messages: deque[str] = deque()  #: warnings, to be taken out by whoever reports them
        self.gave_up = False  #: whether windows are compared on the CPU from now on
        self._cpu = cpu
        self._local = threading.local()
        self._lock = threading.Lock()
        self._slots = [
            Slot(dtype, [bind(rule, dtype) for rule in rules], [None] * len(rules))
            for dtype in dtypes
        ]
        self._rules = len(rules)
        self._sizes = Sizes(dtypes, rules, window)
        self._side = self._sizes.side(workers, memory)
        for i, slot in enumerate(self._slots):
            if any(changes.needs_table(bound, slot.dtype) for bound in slot.bounds):
                slot.tables = self._tables(i, slot)

    def run(self, segments: Int64, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """See :meth:`ckdiff.kernels.Kernels.run`. Raises CkdiffError where the device fails."""
        if self.gave_up:
            self._cpu.run(segments, masks, into)
            return
        todo: deque[Int64] = deque()
        short: list[Int64] = []
        for batch in _batches(segments):
            long = int(batch[:, abi.SEG_ELEMENTS].sum()) >= max(LEAST, LEAST_EACH * len(batch))
            (todo if long else short).append(batch)
        if short:
            self._cpu.run(np.concatenate(short), masks, into)
        flying: deque[Stage] = deque()  # in the order of addresses, in which statistics are summed
        try:
            self._fly(todo, flying, masks, into)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise CkdiffError(
                f"{self.device.name} failed: {reason}", hint="run with --device cpu"
            ) from error
        finally:
            for stage in flying:
                stage.abandon()

    def _fly(
        self,
        todo: deque[Int64],
        flying: deque[Stage],
        masks: Sequence[npt.NDArray[np.uint8]],
        into: Results,
    ) -> None:
        """Send what there is to do through the stages, piece by piece."""
        while todo and not self.gave_up:
            side = self._side
            if len(flying) == STAGES:
                flying.popleft().finish(self._cpu, masks, into)
            stage: Stage | None = None
            try:  # only what can be done again: a piece that does not come back is an error
                stage = next(stage for stage in self._stages(side) if stage not in flying)
                slot = self._slots[todo[0][0, abi.SEG_SLOT]]
                piece, rest = _cut(todo[0], self._sizes.elements(slot.dtype, side), slot.dtype.bits)
                stage.start(piece, slot)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                stage = None
            if stage is None:  # and the error is gone, with the tensors in its frames
                while flying:
                    flying.popleft().finish(self._cpu, masks, into)
                self._local.stages = []
                self.device.drop_cache()
                self._shrink(side)
                continue
            flying.append(stage)
            todo.popleft()
            if len(rest):
                todo.appendleft(rest)
        while flying:
            flying.popleft().finish(self._cpu, masks, into)
        if todo:
            self._cpu.run(np.concatenate(todo), masks, into)

    def _stages(self, side: int) -> list[Stage]:
        """This thread's stages for pieces of that size."""
        local = self._local
        if getattr(local, "side", None) != side:
            local.side, local.stages = side, []
        stages: list[Stage] = local.stages
        while len(stages) < STAGES:
            stages.append(Stage(self.device, side, self._sizes.out(side)))
        return stages

    def _shrink(self, side: int) -> None:
        """Memory ran out with pieces of that size."""
        with self._lock:
            if self._side != side or self.gave_up:
                return  # another worker's memory ran out before, and it has seen to it
            if side > SMALLEST_SIDE:
                self._side = side // 2
                then = "going on with smaller pieces"
            else:
                self.gave_up = True
                then = "comparing on the CPU from here on"
            self.messages.append(f"warning: {self.device.name} is out of memory: {then}")

    def _tables(self, index: int, slot: Slot) -> list[torch.Tensor | None]:
        """For 8-bit elements: which pairs are changed, as the CPU's kernels say."""
        every = np.arange(changes.PAIRS, dtype=np.uint16)
        base, tuned = (every >> 8).astype(np.uint8), every.astype(np.uint8)
        segment = np.zeros((1, abi.SEG_COLUMNS), np.int64)
        segment[0, abi.SEG_BASE], segment[0, abi.SEG_TUNED] = base.ctypes.data, tuned.ctypes.data
        segment[0, abi.SEG_ELEMENTS], segment[0, abi.SEG_SLOT] = changes.PAIRS, index
        masks = [np.zeros(changes.PAIRS // 8, np.uint8) for _ in slot.bounds]
        self._cpu.run(segment, masks, Results(1, self._rules, with_statistics=False))
        with self.device.lock, self.device.on(self.device.comparing):
            return [
                torch.from_numpy(np.unpackbits(mask, bitorder="little").view(np.bool_)).to(
                    self.device.device
                )
                if changes.needs_table(bound, slot.dtype)
                else None
                for mask, bound in zip(masks, slot.bounds, strict=True)
            ]


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


def _out_of_memory(error: RuntimeError) -> bool:
    """Pinned memory that cannot be had is an ordinary RuntimeError of CUDA's."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)
