"""A checkpoint from two: the base, with the tuned elements wherever a mask has ones.

The masks may be another run's. Only tensors with ones are looked at in the tuned checkpoint; all
others are copied. The files are the base's: same names, same headers, same index.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.checkpoints.opening import fetch_all, open_all
from ckdiff.checkpoints.pieces import lost, notes_of
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.errors import StoreCorrupt, printable
from ckdiff.grafts.plan import Plan
from ckdiff.grafts.run import GraftTask, chunks_of, working_memory
from ckdiff.options import (
    Observer,
    Options,
    asks_for_directory,
    checked_observer,
    checked_output,
    checked_text,
)
from ckdiff.outputs.asstored import to_rebuild
from ckdiff.outputs.companions import Companions, Copying
from ckdiff.outputs.rebuilt import FilePlan, Rebuilt
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
    unfuse: bool = True,
    key: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    config_from: str | os.PathLike[str] | None = None,
    config: bool = True,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write ``base`` to ``out`` with the elements of ``tuned`` wherever ``mask`` has ones.

    The output has the base's files, byte for byte apart from those elements. It is one file if the
    base is one, unless ``out`` ends with a slash or is a directory. A base without safetensors
    files becomes the ``model.safetensors`` that the safetensors library would write. The output
    appears only when it is complete; memory is bounded. ``key`` is the path of the state dict in
    torch files that hold more.

    ``mask`` is any mask store of the model. Tensors are matched by name and shape; tensors that the
    store lacks stay as in the base. If the mask has parts, ``unfuse`` finds them in fused tensors
    of either side. The dtypes are the base's, and other floats are rounded to the nearest. A
    directory gets copies of the base's config and tokenizer files, or of those in ``config_from``,
    unless ``config`` is False. Returns what ``ckdiff graft --json`` prints.

    Raises a CkdiffError: PairingError for a mask that does not fit, OutputError, SourceChanged,
    StoreCorrupt and others of :mod:`ckdiff.errors`.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer, copying = checked_observer(observer), Copying.checked(config_from, config)
    path, store = checked_output(out), open_store(mask)
    digest = store.manifest_digest()
    with ExitStack() as stack:
        matched = match([store], rule, least=1)
        sides = open_all(stack, base, tuned, key=key and checked_text("key", key))
        plan = Plan(to_rebuild(sides[0]), sides[1], matched, unfuse=unfuse)
        threads = _threads(plan, options)
        directory = plan.files.directory is not None or asks_for_directory(out)
        beside = copying.beside(sides[0], directory=directory)
        rebuilt = _rebuilt(
            plan, sides, path, beside, overwrite=options.overwrite, directory=directory
        )
        rebuilt.check()
        fetch_all(sides)
        _tell(observer, sides, [*plan.notes(), *beside.notes])
        with interruptible(lambda: rebuilt.stopped_hint), rebuilt:
            found = _run(plan, rebuilt, threads, observer)
            _verify(plan, found, digest)
            rebuilt.commit()
    return _report(plan, rebuilt, found, digest)


def _tell(observer: Observer, sides: Sequence[Checkpoint], more: Sequence[str]) -> None:
    for note in (*notes_of(sides), *lost(sides[0].table, "written"), *more):
        observer.note(note)


def _report(plan: Plan, rebuilt: Rebuilt, found: IntArray, digest: str) -> dict[str, Any]:
    """What ``ckdiff graft --json`` prints; ``digest`` is the mask store's."""
    return {
        "out": str(rebuilt.out),
        "files": rebuilt.names,
        "copied": rebuilt.copied,
        "tensors": len(plan.files.table),
        "elements": plan.elements,
        "grafted": int(found[:, 0].sum()),
        "differing": int(found[:, 1].sum()),
        "rounded": int((found[:, 2] > 0).sum()),
        "rounded_elements": int(found[:, 2].sum()),
        "unmasked": plan.unmasked,
        "left_out": plan.left_out,
        "rule": plan.matched.rule,
        "store": digest,
    }


def _rebuilt(
    plan: Plan,
    sides: Sequence[Checkpoint],
    out: Path,
    beside: Companions,
    *,
    overwrite: bool,
    directory: bool,
) -> Rebuilt:
    """The base's files again, at ``out``."""
    base, name, raw = plan.files, plan.files.index_name, plan.files.index()
    return Rebuilt(
        out,
        [FilePlan(file.name, base.head(i), file.size) for i, file in enumerate(base.files)],
        index=None if name is None or raw is None else (name, raw),
        more_indexes=base.part_indexes(),
        directory=directory,
        overwrite=overwrite,
        companions=beside.files,
        apart=sides,
        inputs=[store.path for store in plan.matched.stores],
    )


def _verify(plan: Plan, found: IntArray, digest: str) -> None:
    """Raise StoreCorrupt and SourceChanged unless all that was read is what was opened."""
    plan.check_counts(found)
    for side in (plan.base, plan.tuned):
        side.verify()
    for store in plan.matched.stores:
        if open_store(store.path).manifest_digest() != digest:
            raise StoreCorrupt(
                f"{printable(str(store.path))} was replaced while it was being read",
                hint="run it again",
            )


def _threads(plan: Plan, options: Options) -> int:
    """How many workers there will be; raises BudgetError where the memory does not suffice."""
    tensors = len(plan.base.table) + len(plan.tuned.table) + len(plan.matched.names)
    need = Need(tables=tensors * 1000, worker=working_memory(plan))
    chunks = chunks_of(plan)
    return fit_workers(options.workers, chunks, need, options.memory)


def _run(plan: Plan, rebuilt: Rebuilt, workers: int, observer: Observer) -> IntArray:
    """Write everything; gives for each blended tensor the elements taken, and of these
    those that differ, and those that were rounded.
    """
    found = np.zeros((len(plan.every_kind), 3), np.int64)
    meter = Meter(observer, plan.bytes_to_read)

    def add(chunk: int, counts: tuple[IntArray, IntArray]) -> None:
        rows, numbers = counts
        found[rows] += numbers  # each row once

    plan.check_copied()
    task = GraftTask(plan, rebuilt, meter)
    chunks = range(chunks_of(plan))
    run_chunks(chunks, task, workers=workers, done=add, meter=meter)
    return found
