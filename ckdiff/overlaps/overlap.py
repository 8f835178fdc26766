"""How much the masks of several runs agree, and whether that is more than chance would give.

From stores to a result: matching, running the chunk tasks, adding up, and holding the sums against
each other.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from ckdiff import budget
from ckdiff.budget import format_size
from ckdiff.checkpoints.opening import Given, fetch_all, open_all, recipe_for_workers
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import (
    BudgetError,
    CheckpointError,
    CkdiffError,
    PairingError,
    StoreCorrupt,
    UsageError,
    printable,
)
from ckdiff.layout import bits_of
from ckdiff.options import Observer, checked_int, checked_observer, checked_text, several_texts
from ckdiff.overlaps.counting import OverlapTask, Part
from ckdiff.overlaps.directions import directions, found_near
from ckdiff.overlaps.nulls.moments import Moments
from ckdiff.overlaps.nulls.null import Counts, Evidence
from ckdiff.overlaps.nulls.registry import NULLS, USUAL
from ckdiff.overlaps.result import Overlap, diagonal, with_directions
from ckdiff.overlaps.task import OverlapRecipe, check_one_base, plan
from ckdiff.rules import Rule
from ckdiff.running.dask import client_for
from ckdiff.running.memory import Need
from ckdiff.running.runners import Meter, OnCluster, add_up, interruptible
from ckdiff.stores.maskwalk import window_elements, working_memory
from ckdiff.stores.matching import Matched, StorePath, match
from ckdiff.stores.seeing import seen_by
from ckdiff.stores.summaries import By, checked_by, group_index, group_order

if TYPE_CHECKING:
    from ckdiff.running.dask import Scheduler

IntArray = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


class _Shared(TypedDict):
    """What counting and measuring are told alike."""

    key: str | None
    workers: int | None
    memory: str | int | None
    observer: Observer


def overlap(
    stores: Sequence[StorePath],
    *,
    rule: str | Rule | None = None,
    by: By = "layer",
    nulls: Sequence[str] = USUAL,
    base: Given | None = None,
    tuned: Sequence[Given] = (),
    key: str | None = None,
    require_same_base: bool = False,
    scheduler: Scheduler = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> Overlap:
    """Measure how much 2 to 64 masks agree, and how much of that is chance, in one pass.

    ``nulls`` say what chance means (docs/overlap.md explains each). Some of them read ``base``,
    whose state dict ``key`` names in a torch file that holds more. With ``tuned``, the tuned
    checkpoint of each store, it also counts which way both runs moved the shared elements. If no
    null reads ``base``, the checkpoints are found by the names in the stores. Runs on the cluster
    of ``scheduler`` (an address or a Dask client), on an active Dask client, or, also with
    ``scheduler="threads"``, on threads. Raises a CkdiffError: UsageError, PairingError,
    StoreCorrupt, BudgetError, ClusterError.
    """
    observer = checked_observer(observer)
    names = _null_names(nulls)
    checked_by(by)
    _check_tuned(base, tuned)
    matched = match(stores, rule, require_same_base=require_same_base)
    for note in matched.notes():
        observer.note(note)
    shared: _Shared = {"key": key, "workers": workers, "memory": memory, "observer": observer}
    result = measured(matched, names, by, base=base, scheduler=scheduler, **shared)
    if base is None:
        return result
    measure = partial(directions, matched, by, base, **shared)
    if tuned:
        return with_directions(result, measure(tuned))
    read = any(NULLS[name].reads_base for name in names)
    return result if read else _with_found(result, matched, base, measure, observer)


def measured(
    matched: Matched,
    names: tuple[str, ...],
    by: By,
    *,
    base: Given | None,
    key: str | None = None,
    scheduler: Scheduler = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer,
    heard: Callable[[int, Evidence], None] | None = None,
) -> Overlap:
    """``overlap`` of stores that are open, one alone too; ``heard`` as in OverlapTask."""
    began = time.perf_counter()
    threads = _threads(workers, matched)
    groups, index = group_index(matched.names, matched.dtypes, by)
    counted = tuple(name for name in names if NULLS[name].collector is not None)
    readers = [name for name in counted if NULLS[name].reads_base]
    with ExitStack() as stack:
        sides = _open_base(base, readers, matched, stack, key=key and checked_text("key", key))
        need = _need(matched, len(groups), len(counted), [side for side in sides for _ in readers])
        _check_memory(need, threads, memory, (len(groups), len(matched.stores)), by)
        for side in sides:
            check_one_base(matched, side, readers[0])
        task = plan(matched, index, counted, *sides)
        if heard is not None:
            task.heard = heard
        fetch_all(sides)
        for side in sides:  # of a cached file that is not the hub's, no content hash is known
            check_one_base(matched, side, readers[0])
        part = _run(task, lambda: _recipe(task, matched, by, base), threads, scheduler, observer)
    part = _complete(part, task, len(groups))
    _check_counts(matched, part, index)
    rows = _rows(matched, by, groups, index, part)
    return _result(matched, names, rows, _moments(names, matched, part, index, rows), began)


def _check_tuned(base: Given | None, tuned: Sequence[Given]) -> None:
    if base is None and tuned:
        raise UsageError(
            "--tuned needs the base that the runs started from", hint="give it with --base"
        )


def _with_found(
    result: Overlap,
    matched: Matched,
    base: Given,
    measure: Callable[[Sequence[Given]], IntArray],
    observer: Observer,
) -> Overlap:
    """With directions, where the tuned checkpoints are found and are what the stores are of."""
    found, why = found_near(matched, base), ""
    if found is not None:
        try:
            return with_directions(result, measure(found))
        except (CheckpointError, PairingError) as error:
            why = f": {error.message}"
    named = " or ".join(name for name in NULLS if NULLS[name].reads_base)
    observer.note(
        f"hint: --base was not needed: only --null {named} reads it, and directions, for which "
        f"--tuned names the tuned checkpoint of each store{why}"
    )
    return result


def _result(
    matched: Matched,
    names: tuple[str, ...],
    rows: _Rows,
    moments: dict[str, Moments],
    began: float,
) -> Overlap:
    _self_test(rows)
    return Overlap(
        [str(store.path) for store in matched.stores],
        matched.rule,
        rows.by,
        rows.groups,
        rows.elements,
        rows.pairs,
        rows.votes,
        names,
        moments,
        matched.left_out,
        matched.other_base,
        time.perf_counter() - began,
        matched.unknown_base,
    )


# what is asked for


def _null_names(nulls: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(several_texts("nulls", nulls))) or USUAL
    for name in names:
        NULLS.check(name)
    return names


def _threads(workers: int | None, matched: Matched) -> int:
    if workers is not None and checked_int("workers", workers) < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    threads = budget.usable_cores() if workers is None else workers
    return max(1, min(threads, matched.layout.chunks))


def _need(matched: Matched, groups: int, counted: int, read: Sequence[Checkpoint]) -> Need:
    """The memory of a run, with as many ``counted`` nulls; of ``read`` each worker has a reader."""
    stores = len(matched.stores)
    pairs = stores * (stores + 1) // 2
    row = 8 * (pairs + stores + 1 + 2 * pairs * (counted + 1))
    # Parts on their way up the tree hold rows of their own groups: all of them once more.
    tables = 3 * row * groups + 8 * stores * len(matched.names) * 6
    each = working_memory(stores) + (32 << 20 if counted else 0)
    window = window_elements(stores) * int(bits_of(matched.dtypes).max(initial=8)) // 8
    return Need(tables, each + sum(side.reader_memory(window) for side in read))


def _check_memory(
    need: Need, workers: int, memory: str | int | None, size: tuple[int, int], by: By
) -> None:
    """Refuse a grouping whose tables would not fit; BudgetError with the numbers.

    ``size`` are the numbers of groups and of stores.
    """
    allowed = budget.default_memory(workers) if memory is None else budget.parse_size(memory)
    needed = need.total(workers)
    size_of = format_size(needed), format_size(allowed)
    _log.debug("%d workers; memory: %s needed of %s", workers, *size_of)
    if needed > allowed:
        raise BudgetError(
            f"{format_size(allowed)} of memory is too little for {size[0]:,} groups of "
            f"{size[1]} stores with {workers} workers: this needs {format_size(needed)}",
            hint="raise memory"
            if by == "model"
            else "group more coarsely (--by layer, --by model)",
        )


def _open_base(
    base: Given | None,
    readers: Sequence[str],
    matched: Matched,
    stack: ExitStack,
    *,
    key: str | None,
) -> list[Checkpoint]:
    """The base, if there is a null that reads it, as the stores see it: its headers."""
    if not readers:
        return []
    if base is None:
        raise UsageError(
            f"the null {readers[0]} reads the base checkpoint", hint="give it with --base"
        )
    return [seen_by(matched, side).checkpoint for side in open_all(stack, base, key=key)]


# running


def _run(
    task: OverlapTask,
    recipe: Callable[[], OverlapRecipe],
    workers: int,
    scheduler: Scheduler,
    observer: Observer,
) -> Part | None:
    chunks = task.layout.chunks
    if not chunks:
        return None
    meter = Meter(observer, task.stores * task.layout.total // 8)
    with interruptible(), client_for(scheduler) as client:
        if client is None:
            return add_up(chunks, task, workers=workers, meter=meter)
        there = OnCluster(recipe(), client)
        return add_up(chunks, there, workers=workers, meter=meter)


def _recipe(task: OverlapTask, matched: Matched, by: By, base: Given | None) -> OverlapRecipe:
    recipe = None
    if task.base is not None:
        assert base is not None
        recipe = recipe_for_workers(base, task.base.checkpoint)
    stores = tuple((os.path.abspath(s.path), s.manifest_digest()) for s in matched.stores)
    return OverlapRecipe(stores, matched.rule, by, task.nulls, recipe)


# from the sum of all parts to the result


@dataclass(slots=True, eq=False)
class _Rows:
    """What is shown: the model first, then the groups."""

    order: list[int] | None  #: of the groups; None where the model is all that is shown
    groups: list[str]
    elements: IntArray
    pairs: IntArray
    votes: IntArray
    by: By = "model"

    def shown(self, table: Any) -> Any:
        """A table with a row for each group as it is shown."""
        if self.order is None:
            return table
        return np.concatenate([table.sum(0, keepdims=True), table[self.order]])

    def shown_moments(self, moments: Moments) -> Moments:
        """Moments of each group as they are shown."""
        return Moments(self.shown(moments.mean), self.shown(moments.variance))


def _complete(part: Part | None, task: OverlapTask, groups: int) -> Part:
    """The part with a row for every group, those without elements included."""
    every = task.empty(np.arange(groups, dtype=np.int64))
    return every if part is None else task.merge(every, part)


def _check_counts(matched: Matched, part: Part, index: IntArray) -> None:
    """Hold what was counted against what the stores say."""
    counted = part.pairs[:, diagonal(len(matched.stores))].T
    for store, changed, sizes in zip(matched.stores, matched.changed, counted, strict=True):
        said = np.zeros(len(part.groups), np.int64)
        np.add.at(said, index, changed)
        if not np.array_equal(said, sizes):
            raise StoreCorrupt(
                f"the {matched.rule} mask of {printable(str(store.path))} disagrees with its count",
                hint="see ckdiff check",
            )


def _rows(matched: Matched, by: By, groups: list[str], index: IntArray, part: Part) -> _Rows:
    """The counts as they are shown."""
    elements = np.zeros(len(groups), np.int64)
    np.add.at(elements, index, matched.layout.elements)
    votes = part.votes
    votes[:, 0] = elements - votes[:, 1:].sum(1)
    if by == "model":
        return _Rows(None, groups, elements, part.pairs, votes)
    order = group_order(groups, by)
    # a group may have the name that belongs to the whole
    names = [f"{name} ({by})" if name == "model" else name for name in groups]
    rows = _Rows(order, ["model", *(names[i] for i in order)], elements, part.pairs, votes, by)
    rows.elements, rows.pairs, rows.votes = map(rows.shown, (elements, part.pairs, votes))
    return rows


def _moments(
    names: tuple[str, ...], matched: Matched, part: Part, index: IntArray, rows: _Rows
) -> dict[str, Moments]:
    """What each null expects of every row."""
    counts = Counts(
        matched.layout.elements,
        matched.changed,
        index,
        len(part.groups),
        rows.elements,
        rows.pairs[:, diagonal(len(matched.stores))].T,
        rows.shown_moments,
    )
    out = {}
    for name in names:
        make = NULLS[name].moments
        out[name] = rows.shown_moments(part.moments[name]) if make is None else make(counts)
    return out


def _self_test(rows: _Rows) -> None:
    """Raise CkdiffError where pairs and votes, counted by different code, do not say the same."""
    ballots = np.arange(rows.votes.shape[1])
    sizes = rows.pairs[:, diagonal(len(ballots) - 1)].sum(1)
    shared = rows.pairs.sum(1) - sizes
    right = (
        (rows.votes.min(1) >= 0)
        & (rows.votes.sum(1) == rows.elements)
        & (rows.votes @ ballots == sizes)
        & (rows.votes @ (ballots * (ballots - 1) // 2) == shared)
    )
    if not right.all():
        raise CkdiffError(
            f"the pairs and the votes of {printable(rows.groups[int(right.argmin())])} contradict "
            "each other",
            hint="run it again; if that does not help, please report it",
        )
