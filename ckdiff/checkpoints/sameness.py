"""Which files of two checkpoints are known to be the same, without reading them.

Two files are one where they have one inode (a hard link, or two paths to the same file), and hold
the same bytes where whoever keeps them says that they have one content hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import Checkpoint, IntArray

#: positions of a base file and a tuned file
FilePair = tuple[int, int]


def same_files(base: Checkpoint, tuned: Checkpoint) -> tuple[FilePair, ...]:
    """The pairs of files that are known to be equal; a file of the tuned side is in one at most."""
    known: dict[object, int] = {}
    for i, keys in enumerate(_keys(base)):
        for key in keys:
            known.setdefault(key, i)
    found = []
    for j, keys in enumerate(_keys(tuned)):
        match = next((known[key] for key in keys if key in known), None)
        if match is not None:
            found.append((match, j))
    return tuple(found)


def _keys(side: Checkpoint) -> list[list[object]]:
    """What each file of a checkpoint is known by."""
    keys: list[list[object]] = [
        [(file.content, file.size)] if file.content else [] for file in side.files
    ]
    for found, file in zip(keys, side.open_files, strict=False):
        # sizes and times as well: some network file systems make inode numbers up
        found.append(file.identity)
    return keys


def same_tensors(
    sides: tuple[Checkpoint, Checkpoint],
    indexes: tuple[IntArray, IntArray],
    pairs: Sequence[FilePair],
) -> npt.NDArray[np.bool_]:
    """For each pair of tensors of one size, whether both lie at one place of files in ``pairs``.

    ``indexes`` are the positions of the tensors in the tables of the base and the tuned side.
    """
    if not pairs:
        return np.zeros(len(indexes[0]), np.bool_)
    # tensors in no file have -1 there, and so the last partner, which is none of theirs either
    partner = np.full(len(sides[1].files) + 1, -2, np.int64)
    for i, j in pairs:
        partner[j] = i
    files, offsets = [], []
    for side, index in zip(sides, indexes, strict=True):
        files.append(side.file_index[index])
        offsets.append(side.offset[index])
    same: npt.NDArray[np.bool_] = (partner[files[1]] == files[0]) & (offsets[0] == offsets[1])
    return same


def known_by(side: Checkpoint, tensor: int) -> str:
    """What a tensor is known by that was not read: ``CONTENT@OFFSET``, the hash of its file and the
    byte of the file at which it begins; empty where the file has no hash.
    """
    position = int(side.file_index[tensor])
    if position < 0:
        return ""
    file = side.files[position]
    return f"{file.content}@{int(side.offset[tensor])}" if file.content else ""
