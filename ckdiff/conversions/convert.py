"""Any readable checkpoint as sharded safetensors with an index, and its config files beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff.budget import parse_size
from ckdiff.checkpoints.opening import fetch_all, open_for_planning, open_in
from ckdiff.checkpoints.pieces import lost, told
from ckdiff.conversions.configs import with_dtype
from ckdiff.conversions.dtypes import DTYPE_NAMES, checked_dtype
from ckdiff.conversions.plan import Plan
from ckdiff.conversions.run import ConvertTask, Found, working_memory
from ckdiff.errors import printable
from ckdiff.options import Observer, Options, checked_observer, checked_output, checked_text
from ckdiff.outputs.companions import Companions, Copying
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks

if TYPE_CHECKING:
    from ckdiff.checkpoints.opening import Given

_NAMED = 3  # names in a note


@dataclass(slots=True)
class Converted:
    """What was written. ``to_dict()`` is what ``ckdiff convert --json`` prints."""

    out: Path
    files: list[str]  #: of weights, and their indexes, relative to ``out``
    copied: list[str]  #: config and tokenizer files beside them
    size: int  #: bytes of the files of weights
    tensors: int
    elements: int
    dtype: str | None  #: that was asked for: bf16, f16 or f32
    converted: int  #: tensors that were stored in another dtype
    rounded: int  #: elements that are not the numbers that they were
    overflowed: int  #: of these, finite numbers that became infinite
    untouched: list[str]  #: floats left as they were stored: those of quantised weights
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {name: getattr(self, name) for name in self.__slots__} | {"out": str(self.out)}


def convert(
    checkpoint: Given,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    key: str | None = None,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    config_from: str | os.PathLike[str] | None = None,
    config: bool = True,
    observer: Observer | None = None,
) -> Converted:
    """Write any checkpoint that ckdiff reads to the directory ``out``, as safetensors.

    The result is one ``model.safetensors``, or files of at most ``shard_size`` bytes of tensors and
    an index. It appears only when it is complete; memory is bounded. ``dtype`` (``bf16``, ``f16``,
    ``f32``) rounds floats to the nearest, ties to even; integers and quantised weights stay as they
    are. ``key`` is the path of the state dict in a torch file that holds more. Config and tokenizer
    files are copied from the checkpoint's directory, or from ``config_from``, unless ``config`` is
    False. Raises a CkdiffError: CheckpointError, OutputError, UsageError, BudgetError and others.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer = checked_observer(observer)
    path, copying = checked_output(out), Copying.checked(config_from, config)
    wanted, limit = checked_dtype(dtype), parse_size(shard_size)
    opening = partial(open_for_planning, key=key and checked_text("key", key))
    with ExitStack() as stack:
        opened = open_in(stack, checkpoint, opening)
        plan = Plan.of(opened, wanted, limit)
        threads = _threads(plan, options)
        companions = with_dtype(copying.beside(opened, directory=True), wanted)
        rebuilt = _rebuilt(plan, path, companions, overwrite=options.overwrite)
        rebuilt.check()
        fetch_all([opened])
        for note in _notes(plan, companions):
            observer.note(note)
        began = time.perf_counter()
        with interruptible(lambda: rebuilt.stopped_hint), rebuilt:
            found = _run(plan, rebuilt, threads, observer)
            opened.verify()
            rebuilt.commit()
    if found.overflowed:
        observer.note(_overflow(plan, found))
    return _converted(plan, rebuilt, found, time.perf_counter() - began)


def _rebuilt(plan: Plan, out: Path, companions: Companions, *, overwrite: bool) -> Rebuilt:
    """The files of the plan, at ``out``."""
    return Rebuilt(
        out,
        plan.files,
        index=plan.indexes[0] if plan.indexes else None,
        more_indexes=plan.indexes[1:],
        directory=True,
        overwrite=overwrite,
        companions=companions.files,
        apart=[plan.checkpoint],
    )


def _converted(plan: Plan, rebuilt: Rebuilt, found: Found, seconds: float) -> Converted:
    return Converted(
        out=rebuilt.out,
        files=rebuilt.names,
        copied=rebuilt.copied,
        size=sum(file.size for file in plan.files),
        tensors=len(plan.checkpoint.table),
        elements=int(plan.layout.elements.sum()),
        dtype=None if plan.wanted is None else DTYPE_NAMES[plan.wanted],
        converted=plan.converted,
        rounded=found.rounded,
        overflowed=found.overflowed,
        untouched=plan.untouched,
        seconds=seconds,
    )


def _notes(plan: Plan, companions: Companions) -> Iterator[str]:
    """What a user should know before the result is taken for more, or less, than it is."""
    yield from map(told, plan.checkpoint.notes)
    yield from lost(plan.checkpoint.table, "written")
    shared = plan.shared
    if shared:
        yield (f"tensors that share a storage are written once for each name: {_several(shared)}")
    if plan.untouched:
        yield (
            f"floats that belong to quantised weights stay as they are: {_several(plan.untouched)}"
        )
    if plan.left_out:
        yield (
            "metadata that differs between files, or is too long, is not kept: "
            f"{_several(plan.left_out)}"
        )
    yield from companions.notes


def _overflow(plan: Plan, found: Found) -> str:
    name = plan.checkpoint.table.names[found.example]
    return (
        f"warning: {found.overflowed:,} finite numbers are too large for {plan.wanted}, and are "
        f"infinite now; some are in {printable(name)}"
    )


def _several(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED:,} more"


def _threads(plan: Plan, options: Options) -> int:
    """How many workers there will be; raises BudgetError where the memory does not suffice."""
    texts = sum(len(file.head) for file in plan.files) + sum(len(raw) for _, raw in plan.indexes)
    need = Need(tables=len(plan.checkpoint.table) * 1000 + 2 * texts, worker=working_memory(plan))
    return fit_workers(options.workers, plan.layout.chunks, need, options.memory)


def _run(plan: Plan, rebuilt: Rebuilt, workers: int, observer: Observer) -> Found:
    total = Found()

    def add(chunk: int, found: Found) -> None:
        total.add(found)

    meter = Meter(observer, int(plan.checkpoint.table.nbytes.sum()))
    task = ConvertTask(plan, rebuilt, meter)
    run_chunks(range(plan.layout.chunks), task, workers=workers, done=add, meter=meter)
    return total
