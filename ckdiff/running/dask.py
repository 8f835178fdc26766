"""Running chunk tasks on a Dask cluster: a local one, or that of any scheduler.

Nothing but small results ever moves: each worker reads sources and stores itself.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from ckdiff.errors import CkdiffError, ClusterError, UsageError, install, printable
from ckdiff.running.remote import Remote
from ckdiff.running.threads import ChunkTask, TreeTask
from ckdiff.running.tree import Tree

if TYPE_CHECKING:
    from distributed import Client, Future

    #: an address, an open client, or "threads" for this process whatever client is active
    Scheduler: TypeAlias = str | Client | None

T = TypeVar("T")

_CONNECTING = 20.0  # seconds until a scheduler that does not answer is given up
_CLOSING = 2.0  # seconds to take leave of a scheduler
_PATIENCE = 30.0  # seconds without any worker, or without a word from the scheduler
_TICK = 0.1  # seconds between progress reports
_LOOK = 2.0  # seconds without a result after which the cluster is asked how it is
_SAME = "install the same ckdiff and the same Python packages on all machines"  # a hint
_RESUME = "see the logs of the scheduler; the same command begins again"  # a hint


# which cluster


@contextmanager
def client_for(scheduler: Scheduler) -> Iterator[Client | None]:
    """The client to run on: that of ``scheduler``, else one that is active here, else None.

    Raises ClusterError where the scheduler does not answer within 30 seconds.
    """
    if scheduler is None:
        yield _usable(_active_client())
    elif isinstance(scheduler, str):
        if scheduler == "threads":
            yield None
            return
        with _quiet():
            client = _connected(scheduler)
            try:
                yield client
            finally:
                client.close(timeout=_CLOSING)
    elif "distributed" in sys.modules and isinstance(scheduler, sys.modules["distributed"].Client):
        yield _usable(scheduler)
    else:
        kind = type(scheduler).__name__
        raise UsageError(f"scheduler must be an address or a Dask client, not {printable(kind)}")


def _connected(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError:
        raise ClusterError(
            "a scheduler needs the package distributed", hint=install("cluster")
        ) from None
    try:
        _knock(address)
        return Client(address, timeout=_CONNECTING, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError, ClusterError) as error:
        raise ClusterError(
            f"the scheduler {printable(address)} does not answer: {_brief(error)}",
            hint="give the address that `dask scheduler` prints, such as tcp://host:8786",
        ) from None


def _knock(address: str) -> None:
    """Raise ClusterError unless a scheduler answers. A Client would wait for one forever."""
    import asyncio  # here, because every diff imports this module

    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> str:
        async with rpc(
            address, connection_args=Security().get_connection_args("client")
        ) as scheduler:
            found = await asyncio.wait_for(scheduler.identity(), _CONNECTING)
            return str(found["type"])

    def run() -> None:
        try:
            answer.put(asyncio.run(ask()))
        except Exception as error:  # whatever comes back from a port that is not Dask's
            answer.put(error)

    answer: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
    # in a thread, because this one may have an event loop already, as it has in a notebook
    threading.Thread(target=run, name="ckdiff-connect", daemon=True).start()
    found = answer.get()
    if isinstance(found, TimeoutError):
        raise ClusterError(f"no answer for {_CONNECTING:.0f} seconds")
    if isinstance(found, Exception):
        raise ClusterError(_brief(found))
    if found != "Scheduler":
        raise ClusterError(f"it is a {printable(found)}, not a scheduler")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's own log lines off stderr: what they say arrives here as an exception."""
    with suppress(ImportError):
        import distributed  # noqa: F401  # it sets levels when it is imported
    logger = logging.getLogger("distributed")
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]
    loggers = [logger, *map(logging.getLogger, names)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _active_client() -> Client | None:
    if "distributed" not in sys.modules:  # nobody can have made a client
        return None
    from distributed import default_client, get_worker

    try:
        get_worker()
    except ValueError:
        pass
    else:
        return None  # inside a task: waiting for others of the same cluster might last forever
    try:
        client: Client = default_client()
    except ValueError:
        return None
    return client


def _usable(client: Client | None) -> Client | None:
    if client is not None and client.asynchronous:
        raise ClusterError(
            "the Dask client is asynchronous, and ckdiff waits for its results",
            hint='make one with Client(...) in this thread, or give scheduler="threads"',
        )
    return client


def threads_of(client: Client) -> int:
    """How many chunks the cluster's workers run at a time, at least 1."""
    found: dict[str, int] = _ask(client, "ncores", workers=None)
    return max(1, sum(found.values()))


# adding up


def run_cluster_tree(
    chunks: int,
    task: Remote[TreeTask[T]],
    client: Client,
    *,
    tick: Callable[[int], None] = lambda done: None,
) -> T:
    """What ``run_tree`` gives, from the workers of a cluster. Raises ClusterError as well."""
    futures = _submit(client, task, range(chunks))

    def merge(left: Future[T], right: Future[T]) -> Future[T]:
        future = client.submit(_merge, task, left, right, pure=False, key=_key("merge"))
        futures.append(future)
        return future

    with _releasing(futures):
        leaves = set(futures)
        tree = Tree(chunks, merge)
        for chunk, future in enumerate(list(futures)):
            tree.put(chunk, future)
        root = tree.root()
        done: set[Future[T]] = set()
        for future in _finished(client, {root, *leaves}, lambda: tick(len(done))):
            if future in leaves:
                done.add(future)
            tick(len(done))
        result: T = _result(client, root)
        return result


# one by one


def run_cluster(
    chunks: Iterable[int],
    task: Remote[ChunkTask[T]],
    client: Client,
    *,
    done: Callable[[int, T], None],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """What ``run_threads`` does, on the workers of a cluster. Raises ClusterError as well.

    The first exception takes back what has not begun; chunks that are being computed end unseen.
    """
    chunks = list(chunks)
    futures = _submit(client, task, chunks)
    with _releasing(futures):
        number = dict(zip(futures, chunks, strict=True))
        for future in _finished(client, set(futures), tick):
            done(number[future], _result(client, future))
            future.release()
            tick()


# futures


def _key(what: str) -> str:
    """A name for a task: Dask's dashboard shows what stands before the last hyphen."""
    import uuid

    return f"ckdiff-{what}-{uuid.uuid4().hex}"


def _submit(client: Client, task: Remote[Any], chunks: Sequence[int]) -> list[Future[Any]]:
    if not chunks:
        return []
    keys = [_key("chunk") for _ in chunks]
    futures: list[Future[Any]] = client.map(
        _call, [task] * len(chunks), chunks, key=keys, pure=False, batch_size=1000
    )
    return futures


def _call(remote: Remote[ChunkTask[T]], chunk: int) -> T:
    """One chunk in a worker; its end is the worker's business."""
    with remote.task() as task:
        return task(chunk, threading.Event())


def _merge(remote: Remote[TreeTask[T]], left: T, right: T) -> T:
    with remote.task() as task:
        return task.merge(left, right)


@contextmanager
def _releasing(futures: list[Future[Any]]) -> Iterator[None]:
    """Take back in the end what is still wanted: Dask then forgets what has not begun."""
    try:
        yield
    finally:
        for future in futures:
            future.release()


def _finished(
    client: Client, futures: set[Future[Any]], tick: Callable[[], None]
) -> Iterator[Future[Any]]:
    """The futures as they finish, in this thread. Raises what a task raised, and ClusterError."""
    arrived: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(arrived.put)
    watch = _Watch(client)
    for _ in range(len(futures)):
        while True:
            try:
                future = arrived.get(timeout=_TICK)
                break
            except queue.Empty:
                watch.look()
                tick()
        watch.heard()
        if future.status != "finished":
            _result(client, future)  # raises
        yield future


def _result(client: Client, future: Future[T]) -> T:
    """What a future that has finished holds, computed again if it was lost since."""
    watch = _Watch(client)
    while True:
        try:
            found: T = future.result(timeout=_LOOK)
            return found
        except TimeoutError as error:
            if future.status == "error":
                _explain(error)
            watch.look()
        except (Exception, CancelledError) as error:
            if isinstance(error, OSError) and future.status != "error":  # it was not the task's
                raise ClusterError(f"the cluster was lost: {_brief(error)}", hint=_RESUME) from None
            _explain(error)


def _explain(error: BaseException) -> NoReturn:
    """Raise what a task raised; ClusterError where it is the cluster that failed."""
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"workers of the cluster died again and again: {_brief(error)}",
            hint="see their logs; is their memory limit too small?",
        ) from None
    if isinstance(error, CancelledError):
        lost = "the connection to the scheduler" if "connection-lost" in str(error) else "a task"
        raise ClusterError(f"the cluster was lost: {lost} was cut off", hint=_RESUME) from None
    if isinstance(error, ImportError) or "deserializ" in str(error):
        cause = error.__cause__ or error
        raise ClusterError(
            f"the cluster does not know this ckdiff: {_brief(cause)}", hint=_SAME
        ) from None
    raise error


class _Watch:
    """Notices that nobody works any more. Dask itself would wait forever."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.heard()

    def heard(self) -> None:
        """Somebody works."""
        self._asked = self._working = time.monotonic()

    def look(self) -> None:
        """Ask now and then whether there is still a scheduler with workers; ClusterError."""
        if time.monotonic() - self._asked < _LOOK:
            return
        running = _ask(self._client, "ncores_running", workers=None)
        self._asked = now = time.monotonic()
        if running:
            self._working = now
        elif now - self._working > _PATIENCE:
            raise ClusterError(
                f"the cluster has had no worker for {_PATIENCE:.0f} seconds",
                hint="start one with `dask worker ADDRESS`; the logs of others say why they ended, "
                "or were paused for lack of memory",
            )


def _ask(client: Client, question: str, **about: Any) -> Any:
    """What the scheduler answers. Raises ClusterError where it does not."""
    try:
        if client.status == "running":
            ask = getattr(client.scheduler, question)
            return client.sync(ask, callback_timeout=_PATIENCE, **about)
        reason = f"the client is {client.status}"
    except OSError as error:  # a TimeoutError is one as well
        reason = _brief(error)
    raise ClusterError(f"the scheduler does not answer any more: {reason}", hint=_RESUME)


def _brief(error: BaseException) -> str:
    if isinstance(error, CkdiffError):
        return error.message
    text = str(error).strip()
    return printable(text.splitlines()[0] if text else type(error).__name__)
