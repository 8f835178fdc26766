"""Threads that fetch, and that nobody ever has to wait for.

They are daemons: a server that does not answer holds up neither Ctrl-C nor the end of the process.
Jobs are told by a function of theirs when nobody wants them any more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from ckdiff.errors import CheckpointError

#: what a job is given: it returns, or raises CheckpointError where the job is not wanted any more
Check = Callable[[], None]
Job = Callable[[Check], None]


class Batch:
    """Jobs that are waited for together. Its fields belong to the Fetchers that run them."""

    __slots__ = ("failure", "left", "running", "unwanted")

    def __init__(self, jobs: int) -> None:
        self.left = jobs  #: jobs that are not done
        self.running = 0
        self.failure: BaseException | None = None
        self.unwanted = False


class Fetchers:
    """Runs jobs on a few threads of its own, in the order in which they come. ``close`` ends it."""

    def __init__(self, threads: int, label: str) -> None:
        self.most = threads  #: jobs that run at a time
        self._label = label
        self._threads = 0
        self._idle = 0
        self._waiting: deque[tuple[Batch, Job]] = deque()
        self._closed = threading.Event()
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)  # for our threads
        self._moved = threading.Condition(lock)  # for those who wait for a batch

    def start(self, jobs: Iterable[Job]) -> Batch:
        """Run some jobs soon."""
        listed = list(jobs)
        batch = Batch(len(listed))
        with self._arrived:
            self._waiting.extend((batch, job) for job in listed)
            self._arrived.notify(len(listed))
            missing = min(len(self._waiting) - self._idle, self.most - self._threads)
            for _ in range(0 if self._closed.is_set() else missing):
                try:
                    threading.Thread(target=self._work, name="ckdiff-fetch", daemon=True).start()
                except RuntimeError as error:  # no more threads: those that there are will do
                    if self._threads:
                        break
                    raise CheckpointError(f"{self._label}: cannot be fetched: {error}") from None
                self._threads += 1
        return batch

    def wait(self, batch: Batch) -> None:
        """Until all jobs of a batch are done.

        Raises what the first of them raised, as soon as it does, and CheckpointError where
        ``close`` was called.
        """
        with self._moved:
            while batch.left and batch.failure is None and not self._closed.is_set():
                self._moved.wait()
            if batch.failure is not None:
                raise batch.failure
            if batch.left:
                raise self._gone()

    def abandon(self, batch: Batch) -> None:
        """Tell the jobs of a batch that nobody wants them, without waiting for those that run."""
        with self._moved:
            batch.unwanted = True

    def drop(self, batch: Batch) -> None:
        """``abandon``, until none of them runs. Raises CheckpointError where that is not known,
        because ``close`` was called.
        """
        with self._moved:
            batch.unwanted = True
            while batch.running and not self._closed.is_set():
                self._moved.wait()
            if batch.running:
                raise self._gone()

    def pause(self, seconds: float) -> None:
        """Sleep; raises CheckpointError as soon as ``close`` is called."""
        if self._closed.wait(seconds):
            raise self._gone()

    def close(self) -> None:
        """Whoever waits is told at once; what runs ends by itself, when a server says something."""
        with self._moved:
            self._closed.set()
            self._waiting.clear()
            self._moved.notify_all()
            self._arrived.notify_all()

    # inside

    def _work(self) -> None:
        while (found := self._next()) is not None:
            batch, job = found
            failure: BaseException | None = None
            try:
                job(partial(self._check, batch))
            except BaseException as error:  # handed to whoever waits, never swallowed
                failure = error
            del job, found  # what they would write to may go now
            with self._moved:
                batch.running -= 1
                batch.left -= 1
                batch.failure = batch.failure or failure
                if failure is not None or batch.unwanted or not batch.left:
                    self._moved.notify_all()

    def _next(self) -> tuple[Batch, Job] | None:
        """What to do now; None where it is over."""
        with self._arrived:
            while not self._closed.is_set():
                if not self._waiting:
                    self._idle += 1
                    self._arrived.wait()
                    self._idle -= 1
                    continue
                batch, job = self._waiting.popleft()
                if batch.unwanted or batch.failure is not None:
                    batch.left -= 1
                    continue
                batch.running += 1
                return batch, job
        return None

    def _check(self, batch: Batch) -> None:
        if batch.unwanted or self._closed.is_set():
            raise self._gone()

    def _gone(self) -> CheckpointError:
        return CheckpointError(f"{self._label}: was closed while it was being fetched")
