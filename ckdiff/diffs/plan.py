"""The diff: two checkpoints in, counts and (with an output) a mask store out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckdiff import budget
from ckdiff._version import __version__
from ckdiff.checkpoints.opening import (
    Given,
    bytes_to_download,
    fetch_all,
    no_room,
    open_for_planning,
    open_for_streaming,
    open_in,
    recipe_for_workers,
)
from ckdiff.checkpoints.sameness import FilePair, same_files
from ckdiff.diffs.comparison import Comparison, DiffRecipe, Selection
from ckdiff.diffs.refusals import refusal, starting_anew
from ckdiff.diffs.result import DiffResult, by_reason, commits, details
from ckdiff.dtypes import DTYPES
from ckdiff.errors import ClusterError, Interrupted, SourceChanged
from ckdiff.options import (
    Estimate,
    Observer,
    Options,
    Progress,
    checked_observer,
    checked_output,
)
from ckdiff.outputs.checks import check_disk, check_place
from ckdiff.rules import EXACT, Rule, parse_rules
from ckdiff.running.dask import client_for, run_cluster, threads_of
from ckdiff.running.remote import Remote
from ckdiff.running.threads import Amount, run_threads
from ckdiff.stores import sharedwork
from ckdiff.stores.summaries import rule_counts
from ckdiff.stores.table import MaskTable
from ckdiff.stores.workdir import WorkDir, check_early, stopped_hint, store_errors

if TYPE_CHECKING:
    from distributed import Client

    from ckdiff.diffs.disksharing import Streaming
    from ckdiff.stores.chunkresult import ChunkResult
    from ckdiff.stores.collecting import Collected


def plan_rules(asked: Sequence[str | Rule]) -> tuple[list[Rule], list[Rule]]:
    """(rules to store masks of, rules to count in the order in which they are reported)."""
    masks = parse_rules(asked) or [EXACT]
    return masks, list(dict.fromkeys([*masks, EXACT]))


class Diff:
    """A planned diff: both sides open, paired and laid out. A context manager."""

    def __init__(
        self,
        base: Given,
        tuned: Given,
        out: str | os.PathLike[str] | None,
        options: Options,
        observer: Observer | None = None,
    ) -> None:
        self.options = options
        self._observer = checked_observer(observer)
        self.mask_rules, self.rules = plan_rules(options.rules)
        self._order = sorted(self.rules, key=lambda rule: rule != EXACT)  # as kernels want them
        self._workers = options.workers or budget.usable_cores()
        self.out = None if out is None else checked_output(out)
        self._stack = ExitStack()
        self._resident = budget.resident_anonymous()
        self._streaming: Streaming | None = None
        with ExitStack() as stack:
            opening = open_for_streaming if options.stream else open_for_planning
            self.base, self.tuned = (open_in(stack, side, opening) for side in (base, tuned))
            self._began = time.perf_counter()
            self._compare()
            if self.out is not None and not options.dry_run:
                with store_errors(self.out):
                    check_early(self.out, overwrite=options.overwrite)
                check_disk(self.out, self._disk_at_most(), note=lambda message: None)
            self._client = self._meet(stack)
            if self._client is None:
                self._read_ahead(stack)
            else:
                self._recipes = (
                    recipe_for_workers(base, self.base),
                    recipe_for_workers(tuned, self.tuned),
                )
            self._allot()
            if not options.dry_run:
                self._fetch()
            self._stack = stack.pop_all()

    def __enter__(self) -> Diff:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    # planning

    def _meet(self, stack: ExitStack) -> Client | None:
        """Find the cluster, and say what is odd about the pair."""
        client: Client | None = stack.enter_context(client_for(self.options.scheduler))
        for warning in self.pairing.warnings:
            self._observer.note(f"warning: {warning}")
        if self.pairing.hint:
            self._observer.note(f"hint: {self.pairing.hint}")
        return client

    def _fetch(self) -> None:
        """Download what is left of both sides, whose tables stay. Of files that are here now, more
        or less is known than their headers said.
        """
        missing = bytes_to_download((self.base, self.tuned))
        fetch_all((self.base, self.tuned))
        if missing:
            self._began = time.perf_counter()
        if (same := self._same()) != self.comparison.same:
            self.comparison.knowing(same)

    def _same(self) -> tuple[FilePair, ...]:
        read_all = self.options.verify or self.options.stats  # they say it of equal tensors too
        return () if read_all else same_files(self.base, self.tuned)

    def _compare(self) -> None:
        base, tuned = self.base, self.tuned
        if self.out is not None:
            check_place(self.out, (base, tuned))
        chosen = self.options
        selection = Selection(*map(tuple, (chosen.include, chosen.exclude, chosen.rename)))
        self.comparison = Comparison(base, tuned, selection, self._same())
        self.pairing, self.layout = self.comparison.pairing, self.comparison.layout
        if self.out is not None:
            from ckdiff.stores.writer import require_text

            unpaired = details(self.pairing.unpaired)
            require_text([self.comparison.provenance(unpaired), self.pairing.names])

    def _read_ahead(self, stack: ExitStack) -> None:
        """Let the disk start on what each worker will need first, while kernels are loaded."""
        if self.options.dry_run:
            return

        thread = threading.Thread(
            target=self.comparison.read_ahead,
            args=(self._workers,),
            name="ckdiff-read-ahead",
            daemon=True,
        )
        thread.start()
        stack.callback(thread.join)  # before the files are closed

    def _allot(self) -> None:
        from ckdiff.diffs.allotment import allot
        from ckdiff.diffs.devices import Devices

        on_cluster = self._client is not None
        self._devices = Devices(self.options, self.comparison.bytes_to_read, on_cluster=on_cluster)
        planned = partial(
            allot,
            self.layout,
            workers=self._workers if self._client is None else threads_of(self._client),
            rules=len(self.rules),
            with_statistics=self.options.stats,
            asked=self.options.memory,
            held=max(0, budget.resident_anonymous() - self._resident - self._devices.resident),
        )
        found = self._devices.allot(planned, len(self.rules), self.comparison.bits)
        if self.options.stream:
            from ckdiff.diffs.disksharing import share_disk

            note = self._observer.note
            self._streaming = share_disk(
                self.comparison, found, self.options, on_cluster=on_cluster, note=note
            )
            found = self._streaming.allotment
        self.workers, self.window = found.workers, found.window
        self._devices.check(self.comparison.dtypes, self._order, self.window, self.workers)
        self.memory, self.memory_needed = found.memory, found.needed

    def estimate(self) -> Estimate:
        """What running will read, write and need."""
        most, overwrite = self._disk_at_most(), self.options.overwrite
        streaming, sides = self._streaming, (self.base, self.tuned)
        fetch = bytes_to_download(sides) if streaming is None else streaming.nbytes
        refused = no_room(sides) if streaming is None else streaming.refusal
        if refused is None and self.out is not None:
            refused = refusal(self.out, most, overwrite=overwrite)
        return Estimate(
            tensors=len(self.pairing),
            elements=int(self.layout.elements.sum()),
            chunks=self.layout.chunks,
            bytes_to_read=self.comparison.bytes_to_read,
            bytes_known_equal=self.comparison.bytes_known,
            bytes_to_download=fetch,
            disk_at_most=most,
            memory=self.memory,
            memory_needed=self.memory_needed,
            workers=self.workers,
            window=self.window,
            rules=[str(rule) for rule in self.rules],
            unpaired=by_reason(self.pairing.unpaired),
            refusal=refused,
        )

    def _disk_at_most(self) -> int:
        if self.out is None:
            return 0
        masks = self.layout.total // 8 + self.layout.chunks * 4096
        tables = len(self.pairing) * (160 + 16 * len(self.rules))
        return len(self.mask_rules) * masks + 2 * tables

    # running

    def run(self) -> DiffResult:
        """Compare everything. Raises SourceChanged, StoreError, Interrupted and their kin."""
        from ckdiff.stores.collecting import Collected

        collected = Collected(
            len(self.pairing), len(self.rules), self.layout, with_statistics=self.options.stats
        )
        manifest = b""
        # SIGTERM and Ctrl-C both arrive as KeyboardInterrupt or Interrupted in this thread
        try:
            if self.out is None:
                self._run_chunks(collected, None)
                self._verify_sources()
                return self._result(collected)
            check_disk(self.out, self._disk_at_most(), self._observer.note)
            with WorkDir(self.out, self._plan(), overwrite=self.options.overwrite) as work:
                if work.discarded:
                    self._observer.note(starting_anew(work.discarded, self.base, self.tuned))
                try:
                    resumed = self._run_chunks(collected, work)
                    with store_errors(self.out):
                        manifest = self._write_tables(collected, work.store)
                    self._verify_sources()
                except SourceChanged:
                    work.discard()  # nothing of it can be resumed
                    raise
                work.commit(manifest)
            return self._result(collected, resumed)
        except KeyboardInterrupt:
            hint = None if self.out is None else stopped_hint(self.out, manifest)
            raise Interrupted("interrupted", hint=hint) from None

    def _verify_sources(self) -> None:
        self.base.verify()
        self.tuned.verify()

    def _run_chunks(self, collected: Collected, work: WorkDir | None) -> int:
        """Gives how many bytes of both sides an earlier run had compared."""
        from ckdiff.stores.collecting import finished_before

        done = Amount()
        todo = []
        for chunk in range(self.layout.chunks):
            found = None if work is None else finished_before(work, chunk)
            if found is None:
                todo.append(chunk)
            else:
                collected.add(chunk, found)
                done.add(self.comparison.nbytes_of(chunk))
        resumed = done.value
        if work is not None and work.resumed and resumed:
            self._observer.note(
                f"resuming: {self.layout.chunks - len(todo)} of {self.layout.chunks} chunks "
                "were done already"
            )
        began, to_read = time.perf_counter(), self.comparison.bytes_to_read

        def report() -> None:
            self._devices.report(self._observer.note)
            self._observer.progress(
                Progress(done.value, to_read, time.perf_counter() - began, resumed)
            )

        def finished(chunk: int, result: ChunkResult) -> None:
            if work is not None:
                with store_errors(work.out):
                    work.record(chunk, result.to_bytes())
            collected.add(chunk, result)

        if self._client is None:
            self._run_here(todo, work, done, finished, report)
        else:
            self._run_there(self._client, todo, work, done, finished, report)
        report()
        return resumed

    def _run_here(
        self,
        todo: list[int],
        work: WorkDir | None,
        done: Amount,
        finished: Callable[[int, ChunkResult], None],
        report: Callable[[], None],
    ) -> None:
        """Compare chunks on our own threads."""
        task = self.comparison.task(
            self._order,
            self.mask_rules,
            with_statistics=self.options.stats,
            window=self.window,
            store=None if work is None else work.store,
            out=self.out,
            on_bytes=done.add,
        )
        task = self._devices.task(task, self._order, todo, self.workers)
        stopping = self._streaming.hang_up if self._streaming else lambda: None
        run_threads(todo, task, workers=self.workers, done=finished, tick=report, stopping=stopping)

    def _run_there(
        self,
        client: Client,
        todo: list[int],
        work: WorkDir | None,
        done: Amount,
        finished: Callable[[int, ChunkResult], None],
        report: Callable[[], None],
    ) -> None:
        """Compare chunks on the workers of a cluster, which write their objects themselves."""
        masks = tuple(map(str, self.mask_rules)) if work is not None else ()
        recipe = DiffRecipe(
            self._recipes,
            self.comparison.selection,
            order=tuple(map(str, self._order)),
            masks=masks,
            with_statistics=self.options.stats,
            window=self.window,
            seen=self.comparison.seen(),
            same=self.comparison.same,
            out=None if work is None else str(work.out),
            work=None if work is None else str(work.path),
            plan="" if work is None else sharedwork.prepare(work, masks),
        )

        def arrived(chunk: int, result: ChunkResult) -> None:
            if work is not None:
                sharedwork.check_objects(work, result.objects)
            done.add(self.comparison.nbytes_of(chunk))
            finished(chunk, result)

        try:
            run_cluster(todo, Remote(recipe), client, done=arrived, tick=report)
        except ClusterError:
            self._verify_sources()  # whether that is why a worker saw other files than we did
            raise

    def _plan(self) -> dict[str, Any]:
        """What decides whether earlier work can be used."""
        return {
            "ckdiff": __version__,
            "rules": [str(rule) for rule in self.rules],
            "masks": [str(rule) for rule in self.mask_rules],
            "statistics": self.options.stats,
            "tensors": self.comparison.tensors_digest(),
            "base": self.base.fingerprint(),
            "tuned": self.tuned.fingerprint(),
            "same": self.comparison.same,
        }

    # results

    def _table(self, collected: Collected) -> MaskTable:
        from ckdiff.diffs.tables import table_of

        return table_of(collected, self.comparison, self.rules, self._order)

    def _write_tables(self, collected: Collected, root: Path) -> bytes:
        """Write everything of the store but its masks; gives the manifest's bytes."""
        from ckdiff.stores.writer import write_tables

        collected.table = self._table(collected)
        return write_tables(
            root,
            collected.table,
            self.layout,
            masks=[str(rule) for rule in self.mask_rules],
            rules=[str(rule) for rule in self.rules],
            objects=collected.objects,
            provenance=self.comparison.provenance(details(self.pairing.unpaired)),
        )

    def _result(self, collected: Collected, resumed: int = 0) -> DiffResult:
        seconds = time.perf_counter() - self._began
        table = collected.table or self._table(collected)
        totals = {rule: int(counts.sum()) for rule, counts in table.changed.items()}
        exact_only = {}
        for rule in self.rules:
            names = [
                name
                for name, dtype in zip(self.pairing.names, self.comparison.dtypes, strict=True)
                if rule.falls_back(DTYPES[dtype])
            ]
            if names:
                exact_only[str(rule)] = names
        return DiffResult(
            table=table,
            rules=rule_counts(totals, table.total_elements),
            unpaired=by_reason(self.pairing.unpaired),
            unpaired_details=details(self.pairing.unpaired),
            excluded=self.pairing.excluded,
            exact_only=exact_only,
            bytes_read=self.comparison.bytes_to_read,
            bytes_resumed=resumed,
            bytes_known_equal=self.comparison.bytes_known,
            seconds=seconds,
            device=self._devices.taken.device,
            device_why=self._devices.taken.why,
            commits=commits(self.base, self.tuned),
            store_path=self.out,
        )
