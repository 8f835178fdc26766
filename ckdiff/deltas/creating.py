"""Two checkpoints -> a delta: one pass, in the order of the tuned side's files."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff._version import __version__
from ckdiff.checkpoints.opening import Given, fetch_all, open_all
from ckdiff.checkpoints.pairing import Unpaired
from ckdiff.checkpoints.pieces import lost, notes_of
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader
from ckdiff.deltas.bases import find_bases
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.change import Change, Coder, Encoding, Merger, Recorder, differing_elements
from ckdiff.deltas.container import Delta
from ckdiff.deltas.filenames import index_fault, names_fault
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.masking import Masking
from ckdiff.deltas.outcome import DeltaResult, allowed_workers
from ckdiff.deltas.parts import Tensors, UInt64
from ckdiff.deltas.ranges import Ranges, parts, resized, to_list
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.diffs.result import by_reason, details
from ckdiff.errors import CheckpointError, CkdiffError, UsageError, printable
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import Bytes, views
from ckdiff.layout import bits_of
from ckdiff.options import (
    Observer,
    Options,
    checked_observer,
    checked_output,
    checked_text,
)
from ckdiff.outputs.asstored import to_rebuild
from ckdiff.outputs.place import Place, write_errors
from ckdiff.rules import Rule
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import InOrder, PerThread, Stopped
from ckdiff.stores.maskstore import MaskStore

_AHEAD = 3  # groups for each worker that may be done before the oldest is written


def delta(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str],
    *,
    mask: str | os.PathLike[str] | MaskStore | None = None,
    rule: str | Rule | None = None,
    encoding: str = "packed",
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> DeltaResult:
    """Write everything that is needed to rebuild ``tuned`` from ``base``, bit for bit, to ``out``.

    One pass over both in bounded memory. Where the tuned side has no safetensors files, weights in
    memory or in files of another format, the rebuilt file is the ``model.safetensors`` that the
    library would write of them, in a directory if either side is one. With ``mask``, a mask store,
    only what it marks is taken from ``tuned``: the delta rebuilds the base with those elements of
    the tuned side, and says that it is lossy. ``encoding`` is ``packed`` (the smallest) or
    ``indices`` (safetensors with positions and values, for other tools). The output is there whole
    or not at all. Raises UsageError, CheckpointError, SourceChanged, BudgetError, StoreError,
    PairingError, OutputError and Interrupted.
    """
    ENCODINGS.check(checked_text("encoding", encoding))
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer = checked_observer(observer)
    path = checked_output(out)
    with ExitStack() as stack:
        if mask is None and rule is not None:
            raise UsageError("a rule chooses among the masks of a store", hint="give mask= too")
        sides = open_all(stack, base, tuned)
        work = Making(sides[0], sides[1], path, encoding, options, observer)
        if mask is not None:
            work.take_only(mask, rule)
        work.check()
        fetch_all(sides)
        work.began = time.perf_counter()  # a download takes what it takes
        with interruptible("nothing was written"):
            return work.run()


class Making:
    """A delta being made: planned on headers, then ``run``."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        out: Path,
        encoding: str,
        options: Options,
        observer: Observer,
    ) -> None:
        self._sources, directory = (base, tuned), tuned.directory is not None
        if not tuned.in_files:
            directory = directory or (not tuned.files and base.directory is not None)
        tuned = to_rebuild(tuned)
        self._base, self._tuned, self._out = base, tuned, out
        self._name, self._options, self._observer = encoding, options, observer
        self._encoding: Encoding = ENCODINGS[encoding]
        self.began = time.perf_counter()
        self._bases = find_bases(base.table, tuned.table)
        self._pairing = self._bases.pairing
        _check_names(tuned, directory)
        self.blueprint = Blueprint.of_checkpoint(tuned, directory=directory)
        # of a checkpoint that says more than its index does, older versions know nothing
        self._partial = index_fault(self.blueprint) is not None
        fault = index_fault(self.blueprint, partial=True)
        if fault is not None:
            raise _unwritable(tuned, fault)
        self._encoding.check_names(self.blueprint.names)
        self.merger: Merger | None = None
        self._left_out = self._bytes_read = 0
        self._new = np.zeros(len(self.blueprint.names), np.int64)
        self._based = self._bases.index
        self._ranges = Ranges(self.blueprint, self._based >= 0, self._bases.odd)
        self._windows = self.blueprint.windows()

    def take_only(self, mask: str | os.PathLike[str] | MaskStore, rule: str | Rule | None) -> None:
        """Take what a mask marks, and of rows that only the tuned side has all. Raises
        PairingError and StoreError.
        """
        shapes = list(self.blueprint.shapes)
        for at in np.flatnonzero(self._ranges.grown).tolist():
            inner = shapes[at][1:]
            shapes[at] = int(self._ranges.elements[at]) // max(math.prod(inner), 1), *inner
        self.merger = Masking(mask, rule, self._bases.seen, self.blueprint, shapes)

    def check(self) -> None:
        """Raise OutputError for what is in the way, and BudgetError, before anything is fetched."""
        self._place().check()
        self._workers()

    def run(self) -> DeltaResult:
        """Make it of both sides, which are here."""
        missing, paired = lost(self._tuned.table, "in the delta"), self._bases.note()
        for said in (*notes_of(self._sources), *missing, *([paired] if paired else [])):
            self._observer.note(said)
        with self._place() as place, write_errors(self._out):
            recorder = self._encoding.recorder(place.path, self.blueprint, self._windows)
            with closing(recorder):
                tensors = self._compare(recorder)
                if self.merger is not None:
                    self.merger.check()
                self._base.verify()
                self._tuned.verify()
                recorder.finish(self._manifest(tensors), tensors)
            size = place.path.stat().st_size
            place.commit()
        return self._result(tensors, size)

    def _place(self) -> Place:
        place = Place(
            self._out, directory=False, overwrite=self._options.overwrite, in_the_way=_foreign
        )
        inputs = [] if self.merger is None else self.merger.inputs
        place.keep_away_from(self._sources, inputs)
        return place

    def _workers(self) -> int:
        readers = sum(side.reader_memory(FRAME_BYTES) for side in (self._base, self._tuned))
        if self._ranges.grown.any():
            readers += 2 * FRAME_BYTES  # what zeros follow is copied
        return allowed_workers(self._options, len(self._windows.groups), readers=readers)

    def _compare(self, recorder: Recorder) -> Tensors:
        tensors = Tensors.empty(len(self.blueprint.names))
        tensors.based[:] = self._based >= 0
        windows, groups = self._windows, self._windows.groups
        workers = self._workers()
        order = InOrder[list[_Window]](_AHEAD * workers)
        task = _GroupTask(
            self._base, self._tuned, self._based, self._ranges, self.blueprint, windows,
            recorder.coder, order.wait, self.merger, workers,
        )  # fmt: skip
        sides = windows.size + windows.within(self._ranges.nbytes)
        self._bytes_read = int(sides.sum())
        meter = Meter(self._observer, self._bytes_read)

        def finished(group: int, result: list[_Window]) -> None:
            for number, found in order.put(group, result):
                first, stop = groups[number]
                for window, one in zip(range(first, stop), found, strict=True):
                    at = int(windows.tensor[window])
                    recorder.add(window, one.change)
                    tensors.base_hashes[at] += one.sums[0]
                    tensors.tuned_hashes[at] += one.sums[1]
                    tensors.changed[at] += one.change.changed
                    self._left_out += one.left_out
                    self._new[at] += one.new
                meter.add(int(sides[first:stop].sum()))

        run_chunks(range(len(groups)), task, workers=workers, done=finished, meter=meter)
        return tensors

    def _manifest(self, tensors: Tensors) -> dict[str, Any]:
        odd = {at: replace(found, new=int(self._new[at])) for at, found in self._bases.odd.items()}
        newer = odd or self._partial
        listed = {"ranges": to_list(odd, self.blueprint.names)} if newer else {}
        return listed | {
            "encoding": self._name,
            "ckdiff": __version__,
            "lossy": None if self.merger is None else self.merger.to_dict(self._left_out),
            "base": {"files": [[file.name, file.size] for file in self._base.files]},
            "unpaired": _listed(self._pairing.unpaired),
            "elements": self._elements(),
            "changed": self._changed(tensors),
        }

    def _elements(self) -> int:
        """Those that have something in the base."""
        return int(self._ranges.elements.sum())

    def _changed(self, tensors: Tensors) -> int:
        """Of these."""
        return int(tensors.changed[tensors.based].sum() - self._new.sum())

    def _result(self, tensors: Tensors, size: int) -> DeltaResult:
        return DeltaResult(
            out=self._out,
            encoding=self._name,
            size=size,
            rebuilt_size=sum(plan.size for plan in self.blueprint.files),
            bytes_read=self._bytes_read,
            tensors=len(self.blueprint.names),
            paired=len(self._pairing),
            elements=self._elements(),
            changed=self._changed(tensors),
            resized=resized(self._bases.odd, self.blueprint),
            parts=parts(self._bases.odd, self.blueprint),
            unpaired=by_reason(self._pairing.unpaired),
            lossy=None if self.merger is None else self.merger.to_dict(self._left_out),
            seconds=time.perf_counter() - self.began,
        )


def _listed(unpaired: Sequence[Unpaired]) -> list[dict[str, Any]]:
    """As the manifest has them: what a base's index has and no file is as if it were nowhere."""
    found = []
    for item in details(unpaired):
        if item["reason"] == "missing":
            item["reason"] = "added" if "tuned_dtype" in item else "removed"
        if len(item) > 2:
            found.append(item)
    return found


def _check_names(tuned: Checkpoint, directory: bool) -> None:
    """Raise CheckpointError for files that ``apply`` would not write."""
    names = [file.name for file in tuned.files]
    fault = names_fault(names, tuned.index_name, directory=directory)
    if fault is not None:
        raise _unwritable(tuned, fault)


def _unwritable(tuned: Checkpoint, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(tuned.label)} cannot be rebuilt by a delta: {printable(fault)}",
        hint="save the checkpoint again, with names that safetensors files can have",
    )


def _foreign(out: Path) -> str | None:
    """What a delta must not replace: a file that is none, or none that is understood here."""
    try:
        Delta(str(out)).close()
    except CkdiffError:
        return "is not a delta"
    return None


@dataclass(slots=True)
class _Window:
    """A window's change, and what it adds to the hashes of its tensor."""

    change: Change
    sums: UInt64  #: (base and tuned, low and high)
    left_out: int  #: changed elements that the mask does not mark
    new: int  #: changed elements that have nothing in the base


@dataclass(slots=True)
class _GroupTask:
    """The task of a group of windows. Shared by the threads."""

    base: Checkpoint
    tuned: Checkpoint
    based: IntArray  #: for each tuned tensor its position in the base's table, or -1
    ranges: Ranges
    blueprint: Blueprint
    windows: Windows
    coder: Callable[[], Coder]
    wait: Callable[[int, threading.Event], None]
    merger: Merger | None
    workers: int
    _hasher: ContentHasher = field(default_factory=ContentHasher)
    _bits: IntArray = field(init=False)
    _coder: PerThread[Coder] = field(init=False)
    _buffers: PerThread[npt.NDArray[np.uint8]] = field(init=False)

    def __post_init__(self) -> None:
        self._bits = bits_of(self.blueprint.dtypes)
        self._coder = PerThread(self.coder)
        self._buffers = PerThread(lambda: np.empty((2, FRAME_BYTES), np.uint8))

    def __call__(self, chunk: int, stop: threading.Event) -> list[_Window]:
        """See ChunkTask; a chunk is a group of windows."""
        self.wait(chunk, stop)
        with ExitStack() as stack:
            readers = [stack.enter_context(closing(c.reader())) for c in (self.base, self.tuned)]
            coming = chunk + self.workers
            if coming < len(self.windows.groups):
                for reader, chosen in self._read(coming, readers):
                    reader.prefetch(*chosen)
            held = [
                views(reader.acquire(*chosen), chosen[2])
                for reader, chosen in self._read(chunk, readers)
            ]
            if stop.is_set():
                raise Stopped
            found = self._compare(chunk, *held)
            for reader in readers:
                reader.release()
        return found

    def _read(
        self, group: int, readers: Sequence[SpanReader]
    ) -> list[tuple[SpanReader, tuple[IntArray, IntArray, IntArray]]]:
        """What to read of each side."""
        window = np.arange(*self.windows.groups[group])
        tensor = self.windows.tensor[window]
        start, size = self.windows.start, self.windows.size
        held = self.windows.within(self.ranges.nbytes)[window]
        there, sizes = window[held > 0], held[held > 0]
        of = self.windows.tensor[there]
        base = self.based[of], self.ranges.begin[of] + start[there], sizes
        return [(readers[0], base), (readers[1], (tensor, start[window], size[window]))]

    def _compare(self, group: int, base: list[Bytes], tuned: list[Bytes]) -> list[_Window]:
        found, bases = [], iter(base)
        first, stop = self.windows.groups[group]
        for window, there in zip(range(first, stop), tuned, strict=True):
            at, start = int(self.windows.tensor[window]), int(self.windows.start[window])
            if self.based[at] < 0:
                change = self._coder().whole(self.blueprint.dtypes[at], there)
                found.append(_Window(change, np.zeros((2, 2), np.uint64), 0, 0))
                self._hasher.add(found[-1].sums[1], there, start, int(self._bits[at]))
                continue
            here = next(bases) if start < self.ranges.nbytes[at] else there[:0]
            if len(here) < len(there):
                found.append(self._beyond(at, here, there, start))
            else:
                found.append(self._within(at, here, there, start))
        return found

    def _within(self, at: int, here: Bytes, there: Bytes, start: int) -> _Window:
        """A window of which the base has all."""
        sums, left_out, bits = np.zeros((2, 2), np.uint64), 0, int(self._bits[at])
        if self.merger is not None:
            there, left_out = self.merger.merge(at, here, there, start)
        change = self._coder().changes(self.blueprint.dtypes[at], here, there)
        self._hasher.add(sums[0], here, start, bits)
        if change.changed:
            self._hasher.add(sums[1], there, start, bits)
        else:
            sums[1] = sums[0]
        return _Window(change, sums, left_out, 0)

    def _beyond(self, at: int, here: Bytes, there: Bytes, start: int) -> _Window:
        """A window of which the base has the first bytes only, or none: zeros follow them."""
        sums, left_out, bits = np.zeros((2, 2), np.uint64), 0, int(self._bits[at])
        dtype, count = self.blueprint.dtypes[at], len(here)
        base, tuned = (buffer[: len(there)] for buffer in self._buffers())
        base[:count], base[count:] = here, 0
        self._hasher.add(sums[0], base[:count], start, bits)
        if self.merger is not None and count:
            merged, left_out = self.merger.merge(at, base[:count], there[:count], start)
            tuned[:count], tuned[count:] = merged, there[count:]
            there = tuned
        change = self._coder().changes(dtype, base, there)
        new = differing_elements(dtype, base[count:], there[count:])
        self._hasher.add(sums[1], there, start, bits)
        return _Window(change, sums, left_out, new)
