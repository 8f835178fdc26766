"""The files of a checkpoint as they are to be made again: with all that is in them."""

from __future__ import annotations

from collections import Counter

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.views.canonical import as_file
from ckdiff.errors import CheckpointError, printable


def to_rebuild(checkpoint: Checkpoint) -> Checkpoint:
    """The same with all tensors of its files, also those that do not count because an index does
    not name them; one that is in no safetensors files with the one that it would be. Not to be
    closed.

    Raises CheckpointError where two files have a tensor of one name: nobody could tell these apart.
    """
    if not checkpoint.in_files:
        return as_file(checkpoint)
    stored = checkpoint.as_stored()
    names = stored.table.names
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise CheckpointError(
            f"{printable(checkpoint.label)}: two of its files have a tensor called "
            f"{printable(twice)}, so they cannot be made again",
            hint="save the checkpoint again, without what its index does not name",
        )
    return stored
