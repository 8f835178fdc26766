"""What a format is told of the files that it reads, wherever they are."""

from __future__ import annotations

from typing import Protocol

from ckdiff.checkpoints.folders import Choice


class Files(Protocol):
    """The files of one choice, by their positions in it."""

    @property
    def choice(self) -> Choice:
        """What was chosen."""

    @property
    def described(self) -> str:
        """How an error names all of it."""

    @property
    def first(self) -> int:
        """The position in the checkpoint of the first of them."""

    @property
    def key(self) -> str | None:
        """``--key``, if it was given."""

    def __len__(self) -> int: ...

    def name(self, file: int) -> str:
        """The name of a file in its folder."""

    def size(self, file: int) -> int:
        """Its bytes."""

    def where(self, file: int) -> str:
        """How messages name it."""

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """Bytes of it, fewer only at its end. Raises CheckpointError, SourceChanged."""

    def check(self, file: int) -> None:
        """Raise SourceChanged where it is not what it was when it was opened."""

    def index(self) -> bytes | None:
        """The index of the choice as it is stored, if it has one."""
