"""Every error ckdiff raises on purpose, with the exit code the command line gives it.

::

    CkdiffError                  2   base of all: one line that says what, where and what to do
    ├── UsageError               2   an argument that makes no sense
    │   └── RuleError            2   a rule that cannot be read
    ├── CheckpointError          2   a checkpoint that cannot be opened or trusted
    │   ├── HeaderError          2   a safetensors header that breaks the format
    │   └── SourceChanged        2   a shard was cut, rewritten or replaced while it was read
    ├── PairingError             2   two checkpoints with nothing to compare, or names that collide
    ├── BudgetError              2   the memory or disk allowed is not enough, said before any work
    ├── OutputError              2   an output, other than a store, that cannot be written
    ├── StoreError               2   something about a mask store
    │   ├── StoreIncomplete      2   a directory without a manifest, left by a run that was stopped
    │   ├── StoreCorrupt         2   bytes that are not the bytes that were written
    │   ├── StoreLocked          2   another process is writing this store
    │   └── StoreExists          2   the output is already there
    ├── DeltaError               2   a delta that is damaged, or for another base
    ├── ClusterError             2   a Dask scheduler that does not answer, or workers that die
    └── Interrupted        130/143   Ctrl-C or SIGTERM; the work so far is kept and resumable

This module imports nothing from the package.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: what the whole of ckdiff comes with and the small install, ckdiff-core, does not: for what it is
_WHOLE = {
    "dask": "dask arrays",
    "httpx2": "models on the hub",
    "huggingface_hub": "models on the hub",
    "llvmlite": "kernels that did not come along",
    "numba": "kernels that did not come along",
    "numcodecs": "Zarr arrays",
    "zarr": "Zarr arrays",
}
_COMPARED = 100  #: characters: comparing takes the square of them


class CkdiffError(Exception):
    """Base of every error ckdiff raises.

    ``str(error)`` is one line: ``message`` says what is wrong and where; ``hint``, in brackets,
    says what to do, if there is one. ``exit_code`` is the exit code of the ``ckdiff`` command.
    """

    exit_code: int = 2
    _remedy: str | None = None  # the hint of an error that has none of its own

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = self._remedy if hint is None else hint

    @property
    def message(self) -> str:
        """What is wrong, without the hint, to be quoted in another error that has its own hint."""
        return str(self.args[0])

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"

    def one_line(self) -> str:
        """The message and the hint on one line, with control characters escaped."""
        return printable(str(self))


class UsageError(CkdiffError):
    """A wrong argument, or arguments that contradict each other."""


class RuleError(UsageError):
    """A rule that cannot be read, such as ``atol=-1``."""


class CheckpointError(CkdiffError):
    """A checkpoint that cannot be opened, or whose parts contradict each other."""


class HeaderError(CheckpointError):
    """A safetensors file whose header breaks the format."""

    _remedy = "fetch the file again, or save it again"


class SourceChanged(CheckpointError):
    """A source file was truncated, rewritten or replaced while it was being read."""

    _remedy = "let whatever writes it finish, then run again"


class PairingError(CkdiffError):
    """Two checkpoints that have nothing to compare, or names that collide after renaming."""


class BudgetError(CkdiffError):
    """A memory or disk budget that the planned work does not fit into."""


class OutputError(CkdiffError):
    """An output (other than a mask store) that already exists or cannot be written."""


class StoreError(CkdiffError):
    """Something about a mask store."""


class StoreIncomplete(StoreError):
    """A directory without a manifest: not a store, or left over from a stopped run."""


class StoreCorrupt(StoreError):
    """A store whose bytes are not the bytes that were written."""

    _remedy = "restore it from a copy, or make it again"


class StoreLocked(StoreError):
    """Another process is writing the same store."""


class StoreExists(StoreError):
    """The output already exists, and ``overwrite`` was not given."""


class DeltaError(CkdiffError):
    """A delta that is damaged, or that was made for another base."""


class ClusterError(CkdiffError):
    """A Dask scheduler that does not answer, or workers that keep dying."""


class Interrupted(CkdiffError):
    """The run was stopped by a signal. Finished work is kept, and the same command resumes it."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def one_of(asked: str, known: Iterable[str], kind: str = "") -> str:
    """A hint for a word that is not known: which one was meant, if one is near, and all there are.

    ``did you mean union? one of intersection, union``; with ``kind`` it says ``formats are`` or so.
    """
    names = list(known)
    near = nearest(asked, names)
    meant = f"did you mean {near}? " if near is not None else ""
    return f"{meant}{f'{kind} are' if kind else 'one of'} {', '.join(names)}"


def nearest(asked: str, known: Iterable[str]) -> str | None:
    """The known word that is most like the one that was asked for; None where none is like it, or
    two are like it alike.
    """
    import difflib

    lower = {name.lower(): name for name in known}
    text = str(asked)[:_COMPARED].lower()
    begun = [name for name in lower if name.startswith(text) and len(text) > 2]
    close = begun if len(begun) == 1 else difflib.get_close_matches(text, lower, 2, 0.6)
    likeness = [difflib.SequenceMatcher(None, name, text).ratio() for name in close]
    if not close or len(set(likeness)) < len(close):
        return None
    return lower[close[0]]


def lacking(error: ModuleNotFoundError) -> UsageError | None:
    """What to say where a package is not installed that the whole of ckdiff comes with.

    None for any other module.
    """
    package = (error.name or "").partition(".")[0]
    if package not in _WHOLE:
        return None
    return UsageError(
        f"{_WHOLE[package]} take the package {package}, which is not installed", hint=whole()
    )


@contextmanager
def of_the_whole() -> Iterator[None]:
    """Around an import that fails in the small install: raises UsageError, which says the rest."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = lacking(error)
        if missing is None:
            raise
        raise missing from None


def whole() -> str:
    """How to get everything that ckdiff comes with, from what is installed here."""
    return install("full") if _is_core() else "pip install ckdiff"


def install(extra: str) -> str:
    """How to get an extra, for what is installed here: both packages have the same files."""
    return f"pip install 'ckdiff{'-core' if _is_core() else ''}[{extra}]'"


def _is_core() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("ckdiff-core")
    except PackageNotFoundError:
        return False
    return True


def printable(text: str) -> str:
    """``text`` with control, format and undecodable characters escaped, safe for a terminal.

    Tensor names come from files that may be hostile: an ANSI escape or a newline in a name must
    not reach the terminal as such.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )
