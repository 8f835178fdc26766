"""Which files a path means: one file, the shards an index names, or all of a directory."""

from __future__ import annotations

import posixpath
from collections.abc import Collection

from ckdiff.checkpoints import deepspeed
from ckdiff.checkpoints.contents import file_format, has_pieces
from ckdiff.checkpoints.explaining import not_weights
from ckdiff.checkpoints.folders import Choice, Folder, inside, some, where
from ckdiff.checkpoints.nested import PIPELINE, no_checkpoint, pipeline_in, snapshot_in
from ckdiff.checkpoints.pieces import WARNING
from ckdiff.checkpoints.weightnames import SAFETENSORS, index_name, rank_of, weight_name
from ckdiff.checkpoints.weights import METADATA, indexed_choice, weights_in
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

__all__ = ["Choice", "Folder", "choice_of"]


def choice_of(folder: Folder, path: str = "") -> Choice:
    """The files that are the model: of ``folder`` itself, or of a file or folder ``path`` in it.

    A file or an index means exactly that. Raises CheckpointError where nothing is the model, where
    it cannot be said which of several is, and where a part of it is missing.
    """
    path = posixpath.normpath(path) if path else ""
    if path in ("", "."):
        return _of_directory(folder, "")
    parent, name = posixpath.split(path)
    names = folder.names(parent)
    if f"{name}/" in names:
        return _of_directory(folder, path)
    if name in names:
        return _of_file(folder, parent, name, names)
    raise CheckpointError(
        f"{where(folder, path)}: does not exist; there are "
        f"{some(sorted(names, key=natural_key)) or 'no files'}",
        hint="check the path",
    )


def _of_file(folder: Folder, parent: str, name: str, names: Collection[str]) -> Choice:
    """What a file that is given means: itself, or what it is the index of."""
    path = inside(parent, name)
    if index_name(name) is not None:
        return indexed_choice(folder, parent, name)
    if name in (PIPELINE, METADATA):
        return _of_directory(folder, parent)
    if (rank := rank_of(name)) is not None and rank[1] > 1:
        raise CheckpointError(
            f"{where(folder, path)}: has only the part that one of {rank[1]:,} ranks has of a "
            "model",
            hint="give the directory that has the files of all ranks",
        )
    refused = not_weights(folder, path)
    if refused is not None:
        raise refused
    notes = _one_of_pieces(folder, parent, name)
    if name == deepspeed.MODEL and deepspeed.trained_apart(names):
        notes += (
            f"{where(folder, path)}: has the weights that the model computes with; those that ZeRO "
            "trains are in the files beside it, which are left out",
        )
    return Choice(file_format(folder, path), parent, (name,), notes=notes)


def _one_of_pieces(folder: Folder, parent: str, name: str) -> tuple[str, ...]:
    """What to say of a file that has pieces of tensors, the first of which look like whole ones."""
    if weight_name(name, (SAFETENSORS,)) is None:
        return ()
    others = [n for n in folder.names(parent) if n != name and weight_name(n, (SAFETENSORS,))]
    first = min(others, key=natural_key, default=None)
    if first is None or not all(has_pieces(folder, inside(parent, n)) for n in (name, first)):
        return ()
    path = where(folder, inside(parent, name))
    return (
        f"{WARNING}{path}: holds only parts of its tensors; give the directory to compare all of "
        "them",
    )


def _of_directory(folder: Folder, sub: str) -> Choice:
    names = sorted(folder.names(sub), key=natural_key)  # the order of a listing means nothing
    snapshot = snapshot_in(folder, sub, names)
    if snapshot is not None:
        sub, names = snapshot, sorted(folder.names(snapshot), key=natural_key)
    choice = pipeline_in(folder, sub, names) or weights_in(folder, sub, names)
    if choice is None:
        raise no_checkpoint(folder, sub, names)
    return choice
