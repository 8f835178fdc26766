"""What a run needs of the memory it is allowed: one sum, to which each piece of work adds its part.

    bytes needed = PROCESS + tables + workers * worker

``tables`` grow with what is worked on: names, shapes, counts, results. ``worker`` are the windows
and buffers that each worker has at a time, which the piece of work knows: a walk over masks, a
frame of a delta, a window of a diff. Mapped files are no part of it: the system can drop their
pages. The sum bounds anonymous memory; it is held against what was measured by tests/diffs/
test_memory.py and bench/memory.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ckdiff.budget import MIB, default_memory, format_size, parse_size, usable_cores
from ckdiff.errors import BudgetError

_log = logging.getLogger(__name__)
PROCESS = 96 * MIB  #: bytes of the interpreter and libraries, and what compiling kernels adds


@dataclass(frozen=True, slots=True)
class Need:
    """What a piece of work adds to the sum, in bytes."""

    tables: int  #: however many workers there are
    worker: int  #: for each worker

    def total(self, workers: int) -> int:
        """Bytes that a run with so many workers needs, those of the process included."""
        return PROCESS + self.tables + workers * self.worker


def fit_workers(
    asked: int | None, tasks: int, need: Need, memory: str | int | None, *, option: bool = True
) -> int:
    """How many workers there will be for ``tasks``, in the memory asked for or the default one.

    Workers that were not asked for are fewer where they do not fit; so are all where no memory was
    asked for. Raises BudgetError where one does not fit, or those asked for. ``option`` says that
    the command has ``--memory``.
    """
    workers = max(1, min(asked or usable_cores(), tasks))
    allowed = default_memory(workers) if memory is None else parse_size(memory)
    fit = (allowed - need.total(0)) // need.worker
    if asked is None or memory is None:
        workers = max(1, min(workers, fit))
    if fit < workers:
        many = workers > 1
        more = "raise --memory" if option else "raise the cgroup's memory limit: half of it is used"
        raise BudgetError(
            f"{format_size(allowed)} of memory is too little: with {workers} "
            f"worker{'s' if many else ''} this needs {format_size(need.total(workers))}",
            hint=more + (" or lower --workers" if many else ""),
        )
    needed, most = format_size(need.total(workers)), format_size(allowed)
    _log.debug("%d workers for %d tasks; memory: %s needed of %s", workers, tasks, needed, most)
    return workers
