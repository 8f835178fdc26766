"""Removing what stopped runs left, whatever they were writing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ckdiff.errors import StoreError, StoreLocked, printable
from ckdiff.outputs.ownership import acquire, leftovers
from ckdiff.outputs.place import write_errors


class Cleaned(NamedTuple):
    """What ``clean`` did with what has the name of a work directory."""

    removed: list[Path]
    busy: list[Path]  #: still in use by a running process
    foreign: list[tuple[Path, str]]  #: left as it is, and the message that says why


def clean(folder: Path) -> Cleaned:
    """Remove the work directories of stopped runs directly below ``folder``, if they are ours."""
    cleaned = Cleaned([], [], [])
    for path in leftovers(folder):
        with write_errors(path):
            try:
                work = acquire(path, create=False)
            except StoreLocked:
                cleaned.busy.append(path)
                continue
            except StoreError as error:
                cleaned.foreign.append((path, error.message))
                continue
            except FileNotFoundError:
                continue  # its owner has just removed it
            try:
                work.remove()
            except OSError as error:
                reason = f"{printable(str(path))} cannot be removed: {error.strerror}"
                cleaned.foreign.append((path, reason))
                continue
            finally:
                work.close()
        cleaned.removed.append(path)
    return cleaned
