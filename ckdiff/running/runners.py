"""How a command runs its chunks: on threads or on a cluster, told about, and interruptible.

What an earlier run left is the business of the store that is written: see ckdiff.stores.collecting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ckdiff.errors import Interrupted
from ckdiff.options import Observer, Progress
from ckdiff.running.remote import Recipe, Remote
from ckdiff.running.threads import Amount, ChunkTask, TreeTask, run_threads
from ckdiff.running.tree import run_tree

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Meter(Amount):
    """How much of a run is done, and who is told; the run begins when its meter is made."""

    def __init__(self, observer: Observer, total: int, resumed: int = 0) -> None:
        super().__init__(resumed)
        self.total = total  #: bytes
        self._observer, self._resumed = observer, resumed
        self._began = time.perf_counter()

    def report(self) -> None:
        """Tell the observer; to be called about ten times a second."""
        seconds = time.perf_counter() - self._began
        done = min(self.value, self.total)
        self._observer.progress(Progress(done, self.total, seconds, self._resumed))

    def finish(self) -> None:
        """Say that everything is done."""
        self.value = self.total
        self.report()


@contextmanager
def interruptible(hint: str | Callable[[], str | None] | None = None) -> Iterator[None]:
    """Raise Interrupted for a signal; ``hint`` says what is left behind, or what to do.

    SIGTERM and Ctrl-C both arrive as KeyboardInterrupt, in the main thread.
    """
    try:
        yield
    except KeyboardInterrupt:
        said = hint() if callable(hint) else hint
        raise Interrupted("interrupted", hint=said) from None


@dataclass(frozen=True, slots=True)
class OnCluster(Generic[T_co]):
    """A task that the workers of a Dask cluster make for themselves."""

    recipe: Recipe[T_co]
    client: Client


def run_chunks(
    chunks: Iterable[int],
    task: ChunkTask[T] | OnCluster[ChunkTask[T]],
    *,
    workers: int,
    done: Callable[[int, T], None],
    meter: Meter,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Run the task for every chunk, here on ``workers`` threads; the meter reports.

    ``done(chunk, result)`` is called in this thread, in any order. The first exception ends the run
    and is raised; ``stopping`` is as in run_threads.
    """
    if isinstance(task, OnCluster):
        from ckdiff.running.dask import run_cluster

        run_cluster(chunks, Remote(task.recipe), task.client, done=done, tick=meter.report)
    else:
        run_threads(chunks, task, workers=workers, done=done, tick=meter.report, stopping=stopping)
    meter.finish()


def add_up(
    chunks: int, task: TreeTask[T] | OnCluster[TreeTask[T]], *, workers: int, meter: Meter
) -> T:
    """The sum of the task's results for chunks 0, 1, ... (at least one), added in a fixed tree.

    The meter's total is spread evenly over the chunks. Raises as ``run_chunks`` does.
    """

    def tick(done: int) -> None:
        meter.value = meter.total * done // chunks
        meter.report()

    tick(0)
    if isinstance(task, OnCluster):
        from ckdiff.running.dask import run_cluster_tree

        return run_cluster_tree(chunks, Remote(task.recipe), task.client, tick=tick)
    return run_tree(chunks, task, workers=workers, tick=tick)
