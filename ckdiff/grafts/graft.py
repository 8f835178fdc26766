"""A checkpoint from two: the base, with the tuned elements wherever a mask has ones.

The masks may be another run's. Only tensors with ones are looked at in the tuned checkpoint; all
others are copied. The files are the base's: same names, same headers, same index.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.checkpoints.opening import fetch_all, open_all
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import CheckpointError, StoreCorrupt, printable
from ckdiff.grafts.plan import Plan
from ckdiff.grafts.run import GraftTask, working_memory
from ckdiff.options import Observer, Options, checked_observer, checked_output
from ckdiff.outputs.rebuilt import FilePlan, Rebuilt, refuse_early
from ckdiff.rules import Rule
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import match

if TYPE_CHECKING:
    from ckdiff.checkpoints.opening import Given


def graft(
    base: Given,
    tuned: Given,
    mask: str | os.PathLike[str] | MaskStore,
    out: str | os.PathLike[str],
    *,
    rule: str | Rule | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write ``base`` to ``out`` with the elements of ``tuned`` wherever ``mask`` has ones.

    The output has the base's files, byte for byte but for those elements, or is one file where the
    base is one; it is there whole or not at all. ``mask`` is a mask store, also of another run:
    tensors are found by name and shape, and those that it lacks stay the base's. In bounded memory.
    Gives what ``ckdiff graft --json`` prints. Raises a CkdiffError: PairingError for a mask that
    does not fit, OutputError, SourceChanged, StoreCorrupt and others of :mod:`ckdiff.errors`.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer = checked_observer(observer)
    path = checked_output(out)
    store = open_store(mask)
    digest = store.manifest_digest()
    with ExitStack() as stack:
        matched = match([store], rule, least=1)
        sides = open_all(stack, base, tuned)
        source = sides[0]
        if not source.in_files:
            raise CheckpointError(f"{printable(source.label)} has no files to be rebuilt")
        plan = Plan(source, sides[1], matched)
        threads = _threads(plan, options)
        folder = source.directory is not None
        refuse_early(
            path,
            size=sum(file.size for file in source.files),
            directory=folder,
            overwrite=options.overwrite,
            apart=sides,
            inputs=[store.path],
        )
        fetch_all(sides)
        name, raw = source.index_name, source.index()
        index = None if name is None or raw is None else (name, raw)
        rebuilt = Rebuilt(
            path,
            [FilePlan(f.name, source.head(i), f.size) for i, f in enumerate(source.files)],
            index=index,
            directory=folder,
            overwrite=options.overwrite,
            apart=sides,
            inputs=[store.path],
        )
        for note in plan.notes():
            observer.note(note)
        with interruptible(lambda: rebuilt.stopped_hint), rebuilt:
            found = _run(plan, rebuilt, threads, observer)
            plan.check_counts(found)
            for side in sides:
                side.verify()
            if open_store(store.path).manifest_digest() != digest:
                raise StoreCorrupt(
                    f"{printable(str(store.path))} was replaced while it was being read",
                    hint="run it again",
                )
            rebuilt.commit()
        names = [*(file.name for file in source.files), *([index[0]] if index else [])]
    return {
        "out": str(path),
        "files": names if folder else [path.name],
        "tensors": len(source.table),
        "elements": plan.elements,
        "grafted": int(found[:, 0].sum()),
        "differing": int(found[:, 1].sum()),
        "unmasked": plan.unmasked,
        "left_out": plan.left_out,
        "rule": plan.matched.rule,
        "store": digest,
    }


def _threads(plan: Plan, options: Options) -> int:
    """How many workers there will be; raises BudgetError where the memory does not suffice."""
    tensors = len(plan.base.table) + len(plan.tuned.table) + len(plan.matched.names)
    need = Need(tables=tensors * 1000, worker=working_memory())
    chunks = plan.blending.chunks + plan.copying.chunks
    return fit_workers(options.workers, chunks, need, options.memory)


def _run(plan: Plan, rebuilt: Rebuilt, workers: int, observer: Observer) -> IntArray:
    """Write everything; gives for each blended tensor the elements taken, and those that differ."""
    found = np.zeros((len(plan.rows), 2), np.int64)
    meter = Meter(observer, plan.bytes_to_read)

    def add(chunk: int, counts: tuple[IntArray, IntArray]) -> None:
        rows, numbers = counts
        found[rows] += numbers  # each row once

    plan.check_copied()
    task = GraftTask(plan, rebuilt, meter)
    chunks = range(plan.blending.chunks + plan.copying.chunks)
    run_chunks(chunks, task, workers=workers, done=add, meter=meter)
    return found
