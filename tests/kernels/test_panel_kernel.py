"""Comparing panel by panel is comparing what was copied before."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_runs import kernels

from ckdiff.kernels import Results, abi, panels
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.panels import Panel
from ckdiff.kernels.strided import copying

ROWS, COLUMNS, HEIGHT = 192, 1024, 64  # of the matrix, and of a panel


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32"])
def test_counts_hashes_and_masks_are_those_of_the_copied_matrix(dtype: str) -> None:
    """A turned matrix beside another one; what lies after it is compared where it is."""
    width = {"U8": 1, "BF16": 2, "F32": 4}[dtype]
    rng = np.random.default_rng(width)
    word = np.dtype(f"u{width}")
    turned = rng.integers(0, 200, (COLUMNS, ROWS), word)
    flat = np.ascontiguousarray(turned.T)
    base = np.where(rng.random(flat.shape) < 0.1, flat ^ 1, flat).astype(word)
    rest = [rng.integers(0, 2, 3 * UNIT, word) for _ in range(2)]
    compared = kernels((dtype,), ("exact", "atol=1"))
    end = ROWS * COLUMNS
    tail = [*(side.ctypes.data for side in rest), 3 * UNIT, end, 0, 7, 1]
    size = (end + 3 * UNIT) // 8

    wanted, masks = Results(2, 2, with_statistics=False), [np.zeros(size, np.uint8) for _ in "ab"]
    whole = [base.ctypes.data, flat.ctypes.data, end, 0, 0, 0, 0]
    compared.run(np.array([whole, tail], np.int64), masks, wanted)

    pitch = COLUMNS * width + 64
    room, source = np.empty(HEIGHT * pitch, np.uint8), turned.reshape(-1).view(np.uint8)
    rows = np.arange(ROWS)
    segments = np.zeros((ROWS + 1, abi.SEG_COLUMNS), np.int64)
    segments[:-1, abi.SEG_BASE] = base.ctypes.data + rows * COLUMNS * width
    segments[:-1, abi.SEG_TUNED] = room.ctypes.data + rows % HEIGHT * pitch
    segments[:-1, abi.SEG_ELEMENTS], segments[:-1, abi.SEG_POSITION] = COLUMNS, rows * COLUMNS
    segments[:-1, abi.SEG_UNIT] = rows * COLUMNS // UNIT
    segments[-1] = tail
    some = [
        Panel(
            copying(
                source[low * width :], room, (HEIGHT, COLUMNS), (1, ROWS), (pitch // width, 1),
                width,
            ),
            low,
            low + HEIGHT,
        )
        for low in range(0, ROWS, HEIGHT)
    ]  # fmt: skip
    found, bits = Results(2, 2, with_statistics=False), [np.zeros(size, np.uint8) for _ in "ab"]
    compared.run_panels(segments, bits, found, [*some[::-1], Panel(None, ROWS, ROWS + 1)])
    assert found.changed.tolist() == wanted.changed.tolist()
    assert found.hashes.tolist() == wanted.hashes.tolist()
    for mine, theirs in zip(bits, masks, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    "ends", [[(0, 1)], [(0, 2), (1, 3)], [(0, 4)], [(-1, 3)], [(2, 1), (0, 3)]]
)
def test_panels_have_each_segment_once(ends: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"reach|once"):
        panels.table([Panel(None, *each) for each in ends], 3)


def test_panels_without_segments_are_only_copied() -> None:
    assert panels.table([Panel(None, 1, 1), Panel(None, 1, 3), Panel(None, 0, 1)], 3).shape == (
        3,
        6,
    )
    assert panels.table([], 0).shape == (0, abi.PANEL_COLUMNS)
