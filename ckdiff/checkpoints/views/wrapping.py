"""A checkpoint that is another one seen otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckdiff.checkpoints.protocol import Checkpoint, TensorTable


class View(Checkpoint):
    """All of ``inner``, which it owns, but with another table. Subclasses say how it is read."""

    def __init__(self, inner: Checkpoint, table: TensorTable) -> None:
        self.inner = inner
        self.table = table
        self._describe()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.inner!r}>"

    def _describe(self) -> None:
        inner = self.inner
        self.label, self.origin, self.streams = inner.label, inner.origin, inner.streams
        self.notes = inner.notes
        self.files, self.open_files = inner.files, inner.open_files
        self.directory, self.index_name = inner.directory, inner.index_name

    @property
    def in_files(self) -> bool:
        """False: what is in the files is not what is seen here."""
        return False

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return self.inner.missing_bytes()

    def fetch(self) -> None:
        """See Checkpoint."""
        self.inner.fetch()
        self._describe()

    def reader_memory(self, window: int) -> int:
        """See Checkpoint."""
        return self.inner.reader_memory(window)

    def share(self, spool: int, connections: int) -> None:
        """See Checkpoint."""
        self.inner.share(spool, connections)

    def hang_up(self) -> None:
        """See Checkpoint."""
        self.inner.hang_up()

    def fingerprint(self) -> list[Any]:
        """See Checkpoint."""
        return [self.inner.fingerprint(), self._way()]

    def seen(self) -> list[Any]:
        """See Checkpoint."""
        return [self.inner.seen(), self._way()]

    def _way(self) -> str:
        """How it is seen: JSON-able, and of a few bytes."""
        return type(self).__name__

    def recipe(self) -> str:
        """See Checkpoint: that of what it is a view of; whoever reads it takes the same view."""
        return self.inner.recipe()

    def verify(self) -> None:
        """See Checkpoint."""
        self.inner.verify()

    def close(self) -> None:
        """See Checkpoint."""
        self.inner.close()
