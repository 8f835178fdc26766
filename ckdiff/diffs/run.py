"""A diff carried out: from its plan to counts and, with an output, a mask store."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff.checkpoints.opening import bytes_to_download, fetch_all
from ckdiff.diffs.comparison import Comparison, DiffRecipe
from ckdiff.diffs.devices import DeviceRun
from ckdiff.diffs.gates import unmatched
from ckdiff.diffs.merging import as_json
from ckdiff.diffs.plan import DiffPlan
from ckdiff.diffs.refusals import starting_anew
from ckdiff.diffs.result import DiffResult, by_reason, commits, details, resized, retyped
from ckdiff.diffs.tables import quantised_notes, rounding_hint, table_of
from ckdiff.diffs.ties import tie_notes, tied_extras, tied_pairs
from ckdiff.dtypes import DTYPES
from ckdiff.errors import ClusterError, SourceChanged
from ckdiff.outputs.checks import check_disk
from ckdiff.rules import RuleSet
from ckdiff.running.runners import Meter, OnCluster, interruptible, run_chunks
from ckdiff.stores import sharedwork
from ckdiff.stores.collecting import Collected, Recorder, recorder, resume, resuming
from ckdiff.stores.sink import ObjectSink
from ckdiff.stores.summaries import rule_counts
from ckdiff.stores.table import MaskTable
from ckdiff.stores.workdir import WorkDir, stopped_hint, store_errors
from ckdiff.stores.writer import write_tables

if TYPE_CHECKING:
    from distributed import Client

    from ckdiff.stores.chunkresult import ChunkResult


def run(plan: DiffPlan) -> DiffResult:
    """Download what is left, and compare everything.

    Raises SourceChanged, StoreError, Interrupted and their kin.
    """
    missing = bytes_to_download(plan.sides)
    fetch_all(plan.sides)
    began = time.perf_counter() if missing else plan.opened  # a download takes what it takes
    plan = replace(plan, comparison=plan.comparison.knowing(plan.same_files()))
    return _Run(plan, began).result()


def verify_sources(plan: DiffPlan) -> None:
    """Raise SourceChanged where a side is not what was opened."""
    for side in plan.sides:
        side.verify()


class _Run:
    def __init__(self, plan: DiffPlan, began: float) -> None:
        self._plan, self._began = plan, began
        self._comparison, self._rules = plan.comparison, plan.rules
        self._layout = plan.comparison.layout
        statistics = plan.options.stats
        pairs = len(plan.comparison.pairing)
        self._collected = Collected(
            pairs, len(plan.rules), self._layout, with_statistics=statistics
        )
        self._device = DeviceRun(plan.devices)
        self._resumed = 0  #: bytes of both sides that an earlier run had compared
        self._tied: list[dict[str, Any]] = []
        self._manifest = b""

    def result(self) -> DiffResult:
        plan = self._plan
        with interruptible(self._hint):
            if plan.out is None:
                self._compare(None)
                table = self._settle()
                verify_sources(plan)
                return self._found(table)
            check_disk(plan.out, plan.disk_at_most(), plan.observer.note)
            with WorkDir(plan.out, plan.identity(), overwrite=plan.options.overwrite) as work:
                if work.discarded:
                    plan.observer.note(starting_anew(work.discarded, *plan.sides))
                try:
                    self._compare(work)
                    table = self._settle()
                    with store_errors(plan.out):
                        self._manifest = self._write_tables(work.store, table)
                    verify_sources(plan)
                except SourceChanged:
                    work.discard()  # nothing of it can be resumed
                    raise
                work.commit(self._manifest)
            return self._found(table)

    def _settle(self) -> MaskTable:
        """Make the table, and look for tensors that are another of their side once more."""
        plan, comparison = self._plan, self._comparison
        table = table_of(self._collected, comparison, self._rules)
        self._tied = tied_extras(plan.sides, comparison.pairing, comparison.tuned_names)
        for note in () if plan.options.dequantize else quantised_notes(comparison, table):
            plan.observer.note(note)
        if (said := rounding_hint(comparison, table, self._rules)) is not None:
            plan.observer.note(f"hint: {said}")
        pairs = tied_pairs(table, plan.sides[0], comparison.pairing)
        for note in tie_notes(self._tied, pairs):
            plan.observer.note(note)
        return table

    def _hint(self) -> str | None:
        out = self._plan.out
        return None if out is None else stopped_hint(out, self._manifest)

    def _compare(self, work: WorkDir | None) -> None:
        """Compare what an earlier run left to do."""
        plan, chunks = self._plan, self._layout.chunks
        todo = resume(work, self._collected, chunks)
        nbytes_of = self._comparison.nbytes_of
        self._resumed = sum(nbytes_of(chunk) for chunk in set(range(chunks)).difference(todo))
        if self._resumed:
            plan.observer.note(resuming(todo, chunks))
        meter = _Meter(plan, self._resumed, self._device)
        record = recorder(work, self._collected)
        try:
            if plan.client is None:
                self._compare_here(todo, work, record, meter)
            else:
                self._compare_there(plan.client, todo, work, record, meter)
        except ClusterError:
            verify_sources(plan)  # whether that is why a worker saw other files than we did
            raise

    def _compare_here(
        self, todo: list[int], work: WorkDir | None, record: Recorder, meter: Meter
    ) -> None:
        """Compare chunks on our own threads."""
        plan, workers = self._plan, self._plan.allotment.workers
        task = self._comparison.task(
            self._rules,
            with_statistics=plan.options.stats,
            window=plan.allotment.window,
            sink=None if work is None else ObjectSink(work.store, work.out),
            on_bytes=meter.add,
        )
        task = self._device.task(task, self._rules.order, todo, workers)

        def stop() -> None:
            if plan.streaming is not None:
                plan.streaming.hang_up()

        run_chunks(todo, task, workers=workers, done=record, meter=meter, stopping=stop)

    def _compare_there(
        self, client: Client, todo: list[int], work: WorkDir | None, record: Recorder, meter: Meter
    ) -> None:
        """Compare chunks on the workers of a cluster, which write their objects themselves."""
        plan, comparison = self._plan, self._comparison
        masks = tuple(map(str, self._rules.masks))
        assert plan.recipes is not None  # there are some where there is a client
        recipe = DiffRecipe(
            plan.recipes,
            comparison.selection,
            rules=masks,
            with_statistics=plan.options.stats,
            window=plan.allotment.window,
            seen=comparison.seen(),
            same=comparison.same,
            out=None if work is None else str(work.out),
            work=None if work is None else str(work.path),
            plan="" if work is None else sharedwork.prepare(work, masks),
        )

        def arrived(chunk: int, result: ChunkResult) -> None:
            if work is not None:
                sharedwork.check_objects(work, result.objects)
            meter.add(comparison.nbytes_of(chunk))
            record(chunk, result)

        there = OnCluster(recipe, client)
        run_chunks(todo, there, workers=plan.allotment.workers, done=arrived, meter=meter)

    def _write_tables(self, root: Path, table: MaskTable) -> bytes:
        """Write everything of the store but its masks; gives the manifest's bytes."""
        return write_tables(
            root,
            table,
            self._layout,
            masks=[str(rule) for rule in self._rules.masks],
            rules=[str(rule) for rule in self._rules.reported],
            objects=self._collected.objects,
            provenance=self._comparison.provenance(details(self._comparison.pairing.unpaired)),
            tied=self._tied,
        )

    def _found(self, table: MaskTable) -> DiffResult:
        seconds = time.perf_counter() - self._began
        plan, comparison, pairing = self._plan, self._comparison, self._comparison.pairing
        totals = {rule: int(counts.sum()) for rule, counts in table.changed.items()}
        return DiffResult(
            table=table,
            rules=rule_counts(totals, table.total_elements),
            unpaired=by_reason(pairing.unpaired),
            unpaired_details=details(pairing.unpaired),
            excluded=pairing.excluded,
            exact_only=_exact_only(comparison, self._rules),
            bytes_read=comparison.bytes_to_read,
            bytes_resumed=self._resumed,
            bytes_known_equal=comparison.bytes_known,
            seconds=seconds,
            device=self._device.taken.device,
            device_why=self._device.taken.why,
            commits=commits(*plan.sides),
            base=plan.asked[0],
            tuned=plan.asked[1],
            unmatched=unmatched(comparison),
            retyped=retyped(comparison),
            resized=resized(comparison),
            tied=self._tied,
            merge=as_json(self._collected.survived),
            store_path=plan.out,
        )


def _exact_only(comparison: Comparison, rules: RuleSet) -> dict[str, list[str]]:
    """For each rule the tensors on which it means ``exact``, if there are any."""
    found = {}
    present = set(comparison.kinds)
    for rule in rules.reported:
        exact = {dtype for dtype in present if rule.falls_back(DTYPES[dtype])}
        if exact:
            pairs = zip(comparison.pairing.names, comparison.kinds, strict=True)
            found[str(rule)] = [name for name, dtype in pairs if dtype in exact]
    return found


class _Meter(Meter):
    """Tells what the device has to say as well."""

    def __init__(self, plan: DiffPlan, resumed: int, device: DeviceRun) -> None:
        super().__init__(plan.observer, plan.comparison.bytes_to_read, resumed)
        self._note, self._device = plan.observer.note, device

    def report(self) -> None:
        """See Meter."""
        self._device.report(self._note)
        super().report()
