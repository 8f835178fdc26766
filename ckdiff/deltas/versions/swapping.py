"""A full version in the place of a local checkpoint: made aside, then its files take their names.

    LOCAL/.weight_sync/ckdiff-seed    the new files, until they have their places
                       ckdiff-former  the old ones, until all of it is done

Each file is in one of two places at any moment, so it can be finished, or undone, from anywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ckdiff.checkpoints.halfway import FOLDER
from ckdiff.checkpoints.indexes import INDEX_SUFFIX, SUFFIX
from ckdiff.deltas.versions.journal import Header, JournalWriter
from ckdiff.deltas.versions.lock import SyncFolder
from ckdiff.deltas.versions.marker import drop_marker
from ckdiff.deltas.versions.patching import settle
from ckdiff.errors import OutputError, printable
from ckdiff.outputs.companionnames import is_companion
from ckdiff.outputs.ownership import SUFFIX as PARTIAL
from ckdiff.outputs.place import write_errors
from ckdiff.outputs.placing import sync_path

SEED_NAME, FORMER_NAME = "ckdiff-seed", "ckdiff-former"


def seed_path(folder: SyncFolder) -> Path:
    """Where the new files are made; what an earlier run left there is removed."""
    for name in (SEED_NAME, SEED_NAME + PARTIAL, FORMER_NAME):
        _remove(folder, name)
    return folder.path / SEED_NAME


def swap_header(folder: SyncFolder, before: int | None, after: int) -> Header:
    """What will come and go. Raises OutputError where that would change what is not ours."""
    coming = sorted(_below(folder.path / SEED_NAME))
    going = [name for name in sorted(_belonging(folder.local)) if name not in coming]
    for name in (*coming, *going):
        path = folder.local / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OutputError(
                f"{printable(str(path))} is a link, or not a file, and would be replaced",
                hint="give the local checkpoint a directory of its own",
            )
    return Header(before, after, [], coming, going)


def begin_swap(folder: SyncFolder, header: Header) -> None:
    """From here on the checkpoint is half-way."""
    with write_errors(folder.path), closing(JournalWriter(folder, header)) as writer:
        writer.finish()
        drop_marker(folder)


def swap(folder: SyncFolder, header: Header, *, undo: bool) -> int | None:
    """Give the new files their places, or the old ones theirs back; the version that it is then.

    Raises OutputError; the journal stays then.
    """
    seed, former = folder.path / SEED_NAME, folder.path / FORMER_NAME
    with write_errors(folder.local):
        former.mkdir(exist_ok=True)
        for name in header.coming:
            here = folder.local / name
            if undo:
                if not os.path.lexists(seed / name) and os.path.lexists(here):
                    _move(here, seed / name)
                _back(former / name, here)
            elif os.path.lexists(seed / name):
                if os.path.lexists(here):
                    _move(here, former / name)
                _move(seed / name, here)
        for name in header.going:
            here = folder.local / name
            if undo:
                _back(former / name, here)
            elif os.path.lexists(here):
                _move(here, former / name)
        _sync(folder.local, (*header.coming, *header.going))
        version = header.before if undo else header.after
        settle(folder, version)
        for name in (SEED_NAME, FORMER_NAME):
            _remove(folder, name)
    return version


def _back(former: Path, here: Path) -> None:
    if os.path.lexists(former):
        _move(former, here)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, to)


def _sync(local: Path, names: tuple[str, ...]) -> None:
    for parent in sorted({(local / name).parent for name in names} | {local}):
        if parent.is_dir():
            sync_path(parent)


def _remove(folder: SyncFolder, name: str) -> None:
    path = folder.inside / name
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _below(root: Path) -> Iterator[str]:
    """The files below a directory, relative to it."""
    for folder, _, names in os.walk(root):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root)


def _belonging(local: Path) -> Iterator[str]:
    """The files in a directory that are of a checkpoint: weights, their index, configs, tokenizers.

    Programs stay: nobody knows whose they are.
    """
    for entry in os.scandir(local):
        name = entry.name
        of_it = name.endswith((SUFFIX, INDEX_SUFFIX)) or is_companion(name)
        if of_it and not name.endswith(".py") and name != FOLDER:
            yield name
