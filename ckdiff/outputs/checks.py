"""Whether a store may be written where it was asked for, and whether it will fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, CkdiffError, StoreError, printable
from ckdiff.outputs.ownership import work_path
from ckdiff.outputs.placing import replaceable

ELSEWHERE = "choose another place with -o"  #: a hint


def check_place(
    out: Path, sides: Sequence[Checkpoint], *, error: type[CkdiffError] = StoreError
) -> None:
    """Raise ``error`` where the output would lie inside a source, be one, or hold one."""
    for side in sides:
        if _held(_places(out), (path for file in side.open_files for path in _both(file.path))):
            raise error(f"the output {printable(str(out))} would replace a source", hint=ELSEWHERE)
        folder = side.directory
        if folder is not None and _held([folder], [out]):
            raise error(
                f"the output {printable(str(out))} lies inside the source {printable(folder)}",
                hint=ELSEWHERE,
            )


def relation(out: Path, store: Path) -> Literal["inside", "holds"] | None:
    """Whether the output lies inside a store, or is one or holds one; None where it is apart."""
    if _held(_places(out), [store]):
        return "holds"
    return "inside" if _held([store], [out]) else None


def _places(out: Path) -> list[Path]:
    """What a run takes for its own: the output's name, and its work directory's."""
    return [out, work_path(out)] if out.name else [out]


def _both(path: str) -> tuple[str, str]:
    """A file that is a link is read where it leads to, and lost where it is."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), path


def _held(
    places: Sequence[str | os.PathLike[str]], paths: Iterable[str | os.PathLike[str]]
) -> bool:
    """Whether one of ``paths`` is one of ``places`` or lies below it, by whatever names.

    Names say it, and so do devices and inodes: a bind mount, or a file system that does not tell
    upper from lower case, has several names for one directory. Each directory above a path is
    looked at once, however many paths lie in it.
    """
    same = {os.path.abspath(place) for place in places}
    tops = {os.path.realpath(place) for place in places}
    wanted = set(filter(None, map(_identity, tops)))
    apart = set[str]()  # directories that neither are a place nor lie below one
    for path in paths:
        if os.path.abspath(path) in same:
            return True
        name, parent = "", os.path.realpath(path)
        while name != parent and parent not in apart:
            name = parent
            if name in tops or (wanted and _identity(name) in wanted):
                return True
            apart.add(name)
            parent = os.path.dirname(name)
    return False


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode; None of what is not there yet, or cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def free_space(folder: Path) -> int:
    """Bytes that may still be written to the file system of ``folder``; OSError passes through."""
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize


def check_replaceable(out: Path, folder: Path, *, error: type[CkdiffError]) -> None:
    """Raise ``error`` where what is at ``out`` cannot be replaced in one step.

    ``folder`` is ours and beside it.
    """
    if not replaceable(folder, out):
        raise error(
            f"{printable(str(out))} cannot be replaced in one step: its file system cannot "
            "exchange two directories",
            hint="remove it first, or choose another name",
        )


def check_disk(out: Path, most: int, note: Callable[[str], None]) -> None:
    """Refuse what cannot fit (BudgetError), and warn where only masks that do not compress would
    not: what they will compress to is not known before, and running out is resumable.

    ``most`` is the number of bytes that a store without any compression takes.
    """
    if not out.parent.is_dir():
        return  # said when the store is begun
    free = free_space(out.parent)
    least = most // 256 + 16384
    where = printable(str(out.parent))
    if free < least:
        raise BudgetError(
            f"{format_size(free)} free at {where}, but the store needs at least "
            f"{format_size(least)}",
            hint="free some space or " + ELSEWHERE,
        )
    if free < most:
        note(
            f"warning: {format_size(free)} free at {where}, and masks that do not compress would "
            f"need {format_size(most)}; if it runs out, the same command resumes"
        )
