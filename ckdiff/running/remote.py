"""Chunk tasks in other processes: described in a few bytes, made there once, shared by its threads.

What travels is a recipe: paths, and what must be found there. Nothing is opened where it is merely
unpickled, as Dask's scheduler does; the first call makes the task, and the files it opened are
closed when it has not been called for a while.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ckdiff._version import __version__
from ckdiff.errors import CkdiffError, ClusterError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_KEEP = 60.0  # seconds that files stay open after the last call

SHARE = "every worker must see the same files at the same paths"  # a hint


class Recipe(Protocol[T_co]):
    """How to make a task anywhere. Hashable, small, picklable."""

    def make(self, stack: ExitStack) -> T_co:
        """The task; what has to be closed after it goes on the stack. Raises a CkdiffError."""


@dataclass(frozen=True, slots=True)
class Remote(Generic[T]):
    """A recipe of one run. Equal ones share a task in each process."""

    recipe: Recipe[T]
    #: later runs open their files anew: an earlier run's may have been replaced since
    run: str = field(default_factory=lambda: os.urandom(8).hex())
    version: str = __version__

    @contextmanager
    def task(self) -> Iterator[T]:
        """The task in this process. Raises ClusterError where it cannot be made."""
        with _lock:
            kept: _Kept = _all.setdefault(self, _Kept())
            kept.users += 1
            if kept.timer is not None:
                kept.timer.cancel()
                kept.timer = None
        try:
            with kept.making:
                if not kept.made:
                    kept.make(self)
            yield kept.task
        finally:
            with _lock:
                kept.users -= 1
                if not kept.users:
                    kept.timer = threading.Timer(_KEEP, _let_go, (self, kept))
                    kept.timer.daemon = True
                    kept.timer.start()


class _Kept:
    """A task that was made in this process, and who uses it."""

    def __init__(self) -> None:
        self.making = threading.Lock()
        self.made = False
        self.task: Any = None
        self.stack = ExitStack()
        self.users = 0
        self.timer: threading.Timer | None = None

    def make(self, remote: Remote[Any]) -> None:
        where = f"the worker on {socket.gethostname()}"
        if remote.version != __version__:
            raise ClusterError(
                f"{where} has ckdiff {__version__}, and this run needs {remote.version}",
                hint="install the same version on all machines",
            )
        with ExitStack() as stack:
            try:
                self.task = remote.recipe.make(stack)
            except ClusterError:
                raise
            except CkdiffError as error:
                # whoever made the recipe could open everything a moment ago
                raise ClusterError(f"{where} cannot start: {error.message}", hint=SHARE) from error
            self.stack = stack.pop_all()
        self.made = True


_lock = threading.Lock()
_all: dict[Remote[Any], _Kept] = {}


def _let_go(remote: Remote[Any], kept: _Kept) -> None:
    """Close what was not used for a while, unless somebody came in the meantime."""
    with _lock:
        if kept.users or kept.timer is not threading.current_thread():
            return
        del _all[remote]
    kept.stack.close()
