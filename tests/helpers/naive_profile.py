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
    fours = [0] * 5
    for row in mask:
        for at in range(0, columns - 3, 4):
            fours[int(row[at : at + 4].sum())] += 1

    def blocks(size: int) -> int:
        return sum(
            bool(mask[i : i + size, j : j + size].any())
            for i in range(0, rows, size)
            for j in range(0, columns, size)
        )

    return Shape(mask.sum(1).tolist(), mask.sum(0).tolist(), blocks(16), blocks(128), fours)
