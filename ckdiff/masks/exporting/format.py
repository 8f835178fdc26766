"""What a format of exported masks is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckdiff.masks.exporting.masks import Masks
from ckdiff.stores.table import IntArray


class Output(Protocol):
    """A file to be written, whatever its format."""

    data_size: int  #: bytes that ``done`` will be told of
    size: int  #: bytes that it takes on the disk, about

    @property
    def names(self) -> list[str]:
        """What the tensors of the file are called."""

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        """Write it to ``path``, where nothing is. Raises OSError and StoreCorrupt."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write masks for other tools."""

    output: Callable[[Masks, IntArray], Output]  #: of the masks at some positions
    packed: Callable[[Masks, IntArray], Output] | None = None  #: with eight elements in a byte
    suffixes: tuple[str, ...] = ()  #: of names that only this format, and ones like it, have
    also: tuple[str, ...] = ()  #: of names that mean it, and that other files have as well
    shards: bool = False  #: whether it can have the shards of a checkpoint
