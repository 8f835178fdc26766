"""The shape of a mask, counted with numpy on whole matrices: the twin of the profile kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Shape(NamedTuple):
    rows: list[int]
    columns: list[int]
    blocks16: int
    blocks128: int
    fours: list[int]  #: of the whole fours of each row, how many have 0, 1, 2, 3, 4 ones


def shape_of(mask: npt.NDArray[np.bool_]) -> Shape:
    rows, columns = mask.shape
    fours = mask[:, : columns // 4 * 4].reshape(rows, columns // 4, 4).sum(axis=2)

    def blocks(size: int) -> int:
        padded = np.pad(mask, ((0, -rows % size), (0, -columns % size)))
        tiles = padded.reshape(padded.shape[0] // size, size, padded.shape[1] // size, size)
        return int(tiles.any(axis=(1, 3)).sum())

    return Shape(
        mask.sum(1).tolist(),
        mask.sum(0).tolist(),
        blocks(16),
        blocks(128),
        np.bincount(fours.ravel(), minlength=5).tolist(),
    )
