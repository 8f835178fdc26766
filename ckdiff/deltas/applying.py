"""A base and a delta, or a chain of them -> the tuned checkpoint, bit for bit, in one pass."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ckdiff.checkpoints.opening import fetch_all, open_all
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader
from ckdiff.deltas.change import Bytes, Patcher, differing_elements
from ckdiff.deltas.container import Delta
from ckdiff.deltas.filenames import names_fault
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.links import Links
from ckdiff.deltas.outcome import ApplyResult, allowed_workers
from ckdiff.deltas.parts import UInt64
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.room import Room
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.vocabulary import vocabulary_note
from ckdiff.errors import UsageError
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.delta import PIECE, Ready, no_one
from ckdiff.kernels.memory import views
from ckdiff.layout import bits_of
from ckdiff.options import (
    Observer,
    Options,
    asks_for_directory,
    checked_observer,
    checked_output,
    checked_path,
)
from ckdiff.outputs.companions import Companions, Copying
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import PerThread, Stopped

_ALONE = "model.safetensors"  # what loaders look for

DeltaPath = str | os.PathLike[str]


def apply(
    base: str | os.PathLike[str] | Checkpoint,
    deltas: DeltaPath | Sequence[DeltaPath],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    config_from: str | os.PathLike[str] | None = None,
    config: bool = True,
    observer: Observer | None = None,
) -> ApplyResult:
    """Rebuild the checkpoint that ``deltas`` lead to from ``base``, one after the other.

    One pass, in bounded memory. What the base holds and what comes out are hashed on the way, and
    nothing is kept unless both are what the deltas say. The files are the tuned side's to the last
    byte. Config and tokenizer files are not part of a delta: a directory gets copies of the base's,
    or of those in ``config_from``, unless ``config`` is False.

    Raises DeltaError for a damaged delta and for another base, UsageError, CheckpointError,
    SourceChanged, BudgetError, OutputError and Interrupted.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer, copying = checked_observer(observer), Copying.checked(config_from, config)
    listed = [deltas] if isinstance(deltas, (str, os.PathLike)) else list(deltas)
    if not listed:
        raise UsageError("there is no delta to apply", hint="give one or more, in order")
    path = checked_output(out)
    with ExitStack() as stack:
        allowed_workers(options, 1)
        room = Room(options.memory)
        chain = [stack.enter_context(Delta(checked_path("a delta", item), room)) for item in listed]
        (opened,) = open_all(stack, base)
        links, last = Links(opened, chain), chain[-1].blueprint
        groups, readers = len(chain[-1].windows.groups), opened.reader_memory(FRAME_BYTES)
        workers = allowed_workers(options, groups, room.taken, readers=readers)
        directory = last.directory or asks_for_directory(out)
        beside = copying.beside(opened, directory=directory)
        files = _rebuilt(links, path, beside, overwrite=options.overwrite, directory=directory)
        files.check()
        fetch_all([opened])
        began = time.perf_counter()
        with interruptible("nothing was written"):
            rebuild(links, files, workers, observer)
        said = None if copying.config_from else vocabulary_note(beside, opened.table, last)
        for note in (*beside.notes, *filter(None, [said])):
            observer.note(note)
    return _result(chain, files, time.perf_counter() - began)


def _result(chain: list[Delta], files: Rebuilt, seconds: float) -> ApplyResult:
    last = chain[-1].blueprint
    return ApplyResult(
        out=files.out,
        deltas=len(chain),
        files=files.names[: len(last.files)],
        copied=files.copied,
        size=sum(plan.size for plan in last.files),
        tensors=len(last.names),
        lossy=any(delta.manifest["lossy"] is not None for delta in chain),
        seconds=seconds,
    )


def _rebuilt(
    links: Links, out: Path, beside: Companions, *, overwrite: bool, directory: bool
) -> Rebuilt:
    """The files that the last delta leads to, at ``out``, in a directory or as the one file."""
    last = links.chain[-1].blueprint
    files = last.files
    if directory and names_fault([file.name for file in files], None, directory=True) is not None:
        files = [replace(files[0], name=_ALONE)]  # what was one file may have any name
    return Rebuilt(
        out,
        files,
        index=last.index,
        directory=directory,
        overwrite=overwrite,
        companions=beside.files,
        apart=[links.base],
        inputs=[Path(delta.path) for delta in links.chain],
    )


class Target(Protocol):
    """Where rebuilt tensors go. A context manager: what was not committed is nowhere."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> None: ...

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Take bytes of a file, which are at ``offset`` in it. Any thread may call it."""

    def commit(self) -> None:
        """All was written, and is right."""


def rebuild(links: Links, files: Target, workers: int, observer: Observer) -> None:
    """Make all tensors of what the chain leads to, and hold them against what it says."""
    base, chain = links.base, links.chain
    blueprint, groups = chain[-1].blueprint, chain[-1].windows.groups
    meter = Meter(observer, int(blueprint.nbytes.sum()))
    base_sums, out_sums = np.zeros((2, len(blueprint.names), 2), np.uint64)
    changed = np.zeros((len(blueprint.names), len(chain), 2), np.int64)

    def finished(group: int, found: tuple[UInt64, IntArray]) -> None:
        first, stop = groups[group]
        tensor = chain[-1].windows.tensor[first:stop]
        np.add.at(base_sums, tensor, found[0][:, 0])
        np.add.at(out_sums, tensor, found[0][:, 1])
        np.add.at(changed, tensor, found[1])
        meter.add(int(chain[-1].windows.size[first:stop].sum()))

    with files:
        order = _in_turn(chain[-1])
        coming = np.full(len(order), -1, np.int64)
        coming[order[: max(0, len(order) - workers)]] = order[workers:]
        task = ApplyTask(base, chain, links, files, coming)
        run_chunks(order, task, workers=workers, done=finished, meter=meter)
        links.check_sums(base_sums, out_sums)
        links.check_counts(changed)
        base.verify()
        for delta in chain:
            delta.check()
        files.commit()


def _in_turn(delta: Delta) -> list[int]:
    """The groups, those of different files in turn: two writers of one file wait for each other."""
    windows = delta.windows
    file = delta.blueprint.file[windows.tensor[[first for first, _ in windows.groups]]]
    order = np.argsort(file, kind="stable")
    starts = np.searchsorted(file[order], file[order])
    turn = np.empty(len(file), np.int64)
    turn[order] = np.arange(len(file)) - starts  # position among the groups of its file
    found: list[int] = np.lexsort((file, turn)).tolist()
    return found


@dataclass(slots=True)
class ApplyTask:
    """The task of a group of windows of the rebuilt checkpoint; gives hash sums and counts.

    They are (windows, base and result, low and high), and the elements that each delta changed,
    and those of them that have nothing before it, (windows, deltas, 2). Shared by the threads.
    """

    base: Checkpoint
    chain: list[Delta]
    links: Links
    files: Target
    #: the group that whoever is done with one will most likely be at next, or -1
    coming: IntArray
    _hasher: ContentHasher = field(default_factory=ContentHasher)
    _bits: IntArray = field(init=False)
    _tools: PerThread[tuple[list[Bytes], list[Patcher]]] = field(init=False)

    def __post_init__(self) -> None:
        self._bits = bits_of(self.chain[-1].blueprint.dtypes)
        self._tools = PerThread(self._made_tools)

    def __call__(self, chunk: int, stop: threading.Event) -> tuple[UInt64, IntArray]:
        """See ChunkTask; a chunk is a group of windows."""
        first, after = self.chain[-1].windows.groups[chunk]
        sums = np.zeros((after - first, 2, 2), np.uint64)
        changed = np.zeros((after - first, len(self.chain), 2), np.int64)
        windows, group = self.chain[-1].windows, np.arange(first, after)
        with closing(self.base.reader()) as reader:
            if self.coming[chunk] >= 0:
                coming = np.arange(*windows.groups[int(self.coming[chunk])])
                reader.prefetch(*self.links.to_read(coming)[1:])
            # of rows that go later more is read than comes out: then not all of a group at a time
            at_once = int(self.links.to_read(group)[3].sum()) <= FRAME_BYTES
            for some in [group] if at_once else group.reshape(-1, 1):
                wanted, *chosen = self.links.to_read(some)
                found = views(reader.acquire(*chosen), chosen[2])
                held = dict(zip(wanted.tolist(), found, strict=True))
                for window in some.tolist():
                    if stop.is_set():
                        raise Stopped
                    into = sums[window - first], changed[window - first]
                    self._rebuild(window, held.get(window), into, reader)
                reader.release()
        return sums, changed

    def _rebuild(
        self, window: int, here: Bytes | None, into: tuple[UInt64, IntArray], reader: SpanReader
    ) -> None:
        """Make a window, add to its hashes, and write it. ``here`` is the base's, if it has one.

        It is hashed and written a piece at a time, while that is in the cache: that halves the time
        of writing. What is written counts for nothing unless all of it is right.
        """
        sums, counts = into
        windows, blueprint = self.chain[-1].windows, self.chain[-1].blueprint
        tensor, start = int(windows.tensor[window]), int(windows.start[window])
        bits, file = int(self._bits[tensor]), int(blueprint.file[tensor])
        size, done = int(windows.size[window]), 0
        apart = here is None or len(self.chain) > 1 or len(here) != size
        if here is not None and apart:
            self._hasher.add(sums[0], here, start, bits)

        def take(at: int, piece: Bytes, *, changed: bool = True) -> None:
            nonlocal done
            if here is not None and not apart:
                self._hasher.add(sums[0], here[at : at + len(piece)], start + at, bits)
            if changed:
                self._hasher.add(sums[1], piece, start + at, bits)
            self.files.write(file, int(blueprint.begin[tensor]) + start + at, piece.data)
            done = at + len(piece)

        found = self._through_chain(window, here, counts, (reader, take))
        for at in range(done, size, PIECE):
            piece = found[at : at + PIECE]
            if found is here:
                # not from the mapping: a file that was cut would look like a failure to write
                piece = self._tools()[0][0][: len(piece)]
                piece[:] = here[at : at + len(piece)]
            take(at, piece, changed=found is not here)
        if found is here:
            sums[1] = sums[0]

    def _through_chain(
        self, window: int, here: Bytes | None, counts: IntArray, others: tuple[SpanReader, Ready]
    ) -> Bytes:
        """The window after all deltas: one of the buffers, or ``here`` where nothing changed.

        ``others`` are the reader that holds ``here``, and who may be told of pieces of the result.
        """
        reader, take = others
        buffers, patchers = self._tools()
        windows, target = self.chain[-1].windows, 0  # which buffer is free
        tensor, start = int(windows.tensor[window]), int(windows.start[window])
        number = window - int(windows.first[tensor])
        for k in range(self.links.first(tensor, start), len(self.chain)):
            delta = self.chain[k]
            at = int(self.links.position[k, tensor])
            mine = int(delta.windows.first[at]) + number
            out = buffers[target][: int(delta.windows.size[mine])]
            try:
                if not delta.tensors.based[at]:
                    patchers[k].whole(delta, mine, out)
                else:
                    there = self._base_of((k, at), start, here, buffers[1 - target][: len(out)])
                    ready = take if k == len(self.chain) - 1 else no_one
                    changed = patchers[k].changes(delta, mine, there, out, ready=ready)
                    held = int(delta.ranges.nbytes[at]) - start
                    counts[k, 0] = changed
                    if changed and held < len(out):
                        rest, dtype = slice(max(0, held), None), delta.blueprint.dtypes[at]
                        counts[k, 1] = differing_elements(dtype, there[rest], out[rest])
                    if not changed:
                        here = there
                        continue
            except Damaged as error:
                # its digest was right, so it is as it was written
                if k == 0 and delta.tensors.based[at] and not self._is_base(tensor, reader):
                    raise self.links.other_base(delta.blueprint.names[at]) from None
                raise delta.damaged(str(error)) from None
            here, target = out, 1 - target
        assert here is not None, "a tensor without a base is whole in some delta"
        return here

    def _base_of(self, of: tuple[int, int], start: int, here: Bytes | None, into: Bytes) -> Bytes:
        """What a window of a delta's tensor, ``of``, is made from: as many bytes as ``into`` has,
        which is where they are put if ``here`` has others. Zeros follow what it has.
        """
        k, at = of
        count = min(max(0, int(self.chain[k].ranges.nbytes[at]) - start), len(into))
        if here is not None and len(here) == count == len(into):
            return here
        if here is not None and count and not np.may_share_memory(here, into):
            into[:count] = here[:count]
        into[count:] = 0
        return into

    def _is_base(self, tensor: int, reader: SpanReader) -> bool:
        """Whether the base's tensor is the one that the first delta was made from.

        What ``reader`` holds is given back for it: nobody looks at it any more.
        """
        sums, bits = np.zeros(2, np.uint64), int(self._bits[tensor])
        reader.release()
        for start, chosen in self.links.of_base(tensor):
            (found,) = views(reader.acquire(*chosen), chosen[2])
            self._hasher.add(sums, found, start, bits)
            reader.release()
        at = self.links.position[0, tensor]
        return bool((sums == self.chain[0].tensors.base_hashes[at]).all())

    def _made_tools(self) -> tuple[list[Bytes], list[Patcher]]:
        names = [delta.encoding for delta in self.chain]
        made: dict[str, Patcher] = {name: ENCODINGS[name].patcher() for name in set(names)}
        buffers = [np.empty(FRAME_BYTES, np.uint8) for _ in range(2)]
        return buffers, [made[name] for name in names]
