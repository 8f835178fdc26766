"""Whether a store may be written where it was asked for, and whether it will fit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
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
        for file in side.open_files:
            if any(_holds(place, path) for place in _places(out) for path in _both(file.path)):
                raise error(
                    f"the output {printable(str(out))} would replace a source", hint=ELSEWHERE
                )
        folder = side.directory
        if folder is not None and _holds(folder, out):
            raise error(
                f"the output {printable(str(out))} lies inside the source {printable(folder)}",
                hint=ELSEWHERE,
            )


def relation(out: Path, store: Path) -> Literal["inside", "holds"] | None:
    """Whether the output lies inside a store, or is one or holds one; None where it is apart."""
    if any(_holds(place, store) for place in _places(out)):
        return "holds"
    return "inside" if _holds(store, out) else None


def _places(out: Path) -> list[Path]:
    """What a run takes for its own: the output's name, and its work directory's."""
    return [out, work_path(out)] if out.name else [out]


def _both(path: str) -> tuple[str, str]:
    """A file that is a link is read where it leads to, and lost where it is."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), path


def _holds(place: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is ``place`` or lies below it, by whatever names they are reached.

    Names say it, and so do devices and inodes: a bind mount, or a file system that does not tell
    upper from lower case, has several names for one directory.
    """
    top, name = os.path.realpath(place), os.path.realpath(path)
    if os.path.abspath(path) == os.path.abspath(place):
        return True
    if (name + os.sep).startswith(top.rstrip(os.sep) + os.sep):
        return True
    try:
        wanted = os.stat(top)
    except OSError:
        return False  # not there yet
    while True:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(name), wanted):
                return True
        if (parent := os.path.dirname(name)) == name:
            return False
        name = parent


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
            f"{format_size(free)} free at {where}, and the store needs at least "
            f"{format_size(least)}",
            hint="free some space or " + ELSEWHERE,
        )
    if free < most:
        note(
            f"warning: {format_size(free)} free at {where}, and masks that do not compress would "
            f"need {format_size(most)}; if it runs out, the same command resumes"
        )
