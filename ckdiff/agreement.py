"""How much the masks of several runs agree, and whether that is more than chance would give.

Counts are exact integers, added up over groups; every ratio is computed from counts in the end.
Definitions (o1, o2, expected Jaccard) follow arXiv:2505.11711.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff import budget
from ckdiff.budget import format_size
from ckdiff.checkpoints import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.counting import OverlapTask, Part
from ckdiff.daskrun import client_for, run_tree
from ckdiff.errors import (
    BudgetError,
    Interrupted,
    PairingError,
    StoreCorrupt,
    UsageError,
    printable,
)
from ckdiff.evidence import Base
from ckdiff.maskwalk import working_memory
from ckdiff.matching import Matched, StorePath, match
from ckdiff.nulls import NULLS, Moments, figures, of_tensors
from ckdiff.options import Observer, Progress, checked_int, checked_observer, several_texts
from ckdiff.rules import Rule
from ckdiff.summaries import By, checked_by, group_index, group_order

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BasePath = str | os.PathLike[str] | Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """What some runs changed in common. Row 0 of every table is the whole model.

    Pairs of runs (a, b), a < b, are in row-major order in ``moments``; ``pairs`` holds the upper
    triangle with the diagonal, whose entries are the sizes.
    """

    stores: list[str]  #: as they were given
    rule: str
    by: By
    groups: list[str]  #: the first is ``model``
    elements: IntArray  #: (rows,)
    pairs: IntArray  #: (rows, upper triangle with diagonal)
    votes: IntArray  #: (rows, stores + 1): elements that changed in exactly j runs
    null_names: tuple[str, ...]
    moments: dict[str, Moments] = field(repr=False)  #: of the intersections, by null
    #: tensors that are not in all stores with one shape: name, reason, and which stores
    left_out: list[dict[str, Any]] = field(default_factory=list, repr=False)
    #: tensors whose base content is not the same in all stores
    other_base: list[str] = field(default_factory=list, repr=False)
    seconds: float = 0.0

    @property
    def counts(self) -> IntArray:
        """Intersections over the whole model, int64 (stores, stores); sizes on the diagonal."""
        return self._square(self.pairs[0])

    @property
    def jaccard(self) -> FloatArray:
        """|A and B| / |A or B| over the whole model, (stores, stores); NaN for two empty masks."""
        counts = self.counts
        sizes = np.diag(counts)
        with np.errstate(invalid="ignore"):
            result: FloatArray = counts / (sizes[:, None] + sizes - counts)
        return result

    @property
    def nulls(self) -> dict[str, dict[str, FloatArray]]:
        """For each null ``expected``, ``lift``, ``z`` and ``expected_jaccard`` over the whole
        model, float64 (stores, stores); NaN on the diagonal and where there is no value."""
        size = len(self.stores)
        out = {}
        for name in self.null_names:
            keys = ("expected", "lift", "z", "expected_jaccard")
            tables = {key: np.full((size, size), np.nan) for key in keys}
            for pair in self._pairs(0):
                a, b, found = pair["a"], pair["b"], pair["nulls"][name]
                for key, table in tables.items():
                    table[a, b] = table[b, a] = np.nan if found[key] is None else found[key]
            out[name] = tables
        return out

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the JSON contract."""
        size = len(self.stores)
        diagonal = [a * size - a * (a - 1) // 2 for a in range(size)]
        return [
            {
                "group": group,
                "elements": int(self.elements[row]),
                "sizes": self.pairs[row, diagonal].tolist(),
                "pairs": self._pairs(row),
                "votes": self.votes[row].tolist(),
            }
            for row, group in enumerate(self.groups)
        ]

    def to_dict(self) -> dict[str, Any]:
        """What ``ckdiff overlap --json`` prints."""
        return {
            "stores": self.stores,
            "rule": self.rule,
            "by": self.by,
            "nulls": list(self.null_names),
            "rows": self.rows(),
            "left_out": self.left_out,
            "other_base": self.other_base,
            "seconds": self.seconds,
        }

    def _square(self, upper: IntArray) -> IntArray:
        size = len(self.stores)
        out = np.zeros((size, size), np.int64)
        out[np.triu_indices(size)] = upper
        return out + np.triu(out, 1).T

    def _pairs(self, row: int) -> list[dict[str, Any]]:
        elements = int(self.elements[row])
        counts = self._square(self.pairs[row]).tolist()
        found = []
        pairs = [(a, b) for a in range(len(counts)) for b in range(a + 1, len(counts))]
        for i, (a, b) in enumerate(pairs):
            both, one, other = counts[a][b], counts[a][a], counts[b][b]
            nulls = {
                name: figures(
                    both, one, other, float(self.moments[name].mean[row, i]),
                    float(self.moments[name].variance[row, i]),
                )
                for name in self.null_names
            }  # fmt: skip
            first = nulls[self.null_names[0]]
            found.append(
                {
                    "a": a,
                    "b": b,
                    **pair_figures(both, one, other, elements),
                    "lift": first["lift"],
                    "z": first["z"],
                    "expected_jaccard": first["expected_jaccard"],
                    "nulls": nulls,
                }
            )
        return found


def pair_figures(both: int, one: int, other: int, elements: int) -> dict[str, Any]:
    """What the four counts of two masks say about their agreement; None where it has no value."""
    union = one + other - both
    neither = elements - union
    spread = math.sqrt(one * (elements - one)) * math.sqrt(other * (elements - other))
    crossed = (one - both) * (other - both)
    return {
        "intersection": both,
        "union": union,
        "jaccard": both / union if union else None,
        "o1": both / one if one else None,
        "o2": both / other if other else None,
        "phi": (both * elements - one * other) / spread if spread else None,
        "odds_ratio": both * neither / crossed if crossed else None,
    }


def overlap(
    stores: Sequence[StorePath],
    *,
    rule: str | Rule | None = None,
    by: By = "layer",
    nulls: Sequence[str] = ("tensor",),
    base: BasePath | None = None,
    require_same_base: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> Overlap:
    """Compare the masks of 2 to 64 stores in one pass.

    ``nulls`` are of ``model``, ``tensor``, ``magnitude`` (which needs ``base``) and ``rowcol``.
    Runs on Dask's threads, or on the cluster of ``scheduler`` or of a Dask client that is active
    here. Raises a CkdiffError: UsageError, PairingError, StoreCorrupt, BudgetError, ClusterError.
    """
    observer = checked_observer(observer)
    names = _null_names(nulls)
    checked_by(by)
    began = time.perf_counter()
    matched = match(stores, rule, require_same_base=require_same_base)
    _tell(matched, observer)
    if workers is not None and checked_int("workers", workers) < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    threads = budget.usable_cores() if workers is None else workers
    threads = max(1, min(threads, matched.layout.chunks))
    groups, index = group_index(matched.names, matched.dtypes, by)
    counted = tuple(name for name in names if NULLS[name].reads_masks)
    _check_memory(matched, len(groups), counted, threads, memory, by)
    with ExitStack() as stack:
        checkpoint = _open_base(base, counted, stack)
        task = _Portable(
            _description(matched, by, counted, base, checkpoint),
            plan(matched, by, counted, checkpoint),
        )
        part = _run(task, matched, threads, scheduler, observer, stack)
    part = _complete(part, task.task, len(groups))
    _check_counts(matched, part, index)
    moments = part.moments
    if "tensor" in names:
        moments["tensor"] = of_tensors(matched.layout.elements, matched.changed, index, len(groups))
    found = _with_model(matched, by, groups, index, part, moments)
    if "model" in names:
        sizes = found.pairs[:, _diagonal(len(matched.stores))].T
        rows = np.arange(len(found.groups))
        found.moments["model"] = of_tensors(found.elements, sizes, rows, len(rows))
    ordered = {name: found.moments[name] for name in names}
    _self_test(found)
    return Overlap(
        [str(store.path) for store in matched.stores],
        matched.rule,
        by,
        found.groups,
        found.elements,
        found.pairs,
        found.votes,
        names,
        ordered,
        matched.left_out,
        matched.other_base,
        time.perf_counter() - began,
    )


# what is asked for


def _null_names(nulls: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(several_texts("nulls", nulls))) or ("tensor",)
    for name in names:
        if name not in NULLS:
            raise UsageError(
                f"there is no null {printable(name)!r}", hint=f"one of {', '.join(NULLS)}"
            )
    return names


def _tell(matched: Matched, observer: Observer) -> None:
    if matched.left_out:
        some = ", ".join(printable(str(entry["name"])) for entry in matched.left_out[:3])
        more = f" and {len(matched.left_out) - 3:,} more" if len(matched.left_out) > 3 else ""
        observer.note(
            f"warning: {len(matched.left_out):,} tensors are not in all stores with one shape and "
            f"are left out: {some}{more}"
        )
    if matched.other_base:
        observer.note(
            f"warning: the stores have different bases: {len(matched.other_base):,} of "
            f"{len(matched.names):,} shared tensors differ in content"
        )


def _check_memory(
    matched: Matched,
    groups: int,
    counted: tuple[str, ...],
    workers: int,
    memory: str | int | None,
    by: By,
) -> None:
    """Refuse a grouping whose tables would not fit; BudgetError with the numbers."""
    allowed = budget.default_memory(workers) if memory is None else budget.parse_size(memory)
    stores = len(matched.stores)
    pairs = stores * (stores + 1) // 2
    row = 8 * (pairs + stores + 1 + 2 * pairs * (len(counted) + 1))
    # Parts on their way up the tree hold rows of their own groups: all of them once more.
    tables = 3 * row * groups + 8 * stores * len(matched.names) * 6
    each = working_memory(stores) + (32 << 20 if counted else 0)
    needed = 96 * budget.MIB + tables + workers * each
    if needed > allowed:
        raise BudgetError(
            f"{format_size(allowed)} of memory is too little for {groups:,} groups of "
            f"{stores} stores with {workers} workers: this needs {format_size(needed)}",
            hint="group more coarsely (--by layer, --by model)"
            if by != "model"
            else "raise memory",
        )


def _open_base(
    base: BasePath | None, counted: tuple[str, ...], stack: ExitStack
) -> Checkpoint | None:
    needs = [name for name in counted if NULLS[name].reads_base]
    if not needs:
        return None
    if base is None:
        raise UsageError(
            f"the null {needs[0]} reads the base checkpoint", hint="give it with --base"
        )
    checkpoint = open_checkpoint(base)
    if checkpoint is not base:
        stack.callback(checkpoint.close)
    return checkpoint


# the task, here and in other processes


def plan(
    matched: Matched, by: By, counted: tuple[str, ...], base: Checkpoint | None
) -> OverlapTask:
    """The chunk task of an overlap. Raises PairingError for a base that does not fit."""
    _, index = group_index(matched.names, matched.dtypes, by)
    return OverlapTask(
        matched.layout,
        matched.starts,
        matched.sources(),
        index,
        counted,
        matched.dtypes,
        matched.shapes,
        None if base is None else _base(matched, base),
    )


def _base(matched: Matched, checkpoint: Checkpoint) -> Base:
    if matched.other_base:
        raise PairingError(
            "the null magnitude needs stores with one base, and these differ in "
            f"{printable(matched.other_base[0])}",
            hint="leave out the stores that started from another checkpoint",
        )
    table = checkpoint.table
    place = {name: i for i, name in enumerate(table.names)}
    index = []
    for name, dtype, shape in zip(matched.names, matched.dtypes, matched.shapes, strict=True):
        i = place.get(name)
        if i is None or table.dtypes[i] != dtype or tuple(table.shapes[i]) != shape:
            what = "no" if i is None else "another dtype or shape for"
            raise PairingError(
                f"{printable(checkpoint.label)} has {what} {printable(name)}",
                hint="give the checkpoint that the runs started from to --base",
            )
        index.append(i)
    first = matched.stores[0].table
    hashes = [first.base_hashes[i] for i in matched.positions[0]]
    return Base(checkpoint, np.array(index, np.int64), hashes, matched.names)


@dataclass(frozen=True, slots=True)
class _Description:
    """What another process needs to make the same task: paths, and what must be found there."""

    stores: tuple[tuple[str, str], ...]  #: path and digest
    rule: str
    by: By
    counted: tuple[str, ...]
    base: str | None


class _Portable:
    """A task that is pickled as its description."""

    def __init__(self, description: _Description, task: OverlapTask) -> None:
        self.description = description
        self.task = task

    def __call__(self, chunk: int, stop: threading.Event) -> Part:
        return self.task(chunk, stop)

    def merge(self, left: Part, right: Part) -> Part:
        return self.task.merge(left, right)

    def __reduce__(self) -> Any:
        return _remake, (self.description,)


@lru_cache(maxsize=4)
def _remake(description: _Description) -> _Portable:
    matched = match([path for path, _ in description.stores], description.rule)
    for store, (_, digest) in zip(matched.stores, description.stores, strict=True):
        if store.manifest_digest() != digest:
            raise StoreCorrupt(
                f"{printable(str(store.path))} is another store here than where it was opened",
                hint="all workers must see the same files",
            )
    base = None if description.base is None else open_checkpoint(description.base)
    return _Portable(description, plan(matched, description.by, description.counted, base))


def _description(
    matched: Matched,
    by: By,
    counted: tuple[str, ...],
    base: BasePath | None,
    checkpoint: Checkpoint | None,
) -> _Description:
    stores = tuple((os.path.abspath(s.path), s.manifest_digest()) for s in matched.stores)
    path = None
    if checkpoint is not None and isinstance(base, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(base))
    return _Description(stores, matched.rule, by, counted, path)


def _run(
    task: _Portable,
    matched: Matched,
    workers: int,
    scheduler: str | None,
    observer: Observer,
    stack: ExitStack,
) -> Part | None:
    chunks = matched.layout.chunks
    if not chunks:
        return None
    client = stack.enter_context(client_for(scheduler))
    if client is not None and task.task.base is not None and task.description.base is None:
        raise UsageError(
            "on a cluster the base checkpoint is opened by every worker",
            hint="give its path instead of an open checkpoint",
        )
    began = time.perf_counter()
    total = len(matched.stores) * matched.layout.total // 8

    def tick(done: int) -> None:
        observer.progress(Progress(total * done // chunks, total, time.perf_counter() - began, 0))

    try:
        tick(0)
        return run_tree(chunks, task, workers=workers, client=client, tick=tick)
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


# from the sum of all parts to the result


@dataclass(slots=True, eq=False)
class _Rows:
    groups: list[str]
    elements: IntArray
    pairs: IntArray
    votes: IntArray
    moments: dict[str, Moments]


def _diagonal(stores: int) -> list[int]:
    return [a * stores - a * (a - 1) // 2 for a in range(stores)]


def _complete(part: Part | None, task: OverlapTask, groups: int) -> Part:
    """The part with a row for every group, those without elements included."""
    every = task.empty(np.arange(groups, dtype=np.int64))
    return every if part is None else task.merge(every, part)


def _check_counts(matched: Matched, part: Part, index: IntArray) -> None:
    """Hold what was counted against what the stores say."""
    groups = len(part.groups)
    for k, store in enumerate(matched.stores):
        said = np.zeros(groups, np.int64)
        np.add.at(said, index, matched.changed[k])
        if not np.array_equal(said, part.pairs[:, _diagonal(len(matched.stores))[k]]):
            raise StoreCorrupt(
                f"the {matched.rule} mask of {printable(str(store.path))} disagrees with its count",
                hint="see ckdiff check",
            )


def _with_model(
    matched: Matched,
    by: By,
    groups: list[str],
    index: IntArray,
    part: Part,
    moments: dict[str, Moments],
) -> _Rows:
    """The rows as they are shown: the model first, then the groups."""
    elements = np.zeros(len(groups), np.int64)
    np.add.at(elements, index, matched.layout.elements)
    votes = part.votes
    votes[:, 0] = elements - votes[:, 1:].sum(1)
    if by == "model":
        return _Rows(groups, elements, part.pairs, votes, moments)
    order = group_order(groups, by)

    def stack(table: Any) -> Any:
        return np.concatenate([table.sum(0, keepdims=True), table[order]])

    # a group may have the name that belongs to the whole
    shown = [f"{name} ({by})" if name == "model" else name for name in groups]
    return _Rows(
        ["model", *(shown[i] for i in order)],
        stack(elements),
        stack(part.pairs),
        stack(votes),
        {
            name: Moments(stack(found.mean), stack(found.variance))
            for name, found in moments.items()
        },
    )


def _self_test(found: _Rows) -> None:
    """Pairs and votes are counted by different code, and must say the same."""
    ballots = np.arange(found.votes.shape[1])
    stores = len(ballots) - 1
    sizes = found.pairs[:, _diagonal(stores)].sum(1)
    shared = found.pairs.sum(1) - sizes
    assert (found.votes >= 0).all()
    assert np.array_equal(found.votes.sum(1), found.elements)
    assert np.array_equal(found.votes @ ballots, sizes)
    assert np.array_equal(found.votes @ (ballots * (ballots - 1) // 2), shared)
