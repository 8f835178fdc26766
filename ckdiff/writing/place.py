"""Where an output goes that is no mask store: a file or a directory, there whole or not at all.

What is written lies in ``OUT.ckdiff-partial`` beside the output until it is complete and on the
disk, and is renamed then. It is not resumed; what a killed run leaves is removed by the next one to
the same place, or by ``ckdiff clean``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, OutputError, StoreLocked, printable
from ckdiff.writing.outputs import ELSEWHERE, check_place, free_space, relation
from ckdiff.writing.placing import (
    FORMER,
    give_back,
    put_in_place,
    remove,
    sync_path,
    sync_tree,
    take_back,
)
from ckdiff.writing.workdir import SUFFIX, acquire

#: says what an existing output holds that must not be deleted, or None where it may be replaced
Policy = Callable[[Path], str | None]

_RENAME = "choose another name"
_REMEDIES = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "the file size limit (ulimit -f) is too small",
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into an OutputError that names the output and the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {printable(str(path))}: {error.strerror or error}",
            hint=_REMEDIES.get(error.errno or 0, ELSEWHERE),
        ) from error


class Place:
    """An output being written. A context manager: what was not committed is removed.

    With ``overwrite`` an output that is there is replaced, if ``in_the_way`` finds nothing in it.
    """

    def __init__(
        self, out: Path, *, directory: bool, overwrite: bool, in_the_way: Policy = lambda out: None
    ) -> None:
        self.out = out
        self._partial = out.with_name(out.name + SUFFIX) if out.name else out
        self.path = self._partial / "new"  #: write here: a file, or into this directory
        self._directory = directory
        self._overwrite = overwrite
        self._in_the_way = in_the_way
        self._lock = -1
        self._made: tuple[int, int] | None = None

    def __enter__(self) -> Place:
        with write_errors(self.out):
            self._check()
            self._acquire()
            try:
                self._clear()
                self._check()  # again: another process may have finished just now
                if self._directory:
                    self.path.mkdir()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()

    def keep_away_from(
        self, checkpoints: Sequence[Checkpoint] = (), inputs: Sequence[Path] = ()
    ) -> None:
        """Raise OutputError where the output would damage what is read.

        ``inputs`` are files and directories besides checkpoints: mask stores, deltas.
        """
        check_place(self.out, checkpoints, error=OutputError)
        for path in inputs:
            found = relation(self.out, path)
            if found is not None:
                problem = "lies inside" if found == "inside" else "would replace"
                raise OutputError(
                    f"the output {printable(str(self.out))} {problem} the input "
                    f"{printable(str(path))}",
                    hint=ELSEWHERE,
                )

    def check(self) -> None:
        """Raise OutputError where something is in the way, before anything is written."""
        with write_errors(self.out):
            self._check()

    def check_disk(self, size: int) -> None:
        """Raise BudgetError where ``size`` bytes do not fit."""
        with write_errors(self.out):
            free = free_space(self.out.parent)
        if free < size:
            where = printable(str(self.out.parent))
            raise BudgetError(
                f"{format_size(free)} free at {where}, and {format_size(size)} are needed",
                hint="free some space or " + ELSEWHERE,
            )

    def commit(self) -> None:
        """Bring everything to the disk and give it its name."""
        with write_errors(self.out):
            if self._directory:
                sync_tree(self.path)
            else:
                sync_path(self.path)
            self._check()
            status = os.stat(self.path)
            self._made = status.st_dev, status.st_ino
            former = self._partial / FORMER if self.out.exists() else None
            put_in_place(self.path, self.out, former)
            try:
                sync_path(self.out.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    take_back(self.path, self.out, former)
                raise

    @property
    def committed(self) -> bool:
        """Whether the output is in its place, even if ``commit`` was interrupted."""
        try:
            status = os.lstat(self.out)
        except OSError:
            return False
        return self._made == (status.st_dev, status.st_ino)

    @property
    def stopped_hint(self) -> str:
        """What to tell whoever interrupted the writing."""
        return "the output is complete" if self.committed else "nothing was written"

    # inside

    def _check(self) -> None:
        """Raise OutputError where something is in the way."""
        out, shown = self.out, printable(str(self.out))
        if not out.name:
            raise OutputError(f"{shown} exists", hint=_RENAME)
        if not out.parent.is_dir():
            raise OutputError(
                f"cannot write {shown}: no directory {printable(str(out.parent))}",
                hint="create it first",
            )
        if not os.path.lexists(out):
            return
        if out.is_symlink() or not (out.is_dir() if self._directory else out.is_file()):
            kind = "directory" if self._directory else "file"
            raise OutputError(f"{shown} exists and is not a {kind}", hint=_RENAME)
        if self._directory and not any(out.iterdir()):
            return
        found = self._in_the_way(out)
        if found is not None:
            raise OutputError(f"{shown} exists and {found}", hint=_RENAME)
        if not self._overwrite:
            raise OutputError(f"{shown} exists", hint="use --overwrite to replace it")

    def _acquire(self) -> None:
        """Lock the directory beside the output; the kernel frees it however we end."""
        if (self._partial / "plan.json").exists():
            raise OutputError(
                f"{printable(str(self._partial))} is left of a run that wrote a mask store",
                hint="ckdiff clean removes it",
            )
        try:
            self._lock = acquire(self._partial)
        except StoreLocked as error:
            raise OutputError(str(error), hint=error.hint) from None

    def _clear(self) -> None:
        """Remove what a killed run left; give back what it was about to replace."""
        give_back(self._partial / FORMER, self.out)
        for entry in list(self._partial.iterdir()):
            if entry.name != "LOCK":
                remove(entry)

    def _leave(self) -> None:
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            self._clear()
            (self._partial / "LOCK").unlink(missing_ok=True)
            self._partial.rmdir()
        os.close(self._lock)
        self._lock = -1
