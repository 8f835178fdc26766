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
from ckdiff.errors import BudgetError, OutputError, StoreError, printable
from ckdiff.outputs.checks import (
    ELSEWHERE,
    check_place,
    check_replaceable,
    free_space,
    relation,
)
from ckdiff.outputs.ownership import (
    FORMER,
    NEW,
    PLAN,
    WorkFolder,
    acquire,
    check_work_path,
    work_path,
)
from ckdiff.outputs.placing import not_replaceable, put_in_place, sync_path, sync_tree

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
        self._directory = directory
        self._overwrite = overwrite
        self._in_the_way = in_the_way
        self._folder: WorkFolder | None = None
        self._made: tuple[int, int] | None = None

    @property
    def path(self) -> Path:
        """Write here: a file, or into this directory. For this process, until the place is left."""
        assert self._folder is not None
        return self._folder.inside / NEW

    def __enter__(self) -> Place:
        with write_errors(self.out), _output_errors():
            self._check()
            self._folder = acquire(work_path(self.out))
            try:
                if (self._folder.inside / PLAN).exists():
                    raise OutputError(
                        f"{printable(str(self._folder.path))} is left over from a run that wrote "
                        "a mask store",
                        hint="ckdiff clean removes it",
                    )
                self._folder.clear()
                self._check()  # again: another process may have finished just now
                check_replaceable(self.out, self._folder.inside, error=OutputError)
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
        with write_errors(self.out), _output_errors():
            self._check()
            check_work_path(self.out)

    def check_disk(self, size: int) -> None:
        """Raise BudgetError where ``size`` bytes do not fit."""
        with write_errors(self.out):
            free = free_space(self.out.parent)
        if free < size:
            where = printable(str(self.out.parent))
            raise BudgetError(
                f"{format_size(free)} free at {where}, but {format_size(size)} are needed",
                hint="free some space or " + ELSEWHERE,
            )

    def commit(self) -> None:
        """Bring everything to the disk and give it its name."""
        with write_errors(self.out), _output_errors():
            if self._directory:
                sync_tree(self.path)
            else:
                sync_path(self.path)
            self._check()
            status = os.stat(self.path)
            self._made = status.st_dev, status.st_ino
            former = self.path.with_name(FORMER)
            undo = put_in_place(self.path, self.out, former)
            try:
                # now that nobody can reach it by its name any more: may it really go?
                found = self._in_the_way(former) if _has_content(former) else None
                if found is not None:
                    raise OutputError(f"{printable(str(self.out))} {found}", hint=_RENAME)
                sync_path(self.out.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    undo()
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
        if os.path.lexists(out):
            self._check_existing(out, shown)

    def _check_existing(self, out: Path, shown: str) -> None:
        if out.is_symlink() or not (out.is_dir() if self._directory else out.is_file()):
            kind = "directory" if self._directory else "file"
            raise OutputError(f"{shown} exists and is not a {kind}", hint=_RENAME)
        content = _has_content(out)
        if content and (found := self._in_the_way(out)) is not None:
            raise OutputError(f"{shown} exists and {found}", hint=_RENAME)
        if (found := not_replaceable(out)) is not None:
            raise OutputError(f"{shown} {found}", hint=_RENAME)
        if content and not self._overwrite:
            raise OutputError(f"{shown} exists", hint="use --overwrite to replace it")

    def _leave(self) -> None:
        folder, self._folder = self._folder, None
        if folder is None:
            return
        with contextlib.suppress(OSError):
            if not (folder.inside / PLAN).exists():
                folder.remove()
        folder.close()


@contextmanager
def _output_errors() -> Iterator[None]:
    """What is wrong with the work directory is said of the output."""
    try:
        yield
    except StoreError as error:
        raise OutputError(error.message, hint=error.hint) from None


def _has_content(path: Path) -> bool:
    """Whether something is there that is more than a directory without anything in it."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return os.path.lexists(path)
