"""Whether a checkpoint is being changed in place, or was when whoever did it was stopped.

    CHECKPOINT/.weight_sync/state.json      at which version it is; not there while it is changed
                            ckdiff-journal  what is needed to finish the change, or to undo it

The marker goes before the first byte changes and comes back after the last: where it is, the
checkpoint is whole, whatever lies beside it. Nothing is read here but the two names.
"""

from __future__ import annotations

import os

from ckdiff.errors import CheckpointError, printable

FOLDER = ".weight_sync"
MARKER_NAME, JOURNAL_NAME = "state.json", "ckdiff-journal"


def is_half_way(directory: str | os.PathLike[str]) -> str | None:
    """The path of the journal of a checkpoint that is neither what it was nor what it is to be;
    None where it is whole.
    """
    folder = os.path.join(os.fspath(directory), FOLDER)
    journal = os.path.join(folder, JOURNAL_NAME)
    # in this order: whoever finishes puts the marker there first, and removes the journal then
    if not os.path.lexists(journal) or os.path.lexists(os.path.join(folder, MARKER_NAME)):
        return None
    return journal if os.path.lexists(journal) else None


def refuse_half_way(directory: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for a checkpoint that is half-way."""
    if is_half_way(directory) is not None:
        raise half_way(directory)


def half_way(directory: str | os.PathLike[str]) -> CheckpointError:
    """The error for a checkpoint that is half-way; it names the command that finishes it."""
    shown = printable(os.fspath(directory))
    return CheckpointError(
        f"{shown} is halfway between two versions: a change in place was interrupted",
        hint=f"ckdiff apply {shown} DELTA --in-place finishes that first, and --in-place --undo "
        "without a DELTA takes it back",
    )
