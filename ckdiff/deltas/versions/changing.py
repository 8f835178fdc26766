"""The two passes of a change in place, whatever it is made from; and what was left of one.

The first pass notes down what is to change and is of the caller; nothing of the checkpoint changes
in it. The second puts that into the files. What was stopped in the second is finished, or undone,
from the journal alone, by whoever comes next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from ckdiff.checkpoints.halfway import JOURNAL_NAME, MARKER_NAME, is_half_way
from ckdiff.deltas.versions.journal import (
    NEW_NAME,
    RECORD_MEMORY,
    Header,
    Journal,
    JournalWriter,
)
from ckdiff.deltas.versions.lock import SyncFolder
from ckdiff.deltas.versions.marker import drop_marker
from ckdiff.deltas.versions.patching import Putting, open_writable
from ckdiff.deltas.versions.swapping import seed_path, swap
from ckdiff.errors import CkdiffError, printable
from ckdiff.options import Observer, Options
from ckdiff.outputs.place import write_errors
from ckdiff.running.memory import Need, fit_workers

_HALF_WAY = "the checkpoint is half-way: run it again to finish"
_PUT_MEMORY = 2 * RECORD_MEMORY


@dataclass(frozen=True, slots=True)
class TwoPasses:
    """A change of a local checkpoint, which is locked, where it is."""

    folder: SyncFolder
    header: Header  #: of its journal
    files: Sequence[int]  #: descriptors of the header's files
    workers: int
    observer: Observer

    def run(self, first: Callable[[JournalWriter], None]) -> int:
        """Let ``first`` note down what is to change, and do it; gives the bytes of the journal.

        Nothing changes where ``first`` raises, or where it notes down that nothing does. Raises
        OutputError too.
        """
        folder = self.folder
        with write_errors(folder.path), closing(JournalWriter(folder, self.header)) as writer:
            first(writer)
            if self.header.after is None and not writer.changed:
                return 0
            writer.finish()
            size = writer.size
            drop_marker(folder)
        try:
            with Journal(folder) as journal:
                putting = Putting(folder, journal, self.files, self.workers, self.observer)
                putting.run(undo=False, verify=False)
        except CkdiffError as error:
            raise type(error)(error.message, hint=error.hint or _HALF_WAY) from None
        return size


def what_is_left(local: Path) -> str:
    """What is left of a change that was interrupted, for a message."""
    return "it is as it was, or done" if is_half_way(local) is None else _HALF_WAY


def take_up(
    folder: SyncFolder, options: Options, observer: Observer, *, undo: bool = False
) -> int | None:
    """Finish, or ``undo``, what was stopped; the version that the checkpoint is at then.

    Raises DeltaError for a journal that is of no use, and OutputError.
    """
    with Journal(folder) as journal, ExitStack() as stack:
        header = journal.header
        if not header.files:
            return swap(folder, header, undo=undo)
        files = open_writable(stack, folder.local, [file.name for file in header.files])
        for fd, file in zip(files, header.files, strict=True):
            status = os.fstat(fd)
            if (status.st_size, status.st_ino) != (file.size, file.inode):
                raise journal.fault(f"{printable(file.name)} was replaced by another file")
        need = Need(tables=0, worker=_PUT_MEMORY)
        workers = fit_workers(options.workers, 1 << 20, need, options.memory)
        return Putting(folder, journal, files, workers, observer).run(undo=undo, verify=True)


def begin(folder: SyncFolder, options: Options, observer: Observer) -> str | None:
    """Make a checkpoint whole, and what lies in its folder tidy, before anything is done with it.

    Gives "finished" where a change that was stopped had to be.
    """
    recovered = None
    if is_half_way(folder.local) is not None:
        take_up(folder, options, observer)
        recovered = "finished"
    tidy(folder)
    return recovered


def tidy(folder: SyncFolder) -> None:
    """Remove what is left in a checkpoint that is whole."""
    with write_errors(folder.path):
        if folder.there(MARKER_NAME):
            folder.remove(JOURNAL_NAME)
        folder.remove(NEW_NAME)
        seed_path(folder)
