"""What making and applying deltas gives, and how many threads fit into the memory allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckdiff.deltas.room import EACH, INCLUDED
from ckdiff.options import Options
from ckdiff.running.memory import Need, fit_workers


def allowed_workers(options: Options, tasks: int, tables: int = 0, *, readers: int = 0) -> int:
    """How many workers there will be; raises BudgetError where the memory does not suffice.

    ``tables`` are bytes that were taken for deltas, and ``readers`` those that the readers of each
    worker take by themselves.
    """
    need = Need(tables=max(0, tables - INCLUDED), worker=EACH + readers)
    return fit_workers(options.workers, tasks, need, options.memory)


@dataclass(slots=True)
class DeltaResult:
    """What was written. ``to_dict()`` is what ``ckdiff delta --json`` prints."""

    out: Path
    encoding: str
    size: int  #: bytes of the delta
    rebuilt_size: int  #: bytes of the files that it rebuilds
    bytes_read: int  #: of both sides
    tensors: int  #: of the tuned side
    paired: int  #: of those, the ones that are made from the base's
    elements: int  #: of the paired tensors, as far as the base has them
    changed: int  #: of those
    unpaired: dict[str, list[str]]  #: reason -> names
    lossy: dict[str, Any] | None  #: the mask that chose, and what it left out
    seconds: float
    #: tensors of which the base has other rows: ``name``, the shapes ``base`` and ``tuned``, and
    #: ``rows``, how many both have
    resized: list[dict[str, Any]] = field(default_factory=list)
    #: tensors that the base has under another name, or inside another one: ``name``, ``base``
    parts: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "encoding": self.encoding,
            "size": self.size,
            "rebuilt_size": self.rebuilt_size,
            "bytes_read": self.bytes_read,
            "tensors": self.tensors,
            "paired": self.paired,
            "elements": self.elements,
            "changed": self.changed,
            "density": self.changed / self.elements if self.elements else 0.0,
            "unpaired": self.unpaired,
            "resized": self.resized,
            "parts": self.parts,
            "lossy": self.lossy,
            "seconds": self.seconds,
        }


@dataclass(slots=True)
class ApplyResult:
    """What was rebuilt. ``to_dict()`` is what ``ckdiff apply --json`` prints."""

    out: Path
    deltas: int
    files: list[str]
    copied: list[str]  #: config and tokenizer files beside them
    size: int  #: bytes of the rebuilt files
    tensors: int
    lossy: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "deltas": self.deltas,
            "files": self.files,
            "copied": self.copied,
            "size": self.size,
            "tensors": self.tensors,
            "lossy": self.lossy,
            "seconds": self.seconds,
        }
