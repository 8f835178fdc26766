"""A base and a stream of weight versions -> a new checkpoint, every digest held, in one pass."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import Given, fetch_all, open_all, open_in
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.checkpoints.views.canonical import NAME, with_files
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.deltas.filenames import names_fault
from ckdiff.deltas.outcome import ApplyResult
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor, fold_memory
from ckdiff.deltas.versions.form import read_marker, version_text
from ckdiff.deltas.versions.given import StreamPath, as_paths, asked_versions, given_versions
from ckdiff.deltas.versions.grouping import grouped as grouped  # also for those who import it here
from ckdiff.deltas.versions.reading import Chain, Version, opened
from ckdiff.deltas.vocabulary import vocabulary_note
from ckdiff.kernels.memory import Bytes, bytes_at
from ckdiff.options import (
    Observer,
    Options,
    asks_for_directory,
    checked_observer,
    checked_output,
)
from ckdiff.outputs.companions import Companions, Copying
from ckdiff.outputs.rebuilt import Rebuilt
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import PerThread, Stopped

# bytes that are folded at a time: what is written is still in the cache, which halves its time
_PART = 3 << 18
_OTHER_BASE = "give the checkpoint that the stream begins with, or fetch the version again"


@dataclass(slots=True)
class AppliedVersions(ApplyResult):
    """What was rebuilt from weight versions. ``to_dict()`` is what ``ckdiff apply --json`` prints.

    The same as for other deltas, and which versions were applied. It is never lossy.
    """

    version: int  #: the one that the output is
    seed: int | None  #: the full version that it was made from; None for the base
    versions: list[int]  #: the deltas that were applied, in their order

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return ApplyResult.to_dict(self) | {
            "version": version_text(self.version),
            "seed": None if self.seed is None else version_text(self.seed),
            "versions": [version_text(number) for number in self.versions],
        }


def apply_anew(
    base: Given,
    stream: StreamPath | Sequence[StreamPath],
    out: str | os.PathLike[str],
    *,
    target: int | None = None,
    base_version: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    config_from: str | os.PathLike[str] | None = None,
    config: bool = True,
    observer: Observer | None = None,
) -> AppliedVersions:
    """Write the checkpoint that ``stream`` leads to from ``base``, at ``target`` or the newest.

    ``stream`` is a stream's directory, or the directories of versions that follow each other.
    ``base`` is at ``base_version``: where that is not given, what its marker says, or 0. If the
    stream has a full version on the way, the newest one takes the place of the base. One pass, in
    bounded memory; the digest of each tensor after each version is held against what the version
    says, and nothing is kept unless all are right. The output is there whole or not at all.

    Raises DeltaError for a chain that does not lead there, damaged versions and another base,
    UsageError, CheckpointError, SourceChanged, BudgetError, OutputError and Interrupted.
    """
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer, copying = checked_observer(observer), Copying.checked(config_from, config)
    path, listed = checked_output(out), as_paths(stream)
    target, base_version = asked_versions(target, base_version)
    with ExitStack() as stack:
        room = Room(options.memory)
        versions = given_versions(listed, room)
        stack.callback(versions.close)
        (given,) = open_all(stack, base)
        chain = versions.chain(target, base_version=at_version(given, base_version))
        source = given if chain.seed is None else open_in(stack, chain.seed.path)
        opened(stack, room, chain, source.table)
        work = _Work(source, chain, path, options, room)
        directory = work.blueprint.directory or asks_for_directory(out)
        beside = copying.beside(source, directory=directory)
        files = work.files(beside, [Path(item) for item in listed], given, directory=directory)
        files.check()
        fetch_all([source])
        began = time.perf_counter()
        with interruptible("nothing was written"):
            work.run(files, observer)
        for note in work.notes(beside, given, said=copying.config_from is not None):
            observer.note(note)
    return _result(chain, files, len(work.blueprint.names), time.perf_counter() - began)


def at_version(base: Checkpoint, said: int | None) -> int:
    """At which version a base is; raises DeltaError for a marker that cannot be read."""
    if said is not None or base.directory is None:
        return said or 0
    return read_marker(base.directory) or 0


def _result(chain: Chain, files: Rebuilt, tensors: int, seconds: float) -> AppliedVersions:
    return AppliedVersions(
        out=files.out,
        deltas=len(chain.deltas),
        files=files.names,
        copied=files.copied,
        size=sum(plan.size for plan in files.files),
        tensors=tensors,
        lossy=False,
        seconds=seconds,
        version=chain.target,
        seed=None if chain.seed is None else chain.seed.number,
        versions=[version.number for version in chain.deltas],
    )


class _Work:
    """A checkpoint that is taken through a chain."""

    def __init__(
        self, source: Checkpoint, chain: Chain, out: Path, options: Options, room: Room
    ) -> None:
        self._counted = source
        self._source = with_files(source.as_stored())
        self._chain, self._out, self._options, self._room = chain, out, options, room
        self.blueprint = Blueprint.of_checkpoint(
            self._source, directory=source.directory is not None or not source.files
        )
        self._steps = self._versions_of()
        self._groups = list(grouped(self.blueprint.nbytes))
        readers = self._source.reader_memory(WINDOW)
        need = Need(tables=room.taken, worker=fold_memory(chain.deltas) + readers)
        self._workers = fit_workers(options.workers, len(self._groups), need, options.memory)

    def files(
        self, beside: Companions, inputs: list[Path], given: Checkpoint, *, directory: bool
    ) -> Rebuilt:
        """Where it is written to."""
        made = self.blueprint
        files = made.files
        names = [file.name for file in files]
        if directory and names_fault(names, None, directory=True) is not None:
            files = [replace(files[0], name=NAME)]  # what was one file may have any name
        return Rebuilt(
            self._out,
            files,
            index=made.index,
            directory=directory,
            overwrite=self._options.overwrite,
            companions=beside.files,
            apart=[self._source, given],
            inputs=inputs,
        )

    def notes(self, beside: Companions, given: Checkpoint, *, said: bool) -> list[str]:
        """What to say of what was copied ``beside``; ``said``: the user said from where."""
        more = None if said else vocabulary_note(beside, given.table, self.blueprint)
        return [*beside.notes, *filter(None, [more])]

    def run(self, files: Rebuilt, observer: Observer) -> None:
        """Fold all tensors into ``files``."""
        nbytes = self.blueprint.nbytes
        meter = Meter(observer, int(nbytes.sum()))
        with files:
            folder = Folder(self._out.parent, _OTHER_BASE)
            task = _FoldTask(self._source, self.blueprint, self._steps, self._groups, folder, files)

            def finished(group: int, _: None) -> None:
                meter.add(int(nbytes[slice(*self._groups[group])].sum()))

            run_chunks(
                range(len(self._groups)), task, workers=self._workers, done=finished, meter=meter
            )
            self._source.verify()
            for version in self._chain.deltas:
                version.verify()
            files.commit()

    def _versions_of(self) -> dict[int, list[Version]]:
        """For each tensor of the blueprint, by its position, the versions that change it.

        A file can hold tensors that an index does not name: they stay as they are.
        """
        counted = set(zip(*_places(self._counted), strict=True))
        plain = self._counted.in_files
        found: dict[int, list[Version]] = {}
        places = zip(self.blueprint.file.tolist(), self.blueprint.begin.tolist(), strict=True)
        for at, (name, place) in enumerate(zip(self.blueprint.names, places, strict=True)):
            if not plain or (name, *place) in counted:
                steps = [version for version in self._chain.deltas if name in version.frames]
                if steps:
                    found[at] = steps
        return found


def _places(checkpoint: Checkpoint) -> tuple[list[str], list[int], list[int]]:
    return checkpoint.table.names, checkpoint.file_index.tolist(), checkpoint.offset.tolist()


def filler(reader: SpanReader, tensor: int, stop: threading.Event) -> Callable[[int, Bytes], None]:
    """Copies windows of a tensor into buffers, as they are asked for in order."""

    def fill(start: int, into: Bytes) -> None:
        if stop.is_set():
            raise Stopped
        chosen = (np.array([value], np.int64) for value in (tensor, start, len(into)))
        address = int(reader.acquire(*chosen)[0])
        into[:] = bytes_at(address, len(into))
        reader.release()

    return fill


@dataclass(slots=True)
class _FoldTask:
    """The task of a group of tensors. Shared by the threads."""

    source: Checkpoint
    blueprint: Blueprint
    steps: dict[int, list[Version]]
    groups: Sequence[tuple[int, int]]
    folder: Folder
    files: Rebuilt
    _positions: list[int] = field(init=False)
    _buffers: PerThread[Buffers] = field(init=False)

    def __post_init__(self) -> None:
        self._buffers = PerThread(Buffers)
        table, made = self.source.table, self.blueprint
        where = zip(self.source.file_index.tolist(), self.source.offset.tolist(), table.names,
                    strict=True)  # fmt: skip
        known = {place: i for i, place in enumerate(where)}
        wanted = zip(made.file.tolist(), made.begin.tolist(), made.names, strict=True)
        self._positions = [known[place] for place in wanted]

    def __call__(self, chunk: int, stop: threading.Event) -> None:
        """See ChunkTask; a chunk is a group of tensors."""
        made = self.blueprint
        with closing(self.source.reader()) as reader:
            for at in range(*self.groups[chunk]):
                tensor = Tensor(
                    made.names[at],
                    int(made.nbytes[at]),
                    _PART,
                    filler(reader, self._positions[at], stop),
                    self.steps.get(at, []),
                )
                file, begin = int(made.file[at]), int(made.begin[at])
                for start, data in self.folder.fold(tensor, self._buffers()):
                    self.files.write(file, begin + start, data)
