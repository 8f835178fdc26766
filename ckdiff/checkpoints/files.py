"""A checkpoint in files: where they are is a place's matter, and what they hold a format's."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from ckdiff.checkpoints.formats.registry import FORMATS, KEYED
from ckdiff.checkpoints.gathering import Located, PieceReader
from ckdiff.checkpoints.pieces import UNUSED_KEY, Contents, borders, together
from ckdiff.checkpoints.places.place import Place, files_of, leaves
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader
from ckdiff.errors import SourceChanged, printable


class FileCheckpoint(Checkpoint):
    """The tensors in the files of a place, which it owns."""

    def __init__(
        self, place: Place, key: str | None = None, contents: Contents | None = None
    ) -> None:
        """Reads what the files hold, where that is not known; ``key`` is where in a file the
        weights are. Raises CheckpointError.
        """
        self.place, self._key = place, key
        self.contents = _read(place, key) if contents is None else contents
        self._lock = threading.Lock()
        self._checked = self.contents.unchecked is None
        self.notes = (*place.choice.notes, *self.contents.notes)
        self.table = self.contents.table
        self.file_index, self.offset = self.contents.file_index, self.contents.offset
        self._describe()
        if key is not None and not _has_keys(place):
            unused = f"{UNUSED_KEY}{printable(key)} is not used: {self.label} is no torch file"
            self.notes = (*self.notes, unused)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}: {len(self.table):,} tensors>"

    def _describe(self) -> None:
        place = self.place
        self.label, self.origin, self.streams = place.label, place.origin, place.streams
        self.files, self.open_files = place.files, place.open_files
        self.directory, self.index_name = place.directory, place.index_name
        self.components = tuple(prefix for prefix, _ in place.choice.parts)

    @property
    def in_files(self) -> bool:
        """See Checkpoint."""
        return bool(self.contents.head_sizes) and super().in_files

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """See Checkpoint."""
        shapes, pieces = self.table.shapes, self.contents.pieces
        return {i: borders(shapes[i], parts) for i, parts in pieces.items()}

    def as_stored(self) -> Checkpoint:
        """See Checkpoint."""
        stored = self.contents.stored
        return self if stored is None else FileCheckpoint(self.place, self._key, stored)

    def head(self, file: int) -> bytes:
        """See Checkpoint."""
        if not self.contents.head_sizes:
            return super().head(file)
        raw = self.place.read(file, 0, self.contents.head_sizes[file])
        self.place.check(file)
        return raw

    def index(self) -> bytes | None:
        """See Checkpoint."""
        return self.place.index()

    def part_indexes(self) -> Sequence[tuple[str, bytes]]:
        """See Checkpoint."""
        return self.place.part_indexes()

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return self.place.missing_bytes()

    def fetch(self) -> None:
        """See Checkpoint."""
        if self.place.fetch():
            if not self.contents.is_same(_read(self.place, self._key)):
                self.place.close()
                raise SourceChanged(
                    f"{self.label}: the copy in the cache differs from the file at the hub",
                    hint="remove its files from the cache and run it again",
                )
            self._describe()
        self._check()

    def _check(self) -> None:
        """What is to be known before anything is read, and costs reading; once."""
        with self._lock:
            if not self._checked and self.contents.unchecked is not None:
                self.contents.unchecked()
            self._checked = True

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        if not self._checked:
            self._check()  # whoever reads need not have fetched what is here
        inner, contents = self.place.reader(), self.contents
        if contents.pieces:
            return PieceReader(inner, contents, mapped=self.place.reader_memory(1) == 0)
        return Located(inner, contents.file_index, contents.offset)

    def reader_memory(self, window: int) -> int:
        """See Checkpoint: where a window has to be gathered, all of it."""
        if not self.contents.pieces:
            return self.place.reader_memory(window)
        return self.place.reader_memory(PieceReader.asked(window)) + PieceReader.memory(window)

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        files = self.file_index[tensors]
        there = files >= 0
        self.place.read_ahead(
            files[there].astype("i8"), (self.offset[tensors] + starts)[there], nbytes[there]
        )

    def share(self, spool: int, connections: int) -> None:
        """See Checkpoint."""
        self.place.share(spool, connections)

    def hang_up(self) -> None:
        """See Checkpoint."""
        self.place.hang_up()

    def fingerprint(self) -> list[Any]:
        """See Checkpoint: what the place says of its files, and which of their weights it is."""
        key = [] if self._key is None else [["key", self._key]]
        return [*self.place.fingerprint(), *key]

    def seen(self) -> list[Any]:
        """See Checkpoint: what the place says of its files, and a digest of what they hold."""
        digest = xxhash.xxh3_128()
        for column in (self.table.names, self.table.dtypes, self.table.shapes):
            digest.update(repr(column).encode("utf-8", "surrogatepass"))
        for numbers in (self.table.nbytes, self.file_index, self.offset):
            digest.update(numbers.tobytes())
        if self.contents.pieces:
            digest.update(json.dumps(sorted(map(repr, self.contents.pieces.items()))).encode())
        return [*self.place.seen(), digest.hexdigest()]

    def recipe(self) -> str:
        """See Checkpoint."""
        if self._key is None:
            return self.place.recipe()
        return json.dumps({**json.loads(self.place.recipe()), "key": self._key})

    def verify(self) -> None:
        """See Checkpoint."""
        self.place.verify()

    def close(self) -> None:
        """See Checkpoint."""
        self.place.close()


def _has_keys(place: Place) -> bool:
    """Whether some of the files may hold more than weights, so that a key says where they are."""
    return any(leaf.format in KEYED for _, leaf in leaves(place.choice))


def _read(place: Place, key: str | None) -> Contents:
    return together(
        [(files.prefix, FORMATS[files.choice.format](files)) for files in files_of(place, key)]
    )
