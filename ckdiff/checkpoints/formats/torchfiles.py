"""Torch files as one checkpoint."""

from __future__ import annotations

import numpy as np

from ckdiff.checkpoints.formats.torchzip import TorchTable, torch_table
from ckdiff.checkpoints.indexes import check_unlisted, joined_by_index
from ckdiff.checkpoints.pieces import WARNING, Contents, Piece
from ckdiff.checkpoints.places.place import Files
from ckdiff.checkpoints.protocol import TensorTable


def read_contents(files: Files) -> Contents:
    """What torch files hold: of each the weights, and of these what the index names, if there is
    one. Raises CheckpointError.
    """
    tables = []
    for i, read in enumerate(files.reads(lambda first, size: 0)):
        tables.append(torch_table(read, files.size(i), files.where(i), files.key))
        files.check(i)
    held = [(files.name(i), table.names) for i, table in enumerate(tables)]
    kept = [[True] * len(table.names) for table in tables]
    missing = [name for table in tables for name in table.absent]
    notes = [note for table in tables for note in table.notes]
    if files.choice.weight_map is None:
        check_unlisted(files.described, held)
    else:
        listed = joined_by_index(files.described, files.choice.weight_map, held)
        kept, missing = listed.kept, list(listed.missing)  # what cannot be compared among them
        notes += [f"{WARNING}{text}" for text in listed.warnings]
    return _joined(files, tables, kept, missing, notes)


def _joined(
    files: Files,
    tables: list[TorchTable],
    kept: list[list[bool]],
    missing: list[str],
    notes: list[str],
) -> Contents:
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    places: list[tuple[int, int, int]] = []
    pieces: dict[int, tuple[Piece, ...]] = {}
    for file, (table, keep) in enumerate(zip(tables, kept, strict=True), files.first):
        columns = zip(table.begins.tolist(), table.nbytes.tolist(), table.strides, strict=True)
        for i, (begin, nbytes, strides) in enumerate(columns):
            if not keep[i]:
                continue
            shape = table.shapes[i]
            if strides is None:
                places.append((file, begin, nbytes))
            else:
                pieces[len(names)] = (Piece(file, begin, (0,) * len(shape), shape, strides),)
                places.append((-1, -1, nbytes))
            names.append(table.names[i])
            dtypes.append(table.dtypes[i])
            shapes.append(shape)
    at, begins, nbytes_of = np.array(places, np.int64).reshape(-1, 3).T.copy()
    return Contents(
        TensorTable(names, dtypes, shapes, nbytes_of, missing),
        at.astype(np.int32),
        begins,
        pieces=pieces,
        notes=notes,
    )
