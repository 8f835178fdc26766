"""Running chunk tasks on Dask: its threads, a local cluster, or any scheduler.

Chunks are the tasks and results are merged in a tree whose shape depends only on their number.
Nothing but small results ever moves: each worker reads sources and stores itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ckdiff.errors import CkdiffError, ClusterError, printable

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")

_PATIENCE = 30.0  # seconds until a scheduler that does not answer is given up
_RETRIES = 3  # of a task whose worker was lost


class TreeTask(Protocol[T]):
    """A chunk task whose results can be added up."""

    def __call__(self, chunk: int, stop: threading.Event) -> T:
        """See ChunkTask."""

    def merge(self, left: T, right: T) -> T:
        """The sum of the results of neighbouring chunks."""


@contextmanager
def client_for(scheduler: str | None) -> Iterator[Client | None]:
    """The client to run on: of ``scheduler``, else one that is active here, else None.

    Raises ClusterError where the scheduler does not answer within 30 seconds.
    """
    if scheduler is None:
        yield _active_client()
        return
    try:
        from distributed import Client
    except ImportError:
        raise ClusterError(
            "--scheduler needs the package distributed", hint="pip install 'ckdiff[cluster]'"
        ) from None
    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"the scheduler {printable(scheduler)} does not answer: {_brief(error)}",
            hint="give the address that `dask scheduler` prints, such as tcp://host:8786",
        ) from None
    with client:
        yield client


def _active_client() -> Client | None:
    if "distributed" not in sys.modules:  # nobody can have made a client
        return None
    from distributed import default_client

    try:
        client: Client = default_client()
    except ValueError:
        return None
    return client


def run_tree(
    chunks: int,
    task: TreeTask[T],
    *,
    workers: int,
    client: Client | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> T:
    """The sum of the task's results for chunks 0, 1, ... (at least one).

    Runs on Dask's threads, or on the client's workers; then the task must be picklable. ``tick``
    is called in this thread with the number of chunks done. Raises what a task raises.
    """
    if client is not None:
        return _on_cluster(chunks, task, client, tick)
    from dask.callbacks import Callback
    from dask.threaded import get

    stop = threading.Event()
    graph: dict[Any, Any] = {("chunk", i): (task, i, stop) for i in range(chunks)}
    keys: list[Any] = list(graph)
    while len(keys) > 1:
        level = []
        for left, right in zip(keys[::2], keys[1::2], strict=False):
            key = ("merge", len(graph))
            graph[key] = (task.merge, left, right)
            level.append(key)
        keys = level + keys[len(level) * 2 :]
    done = 0

    def count(key: Any, *rest: object) -> None:
        nonlocal done
        done += key[0] == "chunk"
        tick(done)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="ckdiff")
    try:
        with Callback(posttask=count):
            result: T = get(graph, keys[0], pool=pool)
        return result
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)  # what tasks read is closed after this


def _on_cluster(chunks: int, task: TreeTask[T], client: Client, tick: Callable[[int], None]) -> T:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    leaves = client.map(
        _call, [task] * chunks, range(chunks), pure=False, retries=_RETRIES, batch_size=1000
    )
    futures: Sequence[Any] = leaves
    while len(futures) > 1:
        merged = [
            client.submit(task.merge, left, right, pure=False, retries=_RETRIES)
            for left, right in zip(futures[::2], futures[1::2], strict=False)
        ]
        futures = merged + list(futures[len(merged) * 2 :])
    try:
        for done, _ in enumerate(as_completed(leaves, raise_errors=False), 1):
            tick(done)
        result: T = futures[0].result()
    except KilledWorker as error:
        raise ClusterError(
            f"workers of the cluster died again and again: {_brief(error)}",
            hint="look at their logs; is their memory limit too small?",
        ) from None
    finally:
        client.cancel([*leaves, *futures])
    return result


def _call(task: TreeTask[T], chunk: int) -> T:
    """One chunk in a worker process; its end is the worker's business."""
    return task(chunk, threading.Event())


def _brief(error: BaseException) -> str:
    if isinstance(error, CkdiffError):
        return str(error)
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
