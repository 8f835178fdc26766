"""``ckdiff.timeline``: a run over time, each checkpoint read once."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckdiff.checkpoints.opening import Given
from ckdiff.options import Observer, Options, checked_observer, checked_text
from ckdiff.rules import Rule
from ckdiff.runs.timelines.plan import in_order, plan
from ckdiff.runs.timelines.result import Timeline
from ckdiff.runs.timelines.run import run


def timeline(
    checkpoints: Sequence[Given],
    out: str | os.PathLike[str],
    *,
    rule: str | Rule = "exact",
    glob: str | Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: str | None = None,
    first_moves: bool = True,
    stats: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Timeline:
    """Find when each weight of a run moved: every checkpoint against the first and the one before
    it.

    ``checkpoints`` are two or more of anything that ``open_checkpoint`` takes, in the order of the
    run. Paths that ``glob`` matches (one pattern or several) come after them, in natural order; a
    path that is already there is not added twice. A base and a stream of weight versions stand for
    the base and each version. Tensors that all checkpoints have are compared, and each checkpoint
    is read once.

    The directory ``out`` gets a mask store for each step and, unless ``first_moves`` is false, an
    array of when each element first moved; with ``stats`` also how far the elements moved, and
    whether on or back. If ``out`` is a timeline of the first of these checkpoints, in the same
    order, it is continued: only the first, its last and the new ones are read. If the run is
    stopped, the same call resumes it. ``include``, ``exclude``, ``key``, ``workers``, ``memory``
    and ``overwrite`` are as in ``diff``. Raises a CkdiffError: CheckpointError, SourceChanged,
    PairingError, BudgetError, StoreExists and others of :mod:`ckdiff.errors`.
    """
    options = Options(
        rules=[rule],
        include=include,
        exclude=exclude,
        key=key,
        workers=workers,
        memory=memory,
        overwrite=overwrite,
        stats=stats,
    )
    patterns = [glob] if isinstance(glob, str) else glob or ()
    given = in_order(checkpoints, [checked_text("glob", pattern) for pattern in patterns])
    observer = checked_observer(observer)
    with plan(given, out, options, observer, first_moves=first_moves) as planned:
        outcome = run(planned)
        return Timeline(planned.out, asked=planned.asked, outcome=outcome)
