"""Where an export goes: a file or a directory that is there whole, or not at all.

What is written lies in ``OUT.ckdiff-partial`` beside the output until it is complete and on the
disk, and is renamed then. An export is not resumed; what a killed one leaves is removed by the next
one to the same place, or by ``ckdiff clean``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckdiff.budget import format_size
from ckdiff.checkpoints.header import read_header
from ckdiff.checkpoints.openfile import OpenFile
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.shards import INDEX_NAME
from ckdiff.errors import (
    BudgetError,
    CheckpointError,
    StoreError,
    StoreExists,
    printable,
)
from ckdiff.outputs import ELSEWHERE, check_place, free_space, relation
from ckdiff.store import MaskStore
from ckdiff.workdir import SUFFIX, acquire, remove, sync_path, sync_tree

FORMAT = "ckdiff-masks"  #: ``format`` in the metadata of everything exported
_REMEDIES = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "the file size limit (ulimit -f) is too small",
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing into a StoreError that names the output and the remedy."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {printable(str(path))}: {error.strerror or error}",
            hint=_REMEDIES.get(error.errno or 0, ELSEWHERE),
        ) from error


class Place:
    """An output being written. A context manager: what was not committed is removed."""

    def __init__(self, out: Path, *, directory: bool, overwrite: bool) -> None:
        self.out = out
        self._partial = out.with_name(out.name + SUFFIX) if out.name else out
        self.path = self._partial / "new"  #: write here: a file, or into this directory
        self._directory = directory
        self._overwrite = overwrite
        self._lock = -1

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

    def keep_away_from(self, store: MaskStore, like: Checkpoint | None) -> None:
        """Raise StoreError where the output would damage what is read."""
        check_place(self.out, [] if like is None else [like])
        found = relation(self.out, store.path)
        if found is not None:
            problem = "lies inside" if found == "inside" else "would replace"
            raise StoreError(
                f"the output {printable(str(self.out))} {problem} the store "
                f"{printable(str(store.path))}",
                hint=ELSEWHERE,
            )

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
            if self._directory and self.out.exists():
                self._swap()
            else:
                os.replace(self.path, self.out)
            sync_path(self.out.parent)

    # inside

    def _check(self) -> None:
        """Raise StoreError or StoreExists where the output is in the way."""
        out, shown = self.out, printable(str(self.out))
        if not out.name:
            raise StoreExists(f"{shown} exists", hint="choose another name")
        if not out.parent.is_dir():
            raise StoreError(
                f"cannot write {shown}: no directory {printable(str(out.parent))}",
                hint="create it first",
            )
        if not os.path.lexists(out):
            return
        if out.is_symlink() or not (out.is_dir() if self._directory else out.is_file()):
            kind = "directory" if self._directory else "file"
            raise StoreExists(f"{shown} exists and is not a {kind}", hint="choose another name")
        if self._directory and not _is_export(out):
            raise StoreExists(
                f"{shown} exists and holds something else than exported masks",
                hint="choose another name",
            )
        if not self._overwrite and not (self._directory and not any(out.iterdir())):
            raise StoreExists(f"{shown} exists", hint="use --overwrite to replace it")

    def _acquire(self) -> None:
        """Lock the directory beside the output; the kernel frees it however we end."""
        if (self._partial / "plan.json").exists():
            raise StoreExists(
                f"{printable(str(self._partial))} is left of a run that wrote a mask store",
                hint="ckdiff clean removes it",
            )
        self._lock = acquire(self._partial)

    def _clear(self) -> None:
        """Remove what a killed run left; give back what it was about to replace."""
        replaced = self._partial / "replaced"
        if replaced.is_dir() and not os.path.lexists(self.out):
            os.rename(replaced, self.out)
        for entry in list(self._partial.iterdir()):
            if entry.name != "LOCK":
                remove(entry)

    def _swap(self) -> None:
        replaced = self._partial / "replaced"
        os.rename(self.out, replaced)
        try:
            os.rename(self.path, self.out)
        except BaseException:
            os.rename(replaced, self.out)
            raise

    def _leave(self) -> None:
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            self._clear()
            (self._partial / "LOCK").unlink(missing_ok=True)
            self._partial.rmdir()
        os.close(self._lock)
        self._lock = -1


def _is_export(folder: Path) -> bool:
    """Whether there is nothing in a directory but masks that were exported to it."""
    for root, _, names in os.walk(folder):
        for name in names:
            if name != INDEX_NAME and file_metadata(os.path.join(root, name)).get("format") != (
                FORMAT
            ):
                return False
    return True


def file_metadata(path: str) -> dict[str, str]:
    """The metadata of a safetensors file; nothing where it is none."""
    try:
        file = OpenFile.open(path)
    except CheckpointError:
        return {}
    try:
        return read_header(file.fd, file.size, path).metadata
    except (CheckpointError, OSError):
        return {}
    finally:
        file.close()
