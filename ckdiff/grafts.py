"""A checkpoint from two: the base, with the tuned elements wherever a mask has ones.

The masks may be another run's. Only tensors with ones are looked at in the tuned checkpoint; all
others are copied. The files are the base's: same names, same headers, same index.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff import budget
from ckdiff.blend import Blend
from ckdiff.budget import format_size
from ckdiff.checkpoints import Checkpoint, open_checkpoint
from ckdiff.checkpoints.local import LocalCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.errors import (
    BudgetError,
    CheckpointError,
    Interrupted,
    PairingError,
    StoreCorrupt,
    printable,
)
from ckdiff.layout import ALIGNMENT, Layout, Spans
from ckdiff.maskwalk import walk, working_memory
from ckdiff.matching import Matched, match
from ckdiff.naming import natural_key
from ckdiff.options import Observer, Options, Progress, checked_observer, checked_path
from ckdiff.rebuilt import FilePlan, Rebuilt
from ckdiff.rules import Rule
from ckdiff.runners import Amount, Stopped, run_threads
from ckdiff.store import MaskStore, open_store

if TYPE_CHECKING:
    from ckdiff.engine import CheckpointPath

_WINDOW = 1 << 22  # elements that are made addressable at a time, where nothing is blended
_AHEAD = 3  # windows asked of the disk before they are needed
_BUFFER = 4 << 20  # bytes that are written at a time


def graft(
    base: CheckpointPath,
    tuned: CheckpointPath,
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
    path = Path(os.path.abspath(checked_path("the output", out)))
    store = open_store(mask)
    digest = store.manifest_digest()
    with ExitStack() as stack:
        sides = []
        for given in (base, tuned):
            side = open_checkpoint(given)
            if side is not given:
                stack.callback(side.close)
            sides.append(side)
        source = sides[0]
        if not isinstance(source, LocalCheckpoint):
            raise CheckpointError(f"{printable(source.label)} has no files to be rebuilt")
        plan = _Plan(source, sides[1], match([store], rule, least=1))
        threads = _threads(plan, options)
        folder, index = source.folder is not None, source.index()
        assert source.index_name is not None or index is None
        rebuilt = Rebuilt(
            path,
            [FilePlan(f.name, source.head(i), f.size) for i, f in enumerate(source.files)],
            index=None if index is None else (source.index_name or "", index),
            directory=folder,
            overwrite=options.overwrite,
            apart=sides,
            stores=[store],
        )
        for note in plan.notes():
            observer.note(note)
        try:
            with rebuilt:
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
        except KeyboardInterrupt:
            raise Interrupted("interrupted", hint=rebuilt.stopped_hint) from None
        names = [file.name for file in source.files] + ([source.index_name] if index else [])
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


class _Plan:
    """Which tensors are blended and which copied, and where everything is."""

    def __init__(self, base: LocalCheckpoint, tuned: Checkpoint, matched: Matched) -> None:
        self.base, self.tuned, self.matched = base, tuned, matched
        in_base = {name: i for i, name in enumerate(base.table.names)}
        in_tuned = {name: i for i, name in enumerate(tuned.table.names)}
        shared = [
            name in in_base and base.table.shapes[in_base[name]] == shape
            for name, shape in zip(matched.names, matched.shapes, strict=True)
        ]
        #: positions of the blended tensors in the matched store
        self.rows: IntArray = np.flatnonzero(matched.changed[0])
        self._check(in_base, in_tuned, any(shared))
        chosen = [matched.names[i] for i in self.rows]
        #: positions of the blended tensors in the tables of both checkpoints
        self.base_index = np.array([in_base[name] for name in chosen], np.int64)
        self.tuned_index = np.array([in_tuned[name] for name in chosen], np.int64)
        bits_of = {name: dtype.bits for name, dtype in DTYPES.items()}
        self.all_bits = np.array([bits_of[name] for name in base.table.dtypes], np.int64)
        counts = base.table.nbytes * 8 // np.maximum(self.all_bits, 1)
        self.elements = int(counts.sum())
        copied = np.setdiff1d(np.arange(len(base.table)), self.base_index)
        # in the order of their bytes on the disk
        order = np.lexsort((base.offset[copied], base.file_index[copied]))
        self.copied: IntArray = copied[order]  #: positions in the base's table
        self.blending = Layout(counts[self.base_index])
        self.copying = Layout(counts[self.copied])
        held = {name for name, fits in zip(matched.names, shared, strict=True) if fits}
        #: tensors of the base about which the masks say nothing
        self.unmasked = sorted((n for n in in_base if n not in held), key=natural_key)
        self.left_out = sorted((n for n in in_tuned if n not in in_base), key=natural_key)
        self.bytes_to_read = int(base.table.nbytes.sum() + base.table.nbytes[self.base_index].sum())

    def notes(self) -> Iterator[str]:
        """What a user should know before the result is taken for more than it is."""
        if self.unmasked:
            yield (
                f"{len(self.unmasked):,} of the base's tensors are not in the mask store and stay "
                f"as they are: {_several(self.unmasked)}"
            )
        if self.left_out:
            yield (
                f"{len(self.left_out):,} of the tuned tensors are not in the base and are left "
                f"out: {_several(self.left_out)}"
            )

    def check_counts(self, found: IntArray) -> None:
        """Hold what was blended against the store's own counts; raises StoreCorrupt."""
        matched = self.matched
        wrong = np.flatnonzero(found[:, 0] != matched.changed[0][self.rows])
        if wrong.size:
            name = printable(matched.names[int(self.rows[wrong[0]])])
            raise StoreCorrupt(
                f"the {matched.rule} mask of {name} in {printable(str(matched.stores[0].path))} "
                "disagrees with its count"
            )

    def _check(self, in_base: dict[str, int], in_tuned: dict[str, int], shares: bool) -> None:
        """Raise PairingError for a mask with ones that cannot be followed."""
        matched, base, tuned = self.matched, self.base.table, self.tuned.table
        problems = []
        for row in self.rows.tolist():
            name, shape = matched.names[row], matched.shapes[row]
            i, j = in_base.get(name), in_tuned.get(name)
            for side, position, table in (("base", i, base), ("tuned", j, tuned)):
                if position is None:
                    problems.append(f"{side} lacks {printable(name)}")
                    break
                if table.shapes[position] != shape:
                    problems.append(
                        f"{printable(name)} is {list(table.shapes[position])} in {side} and "
                        f"{list(shape)} in the store"
                    )
                    break
            else:
                if i is not None and j is not None and base.dtypes[i] != tuned.dtypes[j]:
                    problems.append(
                        f"{printable(name)} is {base.dtypes[i]} in base and {tuned.dtypes[j]} in "
                        "tuned"
                    )
        if problems:
            more = f"; and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            raise PairingError(
                f"the mask does not fit: {problems[0]}{more}",
                hint="use a mask of this model, or leave those tensors out of it",
            )
        if not shares:
            raise PairingError(
                f"{printable(self.base.label)} and the mask store have no tensor in common",
                hint="use a mask of this model",
            )


def _several(names: list[str]) -> str:
    return printable(", ".join(names[:3])) + (" ..." if len(names) > 3 else "")


def _threads(plan: _Plan, options: Options) -> int:
    """How many workers there will be; raises BudgetError where the memory does not suffice."""
    tasks = plan.blending.chunks + plan.copying.chunks
    workers = max(1, min(options.workers or budget.usable_cores(), tasks))
    asked = options.memory
    memory = budget.default_memory(workers) if asked is None else budget.parse_size(asked)
    tensors = len(plan.base.table) + len(plan.tuned.table) + len(plan.matched.names)
    # the interpreter and libraries, and what compiling kernels adds; the tables
    fixed = 96 * budget.MIB + tensors * 1000
    each = working_memory(1) + _BUFFER + (2 << 20)
    needed = fixed + workers * each
    if needed > memory and asked is None:
        return max(1, min(workers, (memory - fixed) // each))
    if needed > memory:
        raise BudgetError(
            f"{format_size(memory)} of memory is too little: with {workers} "
            f"worker{'s' if workers > 1 else ''} this needs {format_size(needed)}",
            hint="raise --memory" + (" or lower --workers" if workers > 1 else ""),
        )
    return workers


def _run(plan: _Plan, rebuilt: Rebuilt, workers: int, observer: Observer) -> IntArray:
    """Write everything; gives for each blended tensor the elements taken, and those that differ."""
    from ckdiff.kernels import guard

    found = np.zeros((len(plan.rows), 2), np.int64)
    done, began = Amount(), time.perf_counter()

    def report() -> None:
        seconds = time.perf_counter() - began
        observer.progress(Progress(done.value, plan.bytes_to_read, seconds, 0))

    def add(chunk: int, counts: tuple[IntArray, IntArray]) -> None:
        rows, numbers = counts
        found[rows] += numbers  # each row once

    task = _Task(plan, rebuilt, done)
    guard.install()
    try:
        chunks = range(plan.blending.chunks + plan.copying.chunks)
        run_threads(chunks, task, workers=workers, done=add, tick=report)
    finally:
        guard.remove()
    report()
    return found


@dataclass(slots=True)
class _Side:
    """One checkpoint as a task reads it: spans of a layout become addresses."""

    reader: SpanReader
    index: IntArray  #: for each tensor of the layout its position in the checkpoint
    bits: IntArray  #: of one element, for each tensor of the layout

    def prefetch(self, spans: Spans) -> None:
        self.reader.prefetch(self.index[spans.tensors], *spans.byte_ranges(self.bits))

    def acquire(self, spans: Spans) -> IntArray:
        return self.reader.acquire(self.index[spans.tensors], *spans.byte_ranges(self.bits))


class _Task:
    """The chunk task: first the chunks that are blended, then those that are copied."""

    def __init__(self, plan: _Plan, rebuilt: Rebuilt, done: Amount) -> None:
        self._plan = plan
        self._rebuilt = rebuilt
        self._done = done
        self._blend_bits = plan.all_bits[plan.base_index]
        self._blends = {int(bits): Blend(int(bits)) for bits in np.unique(self._blend_bits)}

    def __call__(self, chunk: int, stop: threading.Event) -> tuple[IntArray, IntArray]:
        """See ChunkTask. Raises SourceChanged, CheckpointError, StoreCorrupt, OutputError."""
        plan = self._plan
        buffer = np.empty(_BUFFER, np.uint8)
        if chunk < plan.blending.chunks:
            return self._blended(chunk, buffer, stop)
        self._copy(chunk - plan.blending.chunks, buffer, stop)
        return np.empty(0, np.int64), np.empty((0, 2), np.int64)

    def _blended(self, chunk: int, buffer: Any, stop: threading.Event) -> tuple[IntArray, IntArray]:
        plan, layout = self._plan, self._plan.blending
        first, end = layout.chunk_range(chunk)
        rows = layout.spans(first, end).tensors
        counts = np.zeros((len(rows), 2), np.int64)
        with ExitStack() as stack:
            base, tuned = (
                _Side(stack.enter_context(closing(side.reader())), index, self._blend_bits)
                for side, index in ((plan.base, plan.base_index), (plan.tuned, plan.tuned_index))
            )
            ahead = _Ahead(layout, [base, tuned], first, end)
            starts = plan.matched.starts[:, plan.rows]
            for window in walk(layout, starts, plan.matched.sources(), first, end):
                spans = window.spans
                ahead.passed(int(spans.addresses[-1] + spans.elements[-1]))
                columns = (spans.tensors, spans.starts, spans.elements, base.acquire(spans),
                           tuned.acquire(spans), window.addresses[0])  # fmt: skip
                for tensor, start, elements, *addresses in zip(
                    *(column.tolist() for column in columns), strict=True
                ):
                    if stop.is_set():
                        raise Stopped
                    row = int(np.searchsorted(rows, tensor))
                    counts[row] += self._blend(tensor, start, elements, addresses, buffer)
                base.reader.release()
                tuned.reader.release()
        return rows, counts

    def _blend(
        self, tensor: int, start: int, elements: int, addresses: list[int], buffer: Any
    ) -> IntArray:
        """Blend a span and write it, a buffer at a time."""
        plan = self._plan
        bits = int(self._blend_bits[tensor])
        base, tuned, mask = addresses
        # whole bytes of mask, and whole bytes of elements that share them
        most = _BUFFER * 8 // bits // ALIGNMENT * ALIGNMENT
        counts = np.zeros(2, np.int64)
        for first in range(0, elements, most):
            count = min(most, elements - first)
            at, size = first * bits // 8, count * bits // 8
            counts += self._blends[bits](
                base + at, tuned + at, mask + first // 8, buffer.ctypes.data, count
            )
            self._write(int(plan.base_index[tensor]), start * bits // 8 + at, buffer[:size])
            self._done.add(2 * size)
        return counts

    def _copy(self, chunk: int, buffer: Any, stop: threading.Event) -> None:
        plan, layout = self._plan, self._plan.copying
        first, end = layout.chunk_range(chunk)
        with closing(plan.base.reader()) as reader:
            base = _Side(reader, plan.copied, plan.all_bits[plan.copied])
            ahead = _Ahead(layout, [base], first, end)
            for low in range(first, end, _WINDOW):
                if stop.is_set():
                    raise Stopped
                high = min(low + _WINDOW, end)
                ahead.passed(high)
                spans = layout.spans(low, high)
                columns = (spans.tensors, *spans.byte_ranges(base.bits), base.acquire(spans))
                for tensor, start, nbytes, address in zip(
                    *(column.tolist() for column in columns), strict=True
                ):
                    for at in range(0, nbytes, _BUFFER):
                        size = min(_BUFFER, nbytes - at)
                        # not from the mapping: the system would report a file that was cut as a
                        # failure to write
                        ctypes.memmove(buffer.ctypes.data, address + at, size)
                        self._write(int(plan.copied[tensor]), start + at, buffer[:size])
                        self._done.add(size)
                reader.release()

    def _write(self, position: int, offset: int, data: Any) -> None:
        """Write bytes of the base's tensor at ``position``."""
        base = self._plan.base
        file = int(base.file_index[position])
        self._rebuilt.write(file, int(base.offset[position]) + offset, data)


class _Ahead:
    """Asks the disk for what comes next, a few windows before it is needed."""

    def __init__(self, layout: Layout, sides: list[_Side], first: int, end: int) -> None:
        self._layout, self._sides, self._end = layout, sides, end
        self._asked = first
        self.passed(first)

    def passed(self, address: int) -> None:
        """Say that everything before ``address`` is being worked on."""
        until = min(address + _AHEAD * _WINDOW, self._end)
        if until <= self._asked:
            return
        spans = self._layout.spans(self._asked, until)
        self._asked = until
        for side in self._sides:
            side.prefetch(spans)
