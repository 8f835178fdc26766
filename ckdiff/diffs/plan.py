"""The plan of a diff: what is compared, and what that takes, before anything is downloaded or read.

It is made from headers alone. ``ckdiff.diffs.run`` carries it out; a dry run prints it.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff import budget
from ckdiff._version import __version__
from ckdiff.checkpoints.opening import (
    Given,
    adapted,
    bytes_to_download,
    no_room,
    open_for_planning,
    open_for_streaming,
    open_sides,
    recipe_for_workers,
)
from ckdiff.checkpoints.pieces import notes_of, told
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.sameness import FilePair, same_files
from ckdiff.diffs.comparison import Comparison, Selection, side_by_side
from ckdiff.diffs.gates import refuse_unmatched, unmatched
from ckdiff.diffs.refusals import refusal
from ckdiff.diffs.result import asked_for, by_reason, details
from ckdiff.options import Estimate, Observer, Options, checked_observer, checked_output
from ckdiff.outputs.checks import check_disk, check_place
from ckdiff.rules import RuleSet
from ckdiff.running.dask import client_for, threads_of
from ckdiff.stores.workdir import check_early, store_errors

if TYPE_CHECKING:
    from distributed import Client

    from ckdiff.diffs.allotment import Allotment
    from ckdiff.diffs.casting import Casting
    from ckdiff.diffs.devices import Devices
    from ckdiff.diffs.disksharing import Streaming


@dataclass(frozen=True, slots=True, eq=False)
class DiffPlan:
    """Two checkpoints that are open, paired and laid out, and who compares them with what.

    A context manager: whoever made it closes it, which closes what it opened.
    """

    options: Options
    observer: Observer = field(repr=False)
    out: Path | None  #: where the store goes, if there is one
    rules: RuleSet
    comparison: Comparison
    client: Client | None  #: the cluster that runs it
    recipes: tuple[str, str] | None  #: how its workers open both sides
    devices: Devices  #: the device that was asked for; whether it is taken shows in the run
    allotment: Allotment
    streaming: Streaming | None
    asked: tuple[str, str]  #: what both sides were asked for as
    opened: float = field(repr=False)  #: when both sides were, by ``time.perf_counter``
    stack: ExitStack = field(repr=False)  #: what is closed with it

    def __enter__(self) -> DiffPlan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def sides(self) -> tuple[Checkpoint, Checkpoint]:
        """Base and tuned."""
        return self.comparison.base, self.comparison.tuned

    def same_files(self) -> tuple[FilePair, ...]:
        """The files that are known to be equal, and need not be read."""
        return _same(self.options, self.sides)

    def disk_at_most(self) -> int:
        """Bytes that the store takes if nothing of it compresses."""
        return 0 if self.out is None else _disk_at_most(self.comparison, self.rules)

    def identity(self) -> dict[str, Any]:
        """What decides whether the work of an earlier run can be used."""
        base, tuned = self.sides
        return {
            "ckdiff": __version__,
            "rules": [str(rule) for rule in self.rules.reported],
            "masks": [str(rule) for rule in self.rules.masks],
            "statistics": self.options.stats,
            "tensors": self.comparison.tensors_digest(),
            "base": base.fingerprint(),
            "tuned": tuned.fingerprint(),
            "same": self.comparison.same,
        }

    def estimate(self) -> Estimate:
        """What running will read, write and need."""
        most, streaming, layout = self.disk_at_most(), self.streaming, self.comparison.layout
        fetch = bytes_to_download(self.sides) if streaming is None else streaming.nbytes
        refused = no_room(self.sides) if streaming is None else streaming.refusal
        if refused is None and self.out is not None:
            refused = refusal(self.out, most, overwrite=self.options.overwrite)
        return Estimate(
            tensors=len(self.comparison.pairing),
            elements=int(layout.elements.sum()),
            chunks=layout.chunks,
            bytes_to_read=self.comparison.bytes_to_read,
            bytes_known_equal=self.comparison.bytes_known,
            bytes_to_download=fetch,
            disk_at_most=most,
            memory=self.allotment.memory,
            memory_needed=self.allotment.needed,
            workers=self.allotment.workers,
            window=self.allotment.window,
            rules=[str(rule) for rule in self.rules.reported],
            unpaired=by_reason(self.comparison.pairing.unpaired),
            refusal=refused,
        )


def plan(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str] | None,
    options: Options,
    observer: Observer | None = None,
) -> DiffPlan:
    """Open both sides by their headers and plan their diff; warnings go to ``observer``.

    Raises what a run would raise before it reads anything, but for a dry run what is wrong with
    the output and its disk, which the estimate says.
    """
    observer, options = checked_observer(observer), replace(options)  # whoever asked may change it
    rules, resident = RuleSet.of(options.rules), budget.resident_anonymous()
    place = None if out is None else checked_output(out)
    with ExitStack() as stack:
        sides = _sides(stack, base, tuned, options)
        opened = time.perf_counter()
        comparison = _compared(sides, place, options)
        if place is not None and not options.dry_run:
            with store_errors(place):
                check_early(place, overwrite=options.overwrite)
            check_disk(place, _disk_at_most(comparison, rules), note=lambda message: None)
        client: Client | None = stack.enter_context(client_for(options.scheduler))
        _tell(comparison, observer)
        recipes, workers = None, options.workers or budget.usable_cores()
        if client is not None:
            recipes = recipe_for_workers(base, sides[0]), recipe_for_workers(tuned, sides[1])
            workers = threads_of(client)
        elif not options.dry_run:
            _read_ahead(comparison, workers, stack)
        devices, allotment, streaming = _means(
            comparison, rules, options, workers, resident, observer, on_cluster=client is not None
        )
        return DiffPlan(
            options, observer, place, rules, comparison, client, recipes, devices, allotment,
            streaming, (asked_for(base, sides[0]), asked_for(tuned, sides[1])), opened,
            stack.pop_all(),
        )  # fmt: skip


def _sides(
    stack: ExitStack, base: Given, tuned: Given, options: Options
) -> tuple[Checkpoint, Checkpoint]:
    """Base and tuned, each with the adapter that is merged into it, if there is one."""
    opening = open_for_streaming if options.stream else open_for_planning
    first, second = open_sides(stack, (base, tuned), opening, options.key)
    return (
        adapted(stack, first, options.base_adapter),
        adapted(stack, second, options.tuned_adapter),
    )


def _same(options: Options, sides: tuple[Checkpoint, Checkpoint]) -> tuple[FilePair, ...]:
    # statistics say it of equal tensors too
    return () if options.verify or options.stats else same_files(*sides)


def _compared(
    sides: tuple[Checkpoint, Checkpoint], out: Path | None, options: Options
) -> Comparison:
    if out is not None:
        check_place(out, sides)
    selection = Selection(
        tuple(options.include),
        tuple(options.exclude),
        tuple(options.rename),
        options.common_rows,
        options.unfuse,
        options.dequantize,
    )
    comparison = side_by_side(*sides, selection, _same(options, sides))
    if options.gated:
        refuse_unmatched(unmatched(comparison, options.expected))
    if out is not None:
        from ckdiff.stores.writer import require_text

        unpaired = details(comparison.pairing.unpaired)
        require_text([comparison.provenance(unpaired), comparison.pairing.names])
    return comparison


def _disk_at_most(comparison: Comparison, rules: RuleSet) -> int:
    layout = comparison.layout
    masks = layout.total // 8 + layout.chunks * 4096
    return len(rules.masks) * masks + 2 * len(comparison.pairing) * (160 + 16 * len(rules))


def _tell(comparison: Comparison, observer: Observer) -> None:
    """What people should know of the pairs."""
    for said in (*notes_of([comparison.base, comparison.tuned]), *map(told, comparison.notes)):
        observer.note(said)
    if (alias := comparison.one_memory()) is not None:
        observer.note(f"warning: {alias}")
    for warning in comparison.pairing.warnings:
        observer.note(f"warning: {warning}")
    if comparison.pairing.hint:
        observer.note(f"hint: {comparison.pairing.hint}")


def _read_ahead(comparison: Comparison, workers: int, stack: ExitStack) -> None:
    """Let the disk start on what each worker will need first, while kernels are loaded."""
    thread = threading.Thread(
        target=comparison.read_ahead, args=(workers,), name="ckdiff-read-ahead", daemon=True
    )
    thread.start()
    stack.callback(thread.join)  # before the files are closed


def _reading(comparison: Comparison, casting: Casting, here: bool, window: int) -> int:
    """Bytes that a worker takes to read windows of so many elements, which are compared ``here``
    or on a device.
    """
    from ckdiff.kernels.hashing import xxh3_128_address

    sides = comparison.base, comparison.tuned
    size = window * int(comparison.bits.max(initial=8)) // 8
    makes = here and xxh3_128_address() != 0
    taken = casting.memory(window, late=makes)
    taken += sum(side.reader_memory(size) for side in sides)
    if makes and all(s.longer for s in sides) and not any(casting.narrow):
        taken -= size * len(sides)  # both say how values are made: they are in no buffer
    return taken


def _means(
    comparison: Comparison,
    rules: RuleSet,
    options: Options,
    workers: int,
    resident: int,
    observer: Observer,
    *,
    on_cluster: bool,
) -> tuple[Devices, Allotment, Streaming | None]:
    """Where windows are compared, and how much memory and disk there is for what.

    ``resident`` is what the process held before it opened anything.
    """
    from ckdiff.diffs.allotment import allot
    from ckdiff.diffs.devices import Devices
    from ckdiff.diffs.task import largest_window

    sides = comparison.base, comparison.tuned
    devices = Devices.of(options, comparison.bytes_to_read, on_cluster=on_cluster, sides=sides)
    planned = partial(
        allot,
        comparison.layout,
        workers=workers,
        rules=len(rules),
        with_statistics=options.stats,
        asked=options.memory,
        held=max(0, budget.resident_anonymous() - resident - devices.resident),
        readers=partial(_reading, comparison, comparison.casting(), devices.device is None),
        largest=largest_window(sides),
    )
    devices, found = devices.allot(planned, len(rules), comparison.bits)
    streaming = None
    if options.stream:
        from ckdiff.diffs.disksharing import share_disk

        note = observer.note
        streaming = share_disk(comparison, found, options, on_cluster=on_cluster, note=note)
        found = streaming.allotment
    devices = devices.check(comparison.kinds, rules.order, found.window, found.workers)
    return devices, found, streaming
