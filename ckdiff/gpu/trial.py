"""A short measurement: is this source compared faster on the GPU?

Some windows of the source itself are read and compared on the CPU and on the device, by as many
workers as there will be. Often the disk is the limit; then the CPU keeps up with it and is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from ckdiff.chunks import DiffTask
from ckdiff.errors import CkdiffError
from ckdiff.kernels import Comparing, Results

__all__ = ["decide", "try_both"]

_ROUNDS = 3
_REPEATS = 4  # of a window in a round
#: how much faster the GPU has to be: what it gains must outlast the noise of a short measurement
_MARGIN = 1.15


def try_both(here: DiffTask, there: DiffTask, chunks: Sequence[int], name: str) -> tuple[bool, str]:
    """(whether to use the device, why), from one window of each chunk, each on its own thread.

    ``here`` and ``there`` are the same task on the CPU and on the device. Raises what tasks raise.
    """
    with ExitStack() as stack:
        windows = [_Window(here, chunk, stack) for chunk in chunks]
        pool = stack.enter_context(ThreadPoolExecutor(len(windows)))

        def seconds(work: Callable[[_Window], None]) -> float:
            began = time.perf_counter()
            list(pool.map(work, windows))
            return time.perf_counter() - began

        total = sum(window.nbytes for window in windows)
        if not total:
            return False, "there is nothing to read to try it on"
        reading = seconds(_Window.read)
        try:
            seconds(lambda window: window.compare(there.comparing, 1))  # buffers are made here
        except CkdiffError as error:
            return False, str(error)
        times: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(_ROUNDS):
            for side, task in enumerate((here, there)):

                def work(window: _Window, comparing: Comparing = task.comparing) -> None:
                    window.compare(comparing, _REPEATS)

                times[side].append(seconds(work) / _REPEATS)
        for window in windows:
            window.release()
    source, cpu, gpu = (total / max(t, 1e-9) for t in (reading, min(times[0]), min(times[1])))
    return decide(source, cpu, gpu, name)


def decide(source: float, cpu: float, gpu: float, name: str) -> tuple[bool, str]:
    """(whether to use the device, why) from bytes a second: delivered, and compared."""
    compared = f"{cpu / 1e9:.1f} GB/s on the CPU, {gpu / 1e9:.1f} GB/s on {name}"
    if source <= cpu:
        return False, f"the source delivers {source / 1e9:.1f} GB/s, which the CPU keeps up with"
    if gpu < _MARGIN * cpu:
        return False, f"the GPU is no faster here ({compared})"
    return True, f"it is faster here ({compared})"


class _Window:
    """The last window of a chunk that is read; the first may have been asked of the disk before."""

    def __init__(self, task: DiffTask, chunk: int, stack: ExitStack) -> None:
        first, end = task.layout.chunk_range(chunk)
        every = list(task.windows(first, end, task.layout.spans(first, end)))
        self._window = next((w for w in reversed(every) if len(w.spans)), every[-1])
        self._task = task
        self._readers = [
            stack.enter_context(closing(side.reader())) for side in (task.base, task.tuned)
        ]
        self._masks: list[npt.NDArray[np.uint8]] = [
            np.zeros(task.window // 8, np.uint8) for _ in range(task.rules)
        ]
        rows = len(task.layout.spans(first, end))
        self._results = Results(rows, task.rules, with_statistics=task.with_statistics)
        self.nbytes = 2 * int(self._window.nbytes.sum())

    def read(self) -> None:
        """Make both sides addressable, asking for all of it at once as a run does."""
        self._task.prefetch(self._readers, self._window)
        self._segments = self._task.segments(self._window, self._readers)

    def compare(self, comparing: Comparing, times: int) -> None:
        """Compare the window; nobody looks at the results."""
        for _ in range(times):
            comparing.run(self._segments, self._masks, self._results)

    def release(self) -> None:
        """Give both sides back. Raises SourceChanged."""
        for reader in self._readers:
            reader.release()
