"""How much of all checkpoints of a run to look at at a time, so that it keeps to its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ckdiff import budget
from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW
from ckdiff.errors import BudgetError
from ckdiff.kernels.paths import COLUMNS
from ckdiff.options import Options
from ckdiff.running.memory import Need
from ckdiff.runs.timelines.file import count_rows
from ckdiff.runs.timelines.pairs import MarchingPairs, Pairs
from ckdiff.runs.timelines.task import working_memory
from ckdiff.runs.timelines.versions import decoders_memory

_LEAST = 3  #: checkpoints that are read where one is appended
_log = logging.getLogger(__name__)


def allot(
    pairs: Pairs,
    marching: MarchingPairs,
    loaded: int,
    rules: int,
    width: int,
    *,
    held: int,
    options: Options,
) -> tuple[int, int, int, int]:
    """Workers, window in elements, memory allowed and needed. Raises BudgetError."""
    layout, steps = pairs.layout, len(pairs.comparisons)
    workers = max(1, min(options.workers or budget.usable_cores(), layout.chunks))
    allowed = (
        budget.default_memory(workers) if options.memory is None
        else budget.parse_size(options.memory)
    )  # fmt: skip
    tensors = len(pairs.names)
    rows = 8 * (count_rows(steps) * 2 + 6 * len(marching.sides))
    if options.stats:
        rows += 8 * COLUMNS * (2 * steps + 3 * len(marching.sides))
    tables = held + tensors * (600 + rows) + 400 * layout.chunks * (steps + 8)
    window = min(LARGEST_WINDOW, max(SMALLEST_WINDOW, _together(len(marching.sides))))
    asked = _readers(marching)
    while True:
        each = working_memory(marching, layout, loaded, rules, width, window, stats=options.stats)
        readers = sum(reader(window) for reader in asked)
        needed = Need(tables, each + readers).total(workers)
        if needed <= allowed:
            _log.debug(
                "workers: %d, windows: %d elements, memory: %s of %s",
                workers, window, format_size(needed), format_size(allowed),
            )  # fmt: skip
            return workers, window, allowed, needed
        if window > SMALLEST_WINDOW:
            window //= 2
        elif workers > 1 and options.workers is None:
            workers -= 1
        else:
            raise _too_little(len(marching.sides), workers, allowed, needed)


def _too_little(sides: int, workers: int, allowed: int, needed: int) -> BudgetError:
    many = "s" if workers > 1 else ""
    hint = f"--memory {-(-needed >> 20)}MiB is enough"
    if sides > _LEAST:
        hint += "; or begin with fewer, and append the others one by one"
    return BudgetError(
        f"{format_size(allowed)} of memory is too little: {sides} checkpoints side by side need "
        f"{format_size(needed)} with {workers} worker{many} and the smallest window",
        hint=hint,
    )


def _readers(marching: MarchingPairs) -> list[Callable[[int], int]]:
    """For each side the bytes that its reader takes, for windows of so many elements."""
    found: list[Callable[[int], int]] = []
    for side, fold in zip(marching.sides, marching.folds, strict=True):
        bits = int(side.bits.max(initial=8))
        if fold.versions:
            found.append(partial(_folding, decoders_memory(fold.versions), bits))
        if fold.start is not None:
            found.append(partial(_reading, fold.start.checkpoint, bits))
    return found


def _folding(decoders: int, bits: int, window: int) -> int:
    return decoders + 2 * window * bits // 8


def _reading(checkpoint: Checkpoint, bits: int, window: int) -> int:
    return checkpoint.reader_memory(window * bits // 8)


def _together(sides: int) -> int:
    """Elements of a window in which all sides are a hundred MiB or so.

    What is done once for a window and side costs more than masks that do not stay in the cache.
    """
    window = LARGEST_WINDOW
    while window > SMALLEST_WINDOW and window * sides > LARGEST_WINDOW * 16:
        window //= 2
    return window
