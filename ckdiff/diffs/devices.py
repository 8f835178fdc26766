"""Where windows are compared: on the CPU, on a GPU, or wherever this source is faster.

torch is imported by those who ask for a GPU, and for ``auto`` only where there is so much to
compare that starting it could pay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from ckdiff import budget
from ckdiff.checkpoints.places.memory import MemoryCheckpoint
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.task import DiffTask, largest_window
from ckdiff.dtypes import DTYPES
from ckdiff.errors import BudgetError, CkdiffError, UsageError
from ckdiff.options import Options
from ckdiff.rules import Rule

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.device import Device
    from ckdiff.kernels.gpu.kernels import DeviceKernels

Allotted = TypeVar("Allotted")

#: Bytes of both sides from which on ``auto`` looks for a GPU. Starting torch and CUDA takes some
#: seconds, in which the CPU compares about as much.
WORTH_STARTING = 32 << 30

#: Elements of a window for a device, where memory is plenty: several of its pieces. What is done
#: once for a window or a piece is done by Python, one worker at a time.
LARGEST_THERE = 1 << 25


@dataclass(frozen=True, slots=True)
class Taken:
    """Where a diff was compared."""

    device: str  #: ``cpu`` or ``cuda``
    why: str | None  #: for people; None where no other was asked for


@dataclass(frozen=True, slots=True)
class Devices:
    """The device that was asked for, opened, and why it is not used where that is known already."""

    asked: str
    memory: int  #: bytes of a device's that may be used
    device: Device | None = None
    taken: Taken = Taken("cpu", None)  #: where there is no device
    resident: int = 0  #: bytes of anonymous memory that torch itself took

    @classmethod
    def of(
        cls,
        options: Options,
        bytes_to_read: int,
        *,
        on_cluster: bool,
        sides: Sequence[Checkpoint] = (),
    ) -> Devices:
        """Open the device that ``options`` ask for, where using it could pay: where there is much
        to read, or tensors of one of the sides are on a GPU.

        Raises UsageError where there is no GPU and one is asked for, and for a size that cannot be
        read.
        """
        asked, why = options.device, None
        none = cls(asked, budget.parse_size(options.device_memory))
        if asked == "cpu":
            return none
        if on_cluster:
            if asked != "auto":
                raise UsageError(
                    f"a cluster's workers compare on their CPUs, not on {asked}",
                    hint='leave out --device, or use scheduler="threads"',
                )
            why = "a cluster's workers compare on their CPUs"
        elif asked == "auto" and options.stream:  # nor can windows be tried out of order
            why = "data arrives more slowly than the CPU compares it"
        elif asked == "auto" and bytes_to_read < WORTH_STARTING and not _on_gpu(sides):
            why = f"{budget.format_size(bytes_to_read)} is too little for starting a GPU to pay"
        return none._opened() if why is None else replace(none, taken=Taken("cpu", why))

    def allot(
        self, planned: Callable[..., Allotted], rules: int, bits: npt.NDArray[np.int64]
    ) -> tuple[Devices, Allotted]:
        """What is left of this, and what is ``planned`` with host memory for copies to and from the
        device.

        ``planned`` takes ``staging`` as :func:`ckdiff.diffs.allotment.allot` does; ``bits`` are
        those of the elements of each tensor. Where memory is too little only for the copies,
        ``auto`` leaves the device. Raises BudgetError.
        """
        if self.device is None:
            return self, planned()
        from ckdiff.kernels.gpu.sizes import staging_memory

        widest = int(bits.max(initial=8))
        try:
            staging = partial(staging_memory, rules=rules, bits=widest)
            return self, planned(staging=staging, largest=LARGEST_THERE)
        except BudgetError as error:
            return self._left(error), planned()

    def check(
        self, dtypes: Iterable[str], order: Sequence[Rule], window: int, workers: int
    ) -> Devices:
        """What is left of this once device memory is known to suffice, or not to.

        Raises BudgetError where it does not and a device was asked for; ``auto`` leaves it then.
        """
        if self.device is None:
            return self
        from ckdiff.kernels.gpu.sizes import Sizes

        widest = max((DTYPES[name].bits for name in set(dtypes)), default=8)
        try:
            Sizes(window, len(order), widest).fitting(workers, self.memory)
        except BudgetError as error:
            return self._left(error)
        return self

    def _opened(self) -> Devices:
        from ckdiff.kernels.gpu import open_device

        before = budget.resident_anonymous()
        device, taken = None, self.taken
        try:
            device = open_device(self.asked)
        except UsageError as error:
            if self.asked != "auto":
                raise
            taken = Taken("cpu", error.message)
        resident = budget.resident_anonymous() - before
        return replace(self, device=device, taken=taken, resident=resident)

    def _left(self, error: CkdiffError) -> Devices:
        """Without the device because of ``error``, which is raised where one was asked for."""
        if self.asked != "auto":
            raise error
        if self.device is not None:
            self.device.drop_cache()
        return replace(self, device=None, taken=Taken("cpu", error.message))


class DeviceRun:
    """Where a run's windows are compared: the device of its plan, or what is taken instead."""

    def __init__(self, planned: Devices) -> None:
        self._planned, self._device = planned, planned.device
        self._kernels: DeviceKernels | None = None
        self._messages: deque[str] = deque()
        self.taken = planned.taken

    def task(
        self, task: DiffTask, order: Sequence[Rule], chunks: Sequence[int], workers: int
    ) -> DiffTask:
        """The task, on the device that is taken for it; ``chunks`` are those it will do."""
        there = task
        # as the CPU likes them
        most = largest_window(side.checkpoint for side in task.sides)
        task = replace(task, window=min(task.window, most))
        if self._device is None or not chunks:
            return task
        device = self._device
        try:
            kernels = self._prepared(device, there, order, workers)
        except CkdiffError as error:
            if self._planned.asked != "auto":
                raise
            self._drop(error.message)
            return task
        if kernels is None:
            return task
        there = replace(
            there, comparing=kernels, stays=str(device.device) if kernels.has_tensors else ""
        )
        if kernels.has_tensors:
            why = "tensors are on it"
        elif self._planned.asked == "auto":
            from ckdiff.diffs.trial import try_both

            use, why = try_both(task, there, chunks[:workers], device.name)
            if not use:
                del kernels, there
                self._drop(why)
                return task
        else:
            why = "it was asked for"
        self._kernels = kernels
        self.taken = Taken(device.device.type, f"{device.name}: {why}")
        return there

    def report(self, note: Callable[[str], None]) -> None:
        """Hand on warnings of the workers; call it in the thread that may be told."""
        kernels = self._kernels
        for messages in (self._messages, kernels.messages if kernels is not None else deque()):
            while messages:
                note(messages.popleft())
        if kernels is not None and kernels.gave_up:
            self.taken = Taken("cpu", "the device ran out of memory")

    def _prepared(
        self, device: Device, task: DiffTask, order: Sequence[Rule], workers: int
    ) -> DeviceKernels | None:
        """What compares on the device; None where its memory is in use. Raises CkdiffError."""
        from ckdiff.kernels.gpu.device import failed, out_of_memory
        from ckdiff.kernels.gpu.kernels import DeviceKernels

        resident, copied = _resident(task, str(device.device))
        try:
            return DeviceKernels(
                task.kernels,
                [DTYPES[name] for name in task.kernels.slot_of],
                order,
                device,
                window=task.window,
                workers=workers,
                memory=self._planned.memory,
                resident=resident,
                copied=copied,
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise failed(device, error) from error
        if self._planned.asked != "auto":
            self._messages.append(f"warning: {device.name} is out of memory: comparing on the CPU")
        self._drop("the device ran out of memory")
        return None

    def _drop(self, why: str) -> None:
        """Compare on the CPU, and leave the device's memory to others."""
        device, self._device = self._device, None
        self.taken = Taken("cpu", why)
        if device is not None:
            device.drop_cache()


def _on_gpu(sides: Sequence[Checkpoint]) -> bool:
    return any(isinstance(side, MemoryCheckpoint) and side.on_gpu() for side in sides)


def _resident(task: DiffTask, device: str) -> tuple[list[tuple[int, int]], bool]:
    """Where tensors of both sides are in a device's memory, and whether there are others. They are
    compared there as they are: statistics, a cast and an adapter are the CPU's.
    """
    if task.with_statistics or any(task.casting.narrow) or task.merging is not None:
        return [], True
    found, copied = [], False
    for side in task.sides:
        if not isinstance(side.checkpoint, MemoryCheckpoint):
            copied = True
            continue
        places, sizes = side.checkpoint.on_device(device), side.checkpoint.table.nbytes
        some = (places > 0) & (sizes > 0)
        found += list(zip(places[some].tolist(), (places + sizes)[some].tolist(), strict=True))
        copied |= bool((some != (sizes > 0)).any())
    return found, copied
