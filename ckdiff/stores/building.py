"""Mask stores made from other mask stores: one rule, one mask, its own provenance.

What they have in common is here: the chunk task, the work directory, resuming, the tables. How the
bits of a chunk come about is the business of a :class:`Maker`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff._version import __version__
from ckdiff.errors import StoreError, printable
from ckdiff.kernels import HASH_COLUMNS
from ckdiff.layout import Layout, Spans
from ckdiff.options import Observer, Options, checked_observer, checked_output
from ckdiff.outputs.checks import ELSEWHERE, check_disk, relation
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import PerThread, Stopped
from ckdiff.stores.chunkresult import ChunkResult
from ckdiff.stores.collecting import Collected, recorder, resume, resuming
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.objects import INNER, OBJECT, ObjectWriter, object_key
from ckdiff.stores.table import UNKNOWN, IntArray, MaskTable
from ckdiff.stores.workdir import WorkDir, stopped_hint, store_errors
from ckdiff.stores.writer import require_text, write_tables

Bytes = npt.NDArray[np.uint8]
OnBytes = Callable[[int], None]


class Maker(ABC):
    """How the mask comes about, a chunk at a time. Shared by the threads of a process."""

    total: int  #: bytes of work in all, for the progress report
    #: memory, besides that of the chunk tasks and the tables of the store
    need: Need = Need(tables=0, worker=0)

    def prepare(  # noqa: B027 - optional
        self, chunks: Sequence[int], workers: int, tick: Callable[[], None], done: OnBytes
    ) -> None:
        """What has to be known before any of ``chunks`` can be made; runs in the caller's thread.

        ``done`` is told of bytes of work.
        """

    @abstractmethod
    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """Write the bits of ``spans`` into the zeroed ``mask``, which begins at address ``first``.

        Counts go to ``changed``, one for each span. Yields now and then how many bytes of ``mask``
        will not change any more.
        """

    def verify(self, changed: IntArray) -> None:  # noqa: B027 - optional
        """Hold the counts of all tensors against what is known about them."""


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """What a derived store says besides its bits and counts."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    layout: Layout
    base_hashes: list[str]
    rule: str
    made_by: dict[str, Any]  #: of the manifest; the same inputs must give the same
    resized: dict[int, tuple[int, int]] = field(default_factory=dict)  #: as in MaskTable


class Target:
    """Where a derived store goes, and how it is made: what callers hand over, checked."""

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool,
        workers: int | None,
        observer: Observer | None,
    ) -> None:
        options = Options(overwrite=overwrite, workers=workers)
        self.out = checked_output(out)
        self.overwrite = options.overwrite
        self.asked = options.workers
        self.observer = checked_observer(observer)

    def keep_away_from(self, stores: Sequence[MaskStore]) -> None:
        """Raise StoreError where the output would be an input, lie inside one, or hold one."""
        problems = {"holds": "would replace the input", "inside": "lies inside the input"}
        for store in stores:
            found = relation(self.out, store.path)
            if found is not None:
                raise StoreError(
                    f"the output {printable(str(self.out))} {problems[found]} "
                    f"{printable(str(store.path))}",
                    hint=ELSEWHERE,
                )

    def write(self, derived: Derived, maker: Maker) -> MaskStore:
        """Make the store. Raises StoreError, BudgetError, Interrupted, and what ``maker`` raises.

        A run that was stopped is resumed by the same call.
        """
        require_text([derived.made_by, derived.names])
        # there is no --memory here: the default bounds the workers
        workers = fit_workers(
            self.asked, derived.layout.chunks, _need(derived, maker), None, option=False
        )
        check_disk(self.out, _disk_at_most(derived), self.observer.note)
        manifest = b""
        with (
            interruptible(lambda: stopped_hint(self.out, manifest)),
            WorkDir(self.out, _plan(derived), overwrite=self.overwrite) as work,
        ):
            if work.discarded:
                self.observer.note(
                    "warning: an earlier run was stopped here, but it was another one: "
                    "starting again"
                )
            collected = self._run_chunks(derived, maker, work, workers)
            maker.verify(collected.changed[:, 0])
            with store_errors(self.out):
                manifest = _write_tables(derived, collected, work.store)
            work.commit(manifest)
        return open_store(self.out)

    def _run_chunks(self, derived: Derived, maker: Maker, work: WorkDir, workers: int) -> Collected:
        layout = derived.layout
        collected = Collected(len(derived.names), 1, layout, with_statistics=False)
        todo = resume(work, collected, layout.chunks)
        finished = layout.chunks - len(todo)
        if finished:
            self.observer.note(resuming(todo, layout.chunks))
        meter = Meter(self.observer, maker.total, maker.total * finished // max(1, layout.chunks))
        workers = max(1, min(workers, len(todo)))
        maker.prepare(todo, workers, meter.report, meter.add)
        task = MaskTask(maker, layout, derived.rule, work.store, self.out, meter.add)
        run_chunks(todo, task, workers=workers, done=recorder(work, collected), meter=meter)
        return collected


@dataclass(slots=True)
class MaskTask:
    """The chunk task of a derived store: made bits are encoded and written while in cache."""

    maker: Maker
    layout: Layout
    rule: str
    store: Path  #: where objects go
    out: Path  #: how errors of writing them name it
    on_bytes: OnBytes
    _tools: PerThread[tuple[Bytes, MaskEncoder]] = field(
        default_factory=lambda: PerThread(lambda: (np.empty(OBJECT, np.uint8), MaskEncoder()))
    )

    def __call__(self, chunk: int, stop: threading.Event) -> ChunkResult:
        """See ChunkTask. Raises StoreError, Stopped, and what the maker raises."""
        first, end = self.layout.chunk_range(chunk)
        spans = self.layout.spans(first, end)
        changed = np.zeros(len(spans), np.int64)
        mask, encoder = self._tools()
        mask.fill(0)
        size = -(-(end - first) // (8 * INNER)) * INNER
        key = object_key(self.rule, chunk)
        with ExitStack() as stack:
            stack.enter_context(store_errors(self.out))
            writer = ObjectWriter(self.store / key)
            stack.callback(writer.abandon)
            written = 0
            for final in self.maker.make(first, spans, mask, changed, self.on_bytes):
                if stop.is_set():
                    raise Stopped
                whole = final // INNER * INNER
                writer.add(
                    [encoder.encode(mask[at : at + INNER]) for at in range(written, whole, INNER)]
                )
                written = max(written, whole)
            writer.add(
                [encoder.encode(mask[at : at + INNER]) for at in range(written, size, INNER)]
            )
            entry = writer.finish()
        no_hashes = np.zeros((len(spans), HASH_COLUMNS), np.uint64)
        return ChunkResult(spans.tensors, changed[:, None], no_hashes, None, {key: entry})


def _need(derived: Derived, maker: Maker) -> Need:
    """The memory of a run: columns, records and JSON of tensors and of objects; a chunk's mask, and
    what encodes it.
    """
    tables = 1000 * len(derived.names) + 600 * derived.layout.chunks
    return Need(maker.need.tables + tables, maker.need.worker + OBJECT + (4 << 20))


def _disk_at_most(derived: Derived) -> int:
    layout = derived.layout
    return layout.total // 8 + layout.chunks * 4096 + len(derived.names) * 2 * 160


def _plan(derived: Derived) -> dict[str, Any]:
    """What decides whether earlier work can be used; sources are in ``made_by`` by digest."""
    digest = hashlib.sha256()
    for column in (derived.names, derived.dtypes, derived.shapes):
        digest.update(repr(column).encode("utf-8", "surrogatepass"))
    return {"ckdiff": __version__, "made_by": derived.made_by, "tensors": digest.hexdigest()}


def _write_tables(derived: Derived, collected: Collected, root: Path) -> bytes:
    """Write everything of the store but its masks; gives the manifest's bytes."""
    table = MaskTable(
        derived.names,
        derived.dtypes,
        derived.shapes,
        derived.layout.elements,
        derived.layout.starts,
        {derived.rule: collected.changed[:, 0]},
        base_hashes=derived.base_hashes,
        tuned_hashes=[UNKNOWN] * len(derived.names),
        resized=derived.resized,
    )
    return write_tables(
        root,
        table,
        derived.layout,
        masks=[derived.rule],
        rules=[derived.rule],
        objects=collected.objects,
        provenance={"made_by": derived.made_by},
    )
