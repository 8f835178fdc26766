"""What a diff can be asked for, what it tells while it runs, and what it expects to need.

The checks of what Python callers hand over are here as well: each raises a UsageError that names
the argument, where Python would say that some object has no attribute.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckdiff import notebook
from ckdiff.errors import UsageError, printable
from ckdiff.naming import DEVICES
from ckdiff.rules import Rule

_FLAGS = (
    "common_rows", "dequantize", "unfuse", "stats", "overwrite", "verify", "dry_run", "stream",
    "gated",
)  # fmt: skip
_FOR_TESTS = "torch-cpu"  # the way of a GPU, on torch's CPU device


@dataclass(slots=True)
class Options:
    """Everything a diff can be asked for; the command line's options have the same names.

    One text where several can be given counts as a list of one.
    """

    rules: Sequence[str | Rule] = ("exact",)
    include: Sequence[str] = ()  #: globs of tensor names
    exclude: Sequence[str] = ()
    rename: Sequence[str] = ()  #: ``REGEX=REPL`` on tuned names
    key: str | None = None  #: path of the state dict in torch files that hold more
    base_adapter: Any = None  #: a LoRA adapter that is merged into the base first
    tuned_adapter: Any = None
    common_rows: bool = False  #: of tensors whose first dimensions differ, compare what both have
    dequantize: bool = False  #: compare quantised tensors by the values that they stand for
    unfuse: bool = True  #: compare fused tensors with the parts that the other side has
    stats: bool = False
    workers: int | None = None  #: threads; the usable cores by default
    memory: str | int | None = None  #: bound on anonymous memory, such as ``"512MiB"``
    overwrite: bool = False
    verify: bool = False  #: read what is known to be equal as well
    dry_run: bool = False
    stream: bool = False  #: fetch what is compared of hub checkpoints, and download nothing whole
    disk: str | int = "1GiB"  #: bound on the disk that streaming uses
    scheduler: Any = None  #: a Dask scheduler's address, a Dask client, or "threads"
    device: str = "cpu"  #: where windows are compared: one of DEVICES
    device_memory: str | int = "1GiB"  #: bound on what is used of a GPU's memory
    gated: bool = False  #: a glob that matches nothing is an error, and not a warning
    expected: Sequence[tuple[str, str]] = ()  #: more options and globs that must match then

    def __post_init__(self) -> None:
        self.rules = _several("rules", self.rules, Rule)
        for name in ("include", "exclude", "rename"):
            setattr(self, name, several_texts(name, getattr(self, name)))
        if self.workers is not None:
            self.workers = checked_int("workers", self.workers)
            if self.workers < 1:
                raise UsageError(f"workers must be at least 1, not {self.workers}")
        if self.device not in (*DEVICES, _FOR_TESTS):
            raise UsageError(f"device must be cpu, cuda or auto, not {_shown(self.device)}")
        for name in (
            "common_rows",
            "unfuse",
            "stats",
            "overwrite",
            "verify",
            "dry_run",
            "stream",
            "gated",
        ):
            if getattr(self, name) not in (True, False):  # "no" would count as yes
                raise UsageError(f"{name} must be True or False, not {_shown(getattr(self, name))}")


@dataclass(slots=True)
class Progress:
    """How far a diff is; handed to the ``progress`` callback about ten times a second."""

    done: int  #: bytes compared, both sides, resumed chunks included
    total: int
    seconds: float  #: since the comparing began
    resumed: int  #: bytes that an earlier run had done


@dataclass(slots=True)
class Observer:
    """Callbacks that a caller gets while a diff runs."""

    progress: Callable[[Progress], None] = field(default=lambda progress: None)
    note: Callable[[str], None] = field(default=lambda message: None)  #: warnings and hints

    def __post_init__(self) -> None:
        checked_function("progress", self.progress)
        checked_function("note", self.note)


@dataclass(slots=True)
class Estimate:
    """What a diff will read, write and need (``--dry-run``)."""

    tensors: int
    elements: int
    chunks: int
    bytes_to_read: int  #: both sides
    bytes_known_equal: int  #: both sides: not read, because they are known to be equal
    bytes_to_download: int  #: from the hub, because they are not in its cache
    disk_at_most: int  #: masks that do not compress, tables, journal
    memory: int  #: the bound on anonymous memory
    memory_needed: int  #: of which the run expects to use
    workers: int
    window: int  #: elements
    rules: list[str]
    unpaired: dict[str, list[str]]
    refusal: str | None  #: why a run would be refused as things stand, such as ``OUT exists``

    def to_dict(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {name: getattr(self, name) for name in self.__slots__}


def _several(name: str, value: Any, *kinds: type) -> list[Any]:
    """The items of a repeatable option."""
    if isinstance(value, (str, *kinds)):
        return [value]
    try:
        return list(value)
    except TypeError:
        raise UsageError(f"{name} must be a text or a list of them, not {_shown(value)}") from None


def several_texts(name: str, value: Any) -> list[str]:
    """The texts of a repeatable option; one text counts as a list of one; raises UsageError."""
    return [checked_text(name, text) for text in _several(name, value)]


def _shown(value: Any) -> str:
    """A wrong value on one line, however long it is and whatever is in it."""
    return printable(reprlib.repr(value))


def checked_text(name: str, value: Any) -> str:
    """``value`` if it is a text; raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text, not {_shown(value)}")
    return value


def checked_int(name: str, value: Any) -> int:
    """``value`` if it is a whole number of whatever type; raises UsageError."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {_shown(value)}") from None


def checked_function(name: str, value: Any) -> None:
    """Raise UsageError for what cannot be called."""
    if not callable(value):
        raise UsageError(f"{name} must be a function, not {_shown(value)}")


def checked_observer(value: Any) -> Observer:
    """``value`` if it is an Observer; raises UsageError.

    For None one that ignores everything, or in a notebook one that shows a bar.
    """
    if value is None:
        return _nobody_asked()
    if not isinstance(value, Observer):
        raise UsageError(f"observer must be a ckdiff.Observer, not {_shown(value)}")
    return value


def _nobody_asked() -> Observer:
    shown = notebook.line()
    if shown is None:
        return Observer()
    return Observer(
        progress=lambda p: shown.progress(p.done, p.total, p.seconds, p.resumed), note=shown.note
    )


def checked_path(name: str, value: Any) -> str:
    """The text of a path; raises UsageError."""
    try:
        text = os.fspath(value)
    except TypeError:
        raise UsageError(f"{name} must be a path, not {_shown(value)}") from None
    if not isinstance(text, str):
        raise UsageError(f"{name} must be a path as text, not as bytes")
    if not text:
        raise UsageError(f"{name} has an empty name", hint="is a variable not set?")
    if "\0" in text:
        raise UsageError(f"{name} must be a path, which {text!r} with its NUL is not")
    return text


def checked_output(value: Any) -> Path:
    """The absolute path of an output; raises UsageError."""
    text = checked_path("the output", value)
    if text.startswith("hf://"):
        raise UsageError(f"the output must be on this machine, but {printable(text)} is on the hub")
    if ".." in text.split(os.sep):  # after a link, that is not the directory before it
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
    return Path(os.path.abspath(text))


def asks_for_directory(value: str | os.PathLike[str]) -> bool:
    """Whether an output, which was checked, is to be a directory: a slash is at its end, or it is
    one already.
    """
    text = os.fspath(value)
    return text.endswith(os.sep) or os.path.isdir(text)
