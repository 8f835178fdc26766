"""Several weight versions as one: what they do to a checkpoint together, found without it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckdiff.checkpoints.opening import Given
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.encoding import TOOLS_MEMORY, Tools, encoder
from ckdiff.deltas.versions.following import follow
from ckdiff.deltas.versions.form import (
    CHECKSUMS,
    PACKED,
    Said,
    check_encoding,
    version_name,
    version_number,
    version_text,
)
from ckdiff.deltas.versions.merging import MERGE_MEMORY, Merger
from ckdiff.deltas.versions.reading import Version, WeightStream
from ckdiff.deltas.versions.shards import Shards
from ckdiff.deltas.versions.spool import Spool
from ckdiff.deltas.versions.writing import MadeFolder, write_version
from ckdiff.errors import DeltaError, UsageError
from ckdiff.naming import natural_key
from ckdiff.options import (
    Observer,
    Options,
    checked_int,
    checked_observer,
    checked_output,
    checked_path,
)
from ckdiff.outputs.place import Place, write_errors
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import ChunkTask, InOrder, PerThread, Stopped

_WITH_BASE = "give the checkpoint that the first of them is made from: --base CHECKPOINT"
_AHEAD = 4  # tensors for each worker that may be done before the oldest is written


@dataclass(slots=True)
class Squashed:
    """What was written. ``to_dict()`` is what ``ckdiff squash --json`` prints."""

    path: Path  #: of the version
    version: int
    base_version: int
    versions: list[int]  #: that it takes the place of
    encoding: str
    tensors: int
    changed_bytes: int  #: that it changes, or with ``overwrite`` writes
    bytes: int  #: of its files
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": str(self.path),
            "version": version_text(self.version),
            "base_version": version_text(self.base_version),
            "versions": list(map(version_text, self.versions)),
            "encoding": self.encoding,
            "tensors": self.tensors,
            "changed_bytes": self.changed_bytes,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


def squash(
    stream: str | os.PathLike[str],
    first: int,
    last: int,
    out: str | os.PathLike[str],
    *,
    base: Given | None = None,
    encoding: str | None = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> Squashed:
    """Merge versions ``first`` to ``last`` of a stream into one delta.

    The result is version ``last``, made from what ``first`` is made from. ``out`` is the directory
    of a stream, or the directory of the version itself, called ``weight_v`` and its number. Without
    ``base`` all versions must be deltas of one encoding. With ``base``, the checkpoint that
    ``first`` is made from, they may have any encoding; the result has ``encoding``, or that of
    ``last``. The resulting checkpoint needs room beside ``out`` meanwhile, and ``out`` must be a
    stream's directory. Memory is bounded, and the output appears only when it is complete.

    Raises DeltaError for versions that do not follow each other or cannot be merged, and for a
    wrong base, UsageError, CheckpointError, SourceChanged, BudgetError, OutputError, Interrupted.
    """
    options, observer = Options(workers=workers, memory=memory), checked_observer(observer)
    where, path = checked_path("a stream", stream), checked_output(out)
    first, last = checked_int("first", first), checked_int("last", last)
    if first > last:
        raise UsageError(f"version {first} is after version {last}", hint="the older one first")
    with ExitStack() as stack:
        room = Room(options.memory)
        versions = stack.enter_context(WeightStream(where, room))
        chain = _chain(versions, first, last)
        if base is not None:
            return _by_way_of(base, chain, path, encoding, options, observer)
        said = _said(chain, encoding)
        for version in chain:
            version.open(room)
            version.check()
        if version_number(path.name) is None:
            follow(str(path), last, None, room)
            stack.enter_context(MadeFolder(path))
            path /= version_name(last)
        elif path.name != version_name(last):
            raise UsageError(f"the result is version {last}", hint=f"call it {version_name(last)}")
        work = _Squashing(chain, said, path, options, room)
        with interruptible("nothing was written"):
            return work.run(observer)


def _chain(stream: WeightStream, first: int, last: int) -> list[Version]:
    """The deltas from ``first`` to ``last``. Raises DeltaError."""
    found: list[Version] = []
    number = last
    while number >= first:
        version = stream.version(number)
        if version.said is None:
            raise version.fault(
                "is a full version, and contains everything before it",
                f"begin with {version_name(number + 1)}, or end before it",
            )
        found.insert(0, version)
        if number == first:
            return found
        number = version.said.base_version
    raise found[0].fault(
        f"is made from version {number}, so version {first} is not on the way",
        "give versions that follow each other",
    )


def _by_way_of(
    base: Given, chain: list[Version], out: Path, encoding: str | None, options: Options,
    observer: Observer,
) -> Squashed:  # fmt: skip
    """The same by way of the checkpoint that they lead to, which is verified, and removed again."""
    first, last = chain[0].said, chain[-1].said
    assert first is not None
    assert last is not None
    if version_number(out.name) is not None:
        raise UsageError("with a base, the result goes into a stream", hint="give its directory")
    workers, memory = options.workers, options.memory
    encoding = last.encoding if encoding is None else encoding
    check_encoding(encoding)
    with Place(out.with_name(f"{out.name}.rebuilt"), directory=True, overwrite=False) as place:
        tuned = place.path / "tuned"
        apply_anew(
            base, [version.path for version in chain], tuned, base_version=first.base_version,
            workers=workers, memory=memory, config=False,
        )  # fmt: skip
        made = write_version(
            base, tuned, out, encoding=encoding,
            checksum=last.checksum if last.checksum in CHECKSUMS else CHECKSUMS[0],
            number=last.version, base_version=first.base_version, workers=workers, memory=memory,
            observer=observer,
        )  # fmt: skip
    return Squashed(
        path=made.path,
        version=made.version,
        base_version=first.base_version,
        versions=[version.number for version in chain],
        encoding=encoding,
        tensors=made.tensors,
        changed_bytes=made.changed_bytes,
        bytes=made.bytes,
        seconds=made.seconds,
    )


def _said(chain: Sequence[Version], encoding: str | None) -> Said:
    """What the result says of itself. Raises DeltaError where versions do not go together."""
    ends = chain[0].said, chain[-1].said
    assert ends[0] is not None
    assert ends[1] is not None
    for version in chain:
        said = version.said
        assert said is not None
        if said.encoding == PACKED:
            raise version.fault(
                "is packed, and packed versions can only be joined together with the base",
                _WITH_BASE,
            )
        for what, mine, others in (
            ("encoding", said.encoding, ends[1].encoding),
            ("checksum", said.checksum, ends[1].checksum),
        ):
            if mine != others:
                raise DeltaError(
                    f"{version.shown} has the {what} {mine}, and {chain[-1].shown} {others}",
                    hint=_WITH_BASE,
                )
    if encoding not in (None, ends[1].encoding):
        raise UsageError(
            f"without a base, versions of {ends[1].encoding} become one of {ends[1].encoding}",
            hint=_WITH_BASE,
        )
    return Said(ends[1].version, ends[0].base_version, ends[1].encoding, ends[1].checksum)


@dataclass(slots=True)
class _Made:
    """The frame of a tensor, or None where the versions come to nothing."""

    frame: Spool | None
    changed: int


@dataclass(slots=True)
class _Squashing:
    """A chain being put together."""

    chain: list[Version]
    said: Said
    out: Path
    options: Options
    room: Room
    _tensors: list[str] = field(init=False)
    _tools: PerThread[tuple[Tools, Merger]] = field(init=False)

    def __post_init__(self) -> None:
        names = {name for version in self.chain for name in version.frames}
        self._tensors = sorted(names, key=natural_key)
        self._tools = PerThread(lambda: (Tools(), Merger(self.out.parent)))

    def run(self, observer: Observer) -> Squashed:
        """Write it."""
        began = time.perf_counter()
        place = Place(self.out, directory=True, overwrite=False)
        need = Need(self.room.taken, TOOLS_MEMORY + MERGE_MEMORY)
        workers = fit_workers(self.options.workers, len(self._tensors), need, self.options.memory)
        with place, write_errors(self.out):
            with closing(Shards(place.path)) as files:
                tensors, changed = self._merge(files, place.path, workers, observer)
                for version in self.chain:
                    version.verify()
                files.finish(self.said)
            size = sum(entry.stat().st_size for entry in os.scandir(place.path))
            place.commit()
        return Squashed(
            path=self.out,
            version=self.said.version,
            base_version=self.said.base_version,
            versions=[version.number for version in self.chain],
            encoding=self.said.encoding,
            tensors=tensors,
            changed_bytes=changed,
            bytes=size,
            seconds=time.perf_counter() - began,
        )

    def _merge(
        self, files: Shards, folder: Path, workers: int, observer: Observer
    ) -> tuple[int, int]:
        """Write all frames; how many tensors and bytes they change."""
        order = InOrder[_Made](_AHEAD * workers)
        task = self._task(order, folder)
        sizes = [sum(v.frames[t].size for v in self._steps(t)) for t in self._tensors]
        meter = Meter(observer, sum(sizes))
        totals = [0, 0]

        def finished(chunk: int, result: _Made) -> None:
            for at, made in order.put(chunk, result):
                if made.frame is not None:
                    tensor = self._tensors[at]
                    digest = self._steps(tensor)[-1].frames[tensor].digest
                    files.add(tensor, digest, made.frame.size, made.frame.parts())
                    made.frame.close()
                    totals[0] += 1
                    totals[1] += made.changed
                meter.add(sizes[at])

        run_chunks(range(len(sizes)), task, workers=workers, done=finished, meter=meter)
        return totals[0], totals[1]

    def _steps(self, tensor: str) -> list[Version]:
        return [version for version in self.chain if tensor in version.frames]

    def _task(self, order: InOrder[_Made], folder: Path) -> ChunkTask[_Made]:
        def merge(chunk: int, stop: threading.Event) -> _Made:
            order.wait(chunk, stop)
            tensor = self._tensors[chunk]
            tools, merger = self._tools()
            spool, changed = Spool(folder), 0
            with closing(merger.merged(tensor, self._steps(tensor))) as windows:
                nbytes = merger.nbytes(tensor, self._steps(tensor))
                work = encoder(self.said.encoding, "U8", nbytes, spool, tools, level=1)
                for one, other in windows:
                    if stop.is_set():
                        raise Stopped
                    changed += work.add(one, other)[1]
            return _Made(spool if work.finish() else None, changed)

        return merge
