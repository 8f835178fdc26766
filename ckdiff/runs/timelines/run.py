"""A timeline carried out: from its plan to a directory that holds it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ckdiff._version import __version__
from ckdiff.checkpoints.opening import fetch_all
from ckdiff.diffs.result import details
from ckdiff.diffs.tables import table_of
from ckdiff.dtypes import DTYPES
from ckdiff.errors import SourceChanged
from ckdiff.kernels.timeline import Marching
from ckdiff.layout import IntArray
from ckdiff.outputs.checks import check_disk
from ckdiff.outputs.placing import MANIFEST, write_file
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.runs.timelines.chunk import TimelineSums, recorder, resume
from ckdiff.runs.timelines.file import (
    COUNTS,
    FIRST_MOVES,
    FORMAT,
    FORMAT_VERSION,
    LENGTHS,
    WAYS,
    documents,
    foreign,
    step_folder,
    table_key,
)
from ckdiff.runs.timelines.former import Former
from ckdiff.runs.timelines.paths import Float64, Paths, arrays, joined
from ckdiff.runs.timelines.plan import TimelinePlan
from ckdiff.runs.timelines.task import TimelineTask
from ckdiff.runs.timelines.versions import Straddling
from ckdiff.stores.collecting import Collected, resuming
from ckdiff.stores.manifest import dump_json, seal
from ckdiff.stores.workdir import WorkDir, stopped_hint, store_errors
from ckdiff.stores.writer import write_tables


class Outcome:
    """What making a timeline took."""

    def __init__(self, bytes_read: int, bytes_resumed: int, seconds: float) -> None:
        self.bytes_read, self.bytes_resumed, self.seconds = bytes_read, bytes_resumed, seconds


def run(plan: TimelinePlan) -> Outcome:
    """Download what is left, compare everything, and put the timeline in its place.

    Raises SourceChanged, StoreError, Interrupted and their kin.
    """
    fetch_all(plan.sources)
    return _Run(plan).result()


class _Run:
    def __init__(self, plan: TimelinePlan) -> None:
        self._plan, self._layout = plan, plan.pairs.layout
        self._rule = str(plan.rules.masks[0])
        sides = len(plan.marching.sides)
        self._collected = TimelineSums(
            len(plan.pairs.names), sides, len(plan.rules), plan.steps, stats=plan.options.stats
        )
        self._former: Former | None = None
        self._resumed = 0
        self._manifest = b""

    def result(self) -> Outcome:
        plan = self._plan
        overwrite = plan.options.overwrite or plan.former is not None
        with interruptible(lambda: stopped_hint(plan.out, self._manifest)):
            check_disk(plan.out, plan.disk_at_most, plan.observer.note)
            with WorkDir(plan.out, plan.identity(), overwrite=overwrite, strange=foreign) as work:
                if work.discarded:
                    plan.observer.note(
                        "warning: an earlier run was stopped here, but its "
                        f"{' and '.join(work.discarded)} were not the same: starting again"
                    )
                try:
                    if plan.former is not None:
                        self._former = Former(plan.out, plan.former, plan.loaded)
                    self._march(work)
                    self._check_versions()
                    self._check_former()
                    with store_errors(plan.out):
                        self._manifest = self._write(work.store)
                    for source in plan.sources:
                        source.verify()
                except SourceChanged:
                    work.discard()  # nothing of it can be resumed
                    raise
                work.commit(self._manifest)
        seconds = time.perf_counter() - plan.opened
        return Outcome(plan.bytes_to_read, self._resumed, seconds)

    def _march(self, work: WorkDir) -> None:
        """Compare what an earlier run left to do."""
        plan, layout = self._plan, self._layout
        todo = resume(work, self._collected, layout.chunks)
        done = set(range(layout.chunks)).difference(todo)
        self._resumed = sum(map(plan.nbytes_of, done))
        if done:
            plan.observer.note(resuming(todo, layout.chunks))
        meter = Meter(plan.observer, plan.bytes_to_read, self._resumed)
        task = self._task(work.store, meter)
        record = recorder(work, self._collected)
        run_chunks(todo, task, workers=plan.workers, done=record, meter=meter)

    def _task(self, folder: Path, meter: Meter) -> TimelineTask:
        plan, pairs = self._plan, self._plan.marching
        kinds = [pairs.kinds(pair) for pair in range(len(pairs.pairs))]
        present = list(dict.fromkeys(kind for some in kinds for kind in some))
        kernels = Marching(
            [DTYPES[name] for name in present], list(plan.rules.order), len(pairs.sides)
        )
        slots = np.array([[kernels.slot_of[kind] for kind in some] for some in kinds], np.int64)
        return TimelineTask(
            pairs=pairs,
            layout=self._layout,
            slots=slots,
            kernels=kernels,
            rules=len(plan.rules),
            rule=self._rule,
            loaded=[] if self._former is None else self._former.sources(self._rule),
            width=plan.width,
            window=plan.window,
            cuts=plan.cuts(),
            paths=Paths(pairs, 2 if plan.former else 1) if plan.options.stats else None,
            folder=folder,
            out=plan.out,
            on_bytes=meter.add,
        )

    def _check_versions(self) -> None:
        """Hold the digests of what weight versions make of tensors that no chunk holds whole."""
        plan, layout = self._plan, self._layout
        last = layout.starts + layout.elements - 1
        over = layout.starts // layout.chunk != np.maximum(last, layout.starts) // layout.chunk
        for fold in plan.marching.folded():
            assert fold.start is not None
            held = Straddling(fold.start.checkpoint, fold.versions, plan.out.parent)
            held.check(fold.start.index[over])

    def _check_former(self) -> None:
        """Raise StoreExists where the timeline that is there is of other weights."""
        if self._former is None:
            return
        plan = self._plan
        for side in (0, 1):
            found = plan.marching.sides[side]
            label = plan.checkpoints[side and plan.loaded + 1]["label"]
            self._former.check(side, self._collected.hashes(side), found.nbytes, label)

    def _write(self, root: Path) -> bytes:
        """Write everything but what the chunks wrote; gives the manifest's bytes."""
        plan, made = self._plan, self._collected.objects
        objects = {key: made[key] for key in made if key.startswith(f"{FIRST_MOVES}/")}
        if self._former is not None:
            self._former.take_over(root)
        for side in range(1, len(plan.marching.sides)):
            self._write_store(root, side)
        counts = self._counts()
        described = documents(
            plan.steps, len(plan.pairs.names), self._layout.total, plan.width,
            statistics=plan.options.stats,
        )  # fmt: skip
        written = {key: dump_json(content) for key, content in described.items()}
        written[table_key(COUNTS)] = counts.astype("<i8").tobytes()
        if plan.options.stats:
            lengths, ways = self._paths()
            written[table_key(LENGTHS)] = lengths.astype("<f8").tobytes()
            written[table_key(WAYS)] = ways.astype("<i8").tobytes()
        for key, data in written.items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            write_file(root / key, data, sync=False)
            objects[key] = len(data), xxhash.xxh3_128_hexdigest(data)
        for step in range(1, plan.steps + 1):
            key = f"{step_folder(step)}/{MANIFEST}"
            data = (root / key).read_bytes()
            objects[key] = len(data), xxhash.xxh3_128_hexdigest(data)
        return seal(self._said(counts, objects))

    def _said(self, counts: IntArray, objects: dict[str, tuple[int, str]]) -> dict[str, Any]:
        plan, steps = self._plan, self._plan.steps
        sums = counts.sum(1).tolist()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "ckdiff_version": __version__,
            "rule": self._rule,
            "elements": int(self._layout.elements.sum()),
            "tensors": len(plan.pairs.names),
            "addresses": self._layout.total,
            "checkpoints": plan.checkpoints,
            "steps": [
                {
                    "changed_since_first": sums[i],
                    "changed_since_previous": sums[steps + i],
                    "kept": sums[2 * steps + i],
                }
                for i in range(steps)
            ],
            "moved": sums[-1],
            "first_moves": f"uint{8 * plan.width}" if plan.width else None,
            "statistics": plan.options.stats,
            "objects": {key: list(objects[key]) for key in sorted(objects)},
        }

    def _counts(self) -> IntArray:
        """For each step the counts of each tensor: see ``count_rows``."""
        sums, loaded = self._collected.sums, self._plan.loaded
        firsts, nexts = sums.firsts[:, :, -1].T, sums.nexts.T
        previous = firsts[:1]  # of the first step both are the same
        if self._former is not None:
            steps = len(self._former.manifest["steps"])
            known = self._former.counts
            firsts = np.concatenate([known[:loaded], firsts])
            previous = known[steps : 2 * steps]
        return np.concatenate([firsts, previous, nexts, sums.moves.T])

    def _paths(self) -> tuple[Float64, IntArray]:
        """The lengths and ways of all steps: those that are known, then those that were read."""
        found = arrays(self._collected.sums.paths, 0 if self._former is None else 1)
        if self._former is None or self._former.paths is None:
            return found
        return joined(self._former.paths, found)

    def _write_store(self, root: Path, side: int) -> None:
        """Write what the store of a step holds besides its mask, as a diff writes it."""
        plan = self._plan
        step = plan.loaded + side
        comparison = plan.pairs.comparisons[step - 1]
        pairs = len(plan.pairs.names)
        found = Collected(pairs, len(plan.rules), self._layout, with_statistics=False)
        found.changed[...] = self._collected.sums.firsts[:, side - 1]
        found.hashes[:, :2] = self._collected.hashes(0)
        found.hashes[:, 2:] = self._collected.hashes(side)
        folder = step_folder(step) + "/"
        objects = {
            key.removeprefix(folder): known
            for key, known in self._collected.objects.items()
            if key.startswith(folder)
        }
        (root / folder).mkdir(parents=True, exist_ok=True)
        manifest = write_tables(
            root / folder,
            table_of(found, comparison, plan.rules),
            self._layout,
            masks=[self._rule],
            rules=[str(rule) for rule in plan.rules.reported],
            objects=objects,
            provenance=comparison.provenance(details(comparison.pairing.unpaired)),
        )
        write_file(root / folder / MANIFEST, manifest, sync=False)
