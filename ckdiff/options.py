"""What a diff can be asked for, what it tells while it runs, and what it expects to need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckdiff.rules import Rule


@dataclass(slots=True)
class Options:
    """Everything a diff can be asked for; the command line's options have the same names."""

    rules: Sequence[str | Rule] = ("exact",)
    include: Sequence[str] = ()  #: globs of tensor names
    exclude: Sequence[str] = ()
    rename: Sequence[str] = ()  #: ``REGEX=REPL`` on tuned names
    stats: bool = False
    workers: int | None = None  #: threads; the usable cores by default
    memory: str | int | None = None  #: bound on anonymous memory, such as ``"512MiB"``
    overwrite: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class Progress:
    """How far a diff is; handed to the ``progress`` callback about ten times a second."""

    done: int  #: bytes compared, both sides, resumed chunks included
    total: int
    seconds: float  #: since the comparing began
    resumed: int  #: bytes that an earlier run had done


@dataclass(slots=True)
class Observer:
    """What a caller wants to hear about while a diff runs."""

    progress: Callable[[Progress], None] = field(default=lambda progress: None)
    note: Callable[[str], None] = field(default=lambda message: None)  #: warnings and hints


@dataclass(slots=True)
class Estimate:
    """What a diff will read, write and need (``--dry-run``)."""

    tensors: int
    elements: int
    chunks: int
    bytes_to_read: int  #: both sides
    disk_at_most: int  #: masks that do not compress, tables, journal
    memory: int  #: the bound on anonymous memory
    memory_needed: int  #: of which the run expects to use
    workers: int
    window: int  #: elements
    rules: list[str]
    unpaired: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {name: getattr(self, name) for name in self.__slots__}
