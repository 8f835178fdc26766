"""How much of the two checkpoints to look at at a time, so that a diff keeps to its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckdiff import budget
from ckdiff.budget import format_size
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW, working_memory
from ckdiff.errors import BudgetError
from ckdiff.layout import Layout
from ckdiff.running.memory import Need


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a diff may use, and how."""

    workers: int  #: chunks at a time
    window: int  #: elements
    memory: int  #: bytes allowed
    needed: int  #: bytes of which the diff expects to use


def allot(
    layout: Layout,
    *,
    workers: int,
    rules: int,
    with_statistics: bool,
    asked: str | int | None,
    held: int,
    readers: Callable[[int], int] = lambda window: 0,
    staging: Callable[[int], int] = lambda window: 0,
    largest: int = LARGEST_WINDOW,
) -> Allotment:
    """Choose the window so that all workers fit into the memory allowed; BudgetError.

    ``held`` are the bytes that the tables of both sides took; ``readers`` gives those that each
    worker's readers take by themselves, and ``staging`` those that it needs for copies to and from
    a device, with windows of so many elements. ``largest`` is the window where memory is plenty.
    """
    workers = max(1, min(workers, layout.chunks))
    memory = budget.default_memory(workers) if asked is None else budget.parse_size(asked)
    # What both tables took, and the table of results. What a host process held before is not ours
    # to count.
    tensors = len(layout.elements)
    tables = held + tensors * (400 + 16 * rules + (1200 if with_statistics else 0))
    window = largest
    while True:
        each = working_memory(layout, rules, window, with_statistics=with_statistics)
        needed = Need(tables, each + readers(window) + staging(window)).total(workers)
        if needed <= memory or window == SMALLEST_WINDOW:
            break
        window //= 2
    if needed > memory:
        raise BudgetError(
            f"{format_size(memory)} of memory is too little: with {workers} "
            f"worker{'s' if workers > 1 else ''} and the smallest window this needs "
            f"{format_size(needed)}",
            hint="raise --memory" + (" or lower --workers" if workers > 1 else ""),
        )
    return Allotment(workers, window, memory, needed)
