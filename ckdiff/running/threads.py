"""Running chunk tasks: one interface, and the runner that uses our own threads.

A chunk task is a function of a chunk number. It may run anywhere and twice; whoever runs it hands
its result to ``done`` in the caller's thread, in any order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_TICK = 0.1  # seconds between progress reports


class Amount:
    """Work done, added to by workers; a lost update would only blur a progress bar."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, amount: int) -> None:
        """So much more was done."""
        self.value += amount


class Stopped(Exception):
    """Raised inside a task that notices that the run is being stopped."""


class PerThread(Generic[T]):
    """What each thread has for itself, made when it first asks."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._local = threading.local()

    def __call__(self) -> T:
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        value: T = self._local.value
        return value


class ChunkTask(Protocol[T_co]):
    """What a runner runs; ``stop`` is set when the run is over and the task should give up."""

    def __call__(self, chunk: int, stop: threading.Event) -> T_co:
        """Do chunk number ``chunk``; may raise Stopped soon after ``stop`` is set."""


class TreeTask(ChunkTask[T], Protocol[T]):
    """A chunk task whose results can be added up."""

    def merge(self, left: T, right: T) -> T:
        """The sum of the results of neighbouring chunks."""


class InOrder(Generic[T]):
    """Hands results on in the order of their chunks, and keeps only a few that came too early.

    A task calls ``wait`` before it works; the runner's thread calls ``put``.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead  # chunks that may be worked on before the oldest is done
        self._next = 0
        self._early: dict[int, T] = {}
        self._moved = threading.Condition()

    def wait(self, chunk: int, stop: threading.Event) -> None:
        """Wait until chunk's turn is near. Raises Stopped."""
        with self._moved:
            while chunk >= self._next + self._ahead:
                if stop.is_set():
                    raise Stopped
                self._moved.wait(_TICK)

    def put(self, chunk: int, result: T) -> Iterator[tuple[int, T]]:
        """Take a chunk's result; gives all that can be handed on now."""
        self._early[chunk] = result
        while self._next in self._early:
            yield self._next, self._early.pop(self._next)
            with self._moved:
                self._next += 1
                self._moved.notify_all()


class _Work(Generic[T]):
    """The chunks of a run and their results. What threads call; each says when it has ended."""

    def __init__(self, chunks: Iterable[int], task: ChunkTask[T]) -> None:
        self.stop = threading.Event()
        self.results: queue.SimpleQueue[tuple[int, T | None, BaseException | None]]
        self.results = queue.SimpleQueue()
        self._task = task
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for chunk in chunks:
            self._waiting.put(chunk)
        self.count = self._waiting.qsize()

    def __call__(self, ended: threading.Event) -> None:
        try:
            while not self.stop.is_set():
                chunk = self._waiting.get_nowait()
                try:
                    self.results.put((chunk, self._task(chunk, self.stop), None))
                except BaseException as error:  # handed to the caller's thread, never swallowed
                    self.results.put((chunk, None, error))
                    return
        except queue.Empty:
            pass
        finally:
            ended.set()


def run_threads(
    chunks: Iterable[int],
    task: ChunkTask[T],
    *,
    workers: int,
    done: Callable[[int, T], None],
    tick: Callable[[], None] = lambda: None,
    stopping: Callable[[], None] = lambda: None,
) -> None:
    """Run the task for every chunk on ``workers`` threads.

    ``done(chunk, result)`` and ``tick()`` are called in this thread, ``tick`` about ten times a
    second. The first exception of a task, of ``done`` or of this thread (Ctrl-C) stops all
    workers, waits for them, and is raised. ``stopping()`` is called before that waiting, for tasks
    that may hang where they do not see that they are to stop.
    """
    work = _Work(chunks, task)
    threads: list[tuple[threading.Thread, threading.Event]] = []
    for i in range(max(1, min(workers, work.count))):
        ended = threading.Event()
        thread = threading.Thread(target=work, args=(ended,), name=f"ckdiff-{i}", daemon=True)
        threads.append((thread, ended))
    try:
        for thread, _ in threads:
            thread.start()
        for _ in range(work.count):
            while True:
                try:
                    chunk, result, error = work.results.get(timeout=_TICK)
                    break
                except queue.Empty:
                    tick()
            if error is not None:
                raise error
            done(chunk, result)  # type: ignore[arg-type]
            tick()
    except BaseException:
        work.stop.set()
        stopping()
        raise
    finally:
        work.stop.set()
        _wait([ended for thread, ended in threads if thread.ident is not None])


def _wait(events: list[threading.Event]) -> None:
    """Wait for all, even through a second Ctrl-C: what the workers read is unmapped after this.

    Not by Thread.join: when that is interrupted it takes the thread for ended (until Python 3.13).
    """
    interruption: BaseException | None = None
    while not all(event.is_set() for event in events):
        try:
            for event in events:
                event.wait()
        except BaseException as error:  # a signal handler's, raised in this thread
            interruption = error
    if interruption is not None:
        raise interruption
