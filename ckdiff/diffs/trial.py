"""A short measurement: is this source compared faster on the GPU?

Some windows of the source itself are read and compared on the CPU and on the device, by as many
workers as there will be. Often the disk is the limit; then the CPU keeps up with it and is taken.
Each worker has several windows, of which a CPU's caches do not hold all from one round to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from ckdiff.diffs.sides import Window
from ckdiff.diffs.task import DiffTask
from ckdiff.errors import CkdiffError
from ckdiff.kernels import Results

__all__ = ["decide", "try_both"]

_ROUNDS = 3
_WINDOWS = 4  # of a worker
#: how much faster the GPU has to be: what it gains must outlast the noise of a short measurement
_MARGIN = 1.15


def try_both(here: DiffTask, there: DiffTask, chunks: Sequence[int], name: str) -> tuple[bool, str]:
    """(whether to use the device, why), from some windows of each chunk, which has its own thread.

    ``here`` and ``there`` are the same task on the CPU and on the device. Raises what tasks raise.
    """
    with ExitStack() as stack:
        span = max(_WINDOWS * here.window, there.window)
        tried = [
            [_last_windows(task, chunk, stack, span) for chunk in chunks] for task in (here, there)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(chunks)))

        def rate(workers: list[list[_Window]], work: Callable[[_Window], None]) -> float:
            """Bytes a second."""

            def all_of(windows: list[_Window]) -> None:
                for window in windows:
                    work(window)

            began = time.perf_counter()
            list(pool.map(all_of, workers))
            total = sum(window.nbytes for windows in workers for window in windows)
            return total / max(time.perf_counter() - began, 1e-9)

        if not any(map(len, tried[0])):
            return False, "there is nothing to read to try it on"
        source = rate(tried[0], _Window.read)
        rate(tried[1], _Window.read)  # from memory now
        try:
            rate(tried[1], _Window.compare)  # buffers are made here
        except CkdiffError as error:
            return False, error.message
        rates = [[rate(workers, _Window.compare) for workers in tried] for _ in range(_ROUNDS)]
        for windows in (*tried[0], *tried[1]):
            for window in windows:
                window.release()
    cpu, gpu = map(max, zip(*rates, strict=True))
    return decide(source, cpu, gpu, name)


def decide(source: float, cpu: float, gpu: float, name: str) -> tuple[bool, str]:
    """(whether to use the device, why) from bytes a second: delivered, and compared."""
    compared = f"{cpu / 1e9:.1f} GB/s on the CPU, {gpu / 1e9:.1f} GB/s on {name}"
    if source <= cpu:
        slow = f"the source delivers {source / 1e9:.1f} GB/s, which the CPU keeps up with"
        return False, f"{slow} ({compared})"
    if gpu < _MARGIN * cpu:
        return False, f"the GPU is no faster here ({compared})"
    return True, f"it is faster here ({compared})"


def _last_windows(task: DiffTask, chunk: int, stack: ExitStack, span: int) -> list[_Window]:
    """The windows that are read of the last ``span`` addresses of a chunk; the disk may have been
    asked for others.

    Each has its readers: where these take memory there is one window, for which it was allotted.
    """
    first, end = task.layout.chunk_range(chunk)
    spans = task.layout.spans(first, end)
    alone = any(side.checkpoint.reader_memory(1) for side in task.sides)
    count = 1 if alone else max(1, span // task.window)
    some = [window for window in task.windows(first, end, spans) if len(window.spans)][-count:]
    masks = [np.zeros(task.window // 8, np.uint8) for _ in range(task.rules)]
    results = Results(len(spans), task.rules, with_statistics=task.with_statistics)
    return [_Window(task, window, masks, results, stack) for window in some]


class _Window:
    """A window of the source; nobody looks at the results."""

    def __init__(
        self,
        task: DiffTask,
        window: Window,
        masks: Sequence[npt.NDArray[np.uint8]],
        results: Results,
        stack: ExitStack,
    ) -> None:
        self._task, self._window = task, window
        self._masks, self._results = masks, results
        self._readers = [
            stack.enter_context(closing(side.checkpoint.reader())) for side in task.sides
        ]
        self._cast = task.casting.begin()
        self.nbytes = window.nbytes

    def read(self) -> None:
        """Make both sides addressable, asking for all of it at once as a run does."""
        self._task.prefetch(self._readers, self._window)
        self._segments = self._task.segments(self._window, self._readers)
        self._cast.widen(self._segments, self._window)

    def compare(self) -> None:
        """Compare the window."""
        self._task.comparing.run(self._segments, self._masks, self._results)

    def release(self) -> None:
        """Give both sides back. Raises SourceChanged."""
        for reader in self._readers:
            reader.release()
