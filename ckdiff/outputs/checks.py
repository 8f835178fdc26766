"""Whether a store may be written where it was asked for, and whether it will fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, CkdiffError, StoreError, printable
from ckdiff.outputs.placing import replaceable

ELSEWHERE = "choose another place with -o"  #: a hint


def check_place(
    out: Path, sides: Sequence[Checkpoint], *, error: type[CkdiffError] = StoreError
) -> None:
    """Raise ``error`` where the output would lie inside a source, be one, or hold one."""
    place = os.path.realpath(out)
    for side in sides:
        for file in side.open_files:
            paths = {os.path.abspath(file.path), os.path.realpath(file.path)}
            if any(path == place or path.startswith(place + os.sep) for path in paths):
                raise error(
                    f"the output {printable(str(out))} would replace a source", hint=ELSEWHERE
                )
        folder = side.directory
        if folder is not None and (place + os.sep).startswith(os.path.realpath(folder) + os.sep):
            raise error(
                f"the output {printable(str(out))} lies inside the source {printable(folder)}",
                hint=ELSEWHERE,
            )


def relation(out: Path, store: Path) -> Literal["inside", "holds"] | None:
    """Whether the output lies inside a store, or is one or holds one; None where it is apart."""
    place, source = os.path.realpath(out), os.path.realpath(store)
    if (source + os.sep).startswith(place + os.sep):
        return "holds"
    return "inside" if place.startswith(source + os.sep) else None


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
