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
from ckdiff.diffs.task import DiffTask
from ckdiff.dtypes import DTYPES
from ckdiff.errors import BudgetError, CkdiffError, UsageError
from ckdiff.options import Options
from ckdiff.rules import Rule

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.kernels import DeviceKernels
    from ckdiff.kernels.gpu.staging import Device

Allotted = TypeVar("Allotted")

#: Bytes of both sides from which on ``auto`` looks for a GPU. Starting torch and CUDA takes some
#: seconds, in which the CPU compares about as much.
WORTH_STARTING = 32 << 30


@dataclass(frozen=True, slots=True)
class Taken:
    """Where a diff was compared."""

    device: str  #: ``cpu`` or ``cuda``
    why: str | None  #: for people; None where no other was asked for


class Devices:
    """The device that was asked for, opened; then the one that is taken.

    Raises UsageError where there is no GPU and one is asked for, and for a size that cannot be
    read.
    """

    def __init__(self, options: Options, bytes_to_read: int, *, on_cluster: bool) -> None:
        self._asked = asked = options.device
        self._memory = budget.parse_size(options.device_memory)
        self._device: Device | None = None
        self._kernels: DeviceKernels | None = None
        self._messages: deque[str] = deque()
        self.taken = Taken("cpu", None)
        self.resident = 0  #: bytes of anonymous memory that torch itself took
        if asked == "cpu":
            return
        if on_cluster:
            if asked != "auto":
                raise UsageError(
                    f"a cluster's workers compare on their CPUs, not on {asked}",
                    hint='leave out --device, or use scheduler="threads"',
                )
            self.taken = Taken("cpu", "a cluster's workers compare on their CPUs")
        elif asked == "auto" and options.stream:  # nor can windows be tried out of order
            self.taken = Taken("cpu", "what is streamed comes more slowly than the CPU compares")
        elif asked == "auto" and bytes_to_read < WORTH_STARTING:
            size = budget.format_size(bytes_to_read)
            self.taken = Taken("cpu", f"{size} is too little for starting a GPU to pay")
        else:
            before = budget.resident_anonymous()
            self._open(required=asked != "auto")
            self.resident = budget.resident_anonymous() - before

    def allot(
        self, planned: Callable[..., Allotted], rules: int, bits: npt.NDArray[np.int64]
    ) -> Allotted:
        """What is ``planned``, with host memory for copies to and from the device.

        ``planned`` takes ``staging`` as :func:`ckdiff.diffs.allotment.allot` does; ``bits`` are
        those of the elements of each tensor. Where memory is too little only for the copies,
        ``auto`` leaves the device. Raises BudgetError.
        """
        if self._device is None:
            return planned()
        from ckdiff.kernels.gpu.sizes import staging_memory

        widest = int(bits.max(initial=8))
        try:
            return planned(staging=partial(staging_memory, rules=rules, bits=widest))
        except BudgetError as error:
            if not self._leave(error):
                raise
        return planned()

    def check(
        self, dtypes: Iterable[str], order: Sequence[Rule], window: int, workers: int
    ) -> None:
        """Whether device memory suffices, before anything is done.

        Raises BudgetError where it does not and a device was asked for; ``auto`` leaves it then.
        """
        if self._device is None:
            return
        from ckdiff.kernels.gpu.sizes import Sizes

        present = [DTYPES[name] for name in dict.fromkeys(dtypes)]
        eager = () if self._device.fused else present
        try:
            Sizes(present, order, window, eager).side(workers, self._memory)
        except BudgetError as error:
            if not self._leave(error):
                raise

    def task(
        self, task: DiffTask, order: Sequence[Rule], chunks: Sequence[int], workers: int
    ) -> DiffTask:
        """The task, on the device that is taken for it; ``chunks`` are those it will do."""
        if self._device is None or not chunks:
            return task
        device = self._device
        try:
            kernels = self._prepared(device, task, order, workers)
        except CkdiffError as error:
            if not self._leave(error):
                raise
            return task
        if kernels is None:
            return task
        there = replace(task, comparing=kernels)
        if self._asked == "auto":
            from ckdiff.diffs.trial import try_both

            use, why = try_both(task, there, chunks[:workers], device.name)
            if not use:
                del kernels, there
                self._drop(why)
                return task
        else:
            why = "it was asked for"
        self._kernels = kernels
        self._messages.extend(device.notes)
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
        from ckdiff.kernels.gpu.kernels import DeviceKernels
        from ckdiff.kernels.gpu.pool import failed, out_of_memory

        try:
            return DeviceKernels(
                task.kernels,
                [DTYPES[name] for name in task.kernels.slot_of],
                order,
                device,
                window=task.window,
                workers=workers,
                memory=self._memory,
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise failed(device, error) from error
        if self._asked != "auto":
            self._messages.append(f"warning: {device.name} is out of memory: comparing on the CPU")
        self._drop("the device ran out of memory")
        return None

    def _leave(self, why: CkdiffError) -> bool:
        """Go on without the device because of that, where none was asked for."""
        if self._asked == "auto":
            self._drop(str(why))
        return self._asked == "auto"

    def _drop(self, why: str) -> None:
        """Compare on the CPU, and leave the device's memory to others."""
        device, self._device = self._device, None
        self.taken = Taken("cpu", why)
        if device is not None:
            device.drop_cache()

    def _open(self, *, required: bool) -> None:
        from ckdiff.kernels.gpu import open_device

        try:
            self._device = open_device(self._asked)
        except UsageError as error:
            if required:
                raise
            self.taken = Taken("cpu", str(error))
