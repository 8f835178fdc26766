"""Two checkpoints -> a packed version: a delta as one file, with an index that says what it is."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from ckdiff.checkpoints.formats.safetensors import read_header
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas import creating
from ckdiff.deltas.room import Room
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.following import Following, not_sayable
from ckdiff.deltas.versions.form import (
    CONTENT,
    INDEX_NAME,
    PACKED,
    Said,
    index_bytes,
    shard_name,
    version_name,
)
from ckdiff.deltas.versions.holding import hold_base, hold_full
from ckdiff.deltas.versions.outcome import VersionReport
from ckdiff.deltas.versions.packed import PackedFile
from ckdiff.options import Observer, Options
from ckdiff.outputs.place import Place, write_errors
from ckdiff.running.memory import Need, fit_workers

_FILE = shard_name(0, 1)


class PackedMaking:
    """A packed version being made: planned on headers, then ``run``."""

    def __init__(
        self, base: Checkpoint, tuned: Checkpoint, stream: Path, said: Said, options: Options
    ) -> None:
        self._base, self._tuned, self._options = base, tuned, options
        self._said = Said(said.version, said.base_version, PACKED, CONTENT)
        self._out = stream / version_name(said.version)
        self._place = Place(self._out, directory=True, overwrite=False)

    def prepare(self) -> None:
        """Raise OutputError for what is in the way, before anything is fetched."""
        self._place.keep_away_from([self._base, self._tuned])
        self._place.check()

    def run(self, following: Following, room: Room, observer: Observer) -> VersionReport:
        """Make it of both sides, which are here. Raises DeltaError for another base."""
        workers, memory = self._options.workers, self._options.memory
        with self._place as place, write_errors(self._out):
            need = Need(room.taken, WINDOW + self._base.reader_memory(WINDOW))
            threads = fit_workers(workers, len(self._base.table), need, memory)
            hold_full(following, self._base, CONTENT, threads)
            hold_base(self._base, following.expected, threads)
            made = creating.delta(
                self._base, self._tuned, place.path / _FILE, encoding=PACKED, workers=workers,
                memory=memory, observer=observer,
            )  # fmt: skip
            file = _opened(place.path / _FILE, Room(memory))
            with file.delta:
                changed = sum(map(file.changed_bytes, file.where))
            weight_map = dict.fromkeys(_names(place.path / _FILE), _FILE)
            (place.path / INDEX_NAME).write_bytes(index_bytes(self._said, weight_map))
            size = sum(entry.stat().st_size for entry in os.scandir(place.path))
            place.commit()
        return VersionReport(
            path=self._out,
            version=self._said.version,
            full=False,
            tensors=len(file.where),
            changed_bytes=changed,
            bytes=size,
            density=made.changed / made.elements if made.elements else 0.0,
            seconds=made.seconds,
        )


def _opened(path: Path, room: Room) -> PackedFile:
    """What was written. Raises DeltaError where it is more than a version may be: an index that
    does not name all tensors of its files makes more of a delta than values.
    """
    try:
        return PackedFile(str(path), room)
    except Damaged as error:
        raise not_sayable(f"it {error}") from None


def _names(path: Path) -> list[str]:
    """The names of a file's tensors, which are a delta's parts and no model's."""
    with closing(OpenFile.open(str(path))) as file:
        return list(read_header(file.fd, file.size, str(path)).names)
