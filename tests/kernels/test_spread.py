"""Tables of segments: of rows that are equally far apart, and what they reach from and to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import kernels

from ckdiff.kernels import Results, abi
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.spread import spread

Int64 = npt.NDArray[np.int64]


def plainly(heads: Int64, steps: Int64) -> list[list[int]]:
    """Row after row."""
    found = []
    for head, (rows, base, tuned, further) in zip(heads.tolist(), steps.tolist(), strict=True):
        for row in range(rows):
            segment = list(head)
            segment[abi.SEG_BASE] += row * base
            segment[abi.SEG_TUNED] += row * tuned
            segment[abi.SEG_POSITION] += row * further
            segment[abi.SEG_UNIT] += row * further // UNIT
            found.append(segment)
    return found


def table(data: st.DataObject) -> tuple[Int64, Int64]:
    number = st.integers(-(1 << 40), 1 << 40)
    count = data.draw(st.integers(0, 5))
    heads = [data.draw(st.lists(number, min_size=7, max_size=7)) for _ in range(count)]
    steps = [
        (data.draw(st.integers(0, 9)), data.draw(number), data.draw(number),
         UNIT * data.draw(st.integers(0, 1 << 20)))
        for _ in range(count)
    ]  # fmt: skip
    return (
        np.array(heads, np.int64).reshape(-1, abi.SEG_COLUMNS),
        np.array(steps, np.int64).reshape(-1, abi.STEP_COLUMNS),
    )


@settings(deadline=None)  # the kernel is compiled
@given(st.data())
def test_each_row_has_a_segment(data: st.DataObject) -> None:
    heads, steps = table(data)
    found = spread(heads, steps)
    assert found.shape[1] == abi.SEG_COLUMNS
    assert found.tolist() == plainly(heads, steps)


@pytest.mark.parametrize(
    ("rows", "further", "columns", "said"),
    [(-1, 0, 4, "no number"), (1 << 60, 0, 4, "no number"), (1, 3, 4, "whole units"),
     (1, 0, 3, "its steps")],
)  # fmt: skip
def test_what_is_no_table(rows: int, further: int, columns: int, said: str) -> None:
    steps = np.array([[rows, 0, 0, further]], np.int64)[:, :columns].copy()
    with pytest.raises(ValueError, match=said):
        spread(np.zeros((1, abi.SEG_COLUMNS), np.int64), steps)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-(1 << 60), 1 << 60), min_size=7, max_size=7), min_size=1))
def test_bounds_are_the_least_and_the_most_of_columns(rows: list[list[int]]) -> None:
    segments, found = np.array(rows, np.int64), np.empty(abi.BOUNDS, np.int64)
    c_function("bounds").ctypes(segments.ctypes.data, len(rows), found.ctypes.data)
    row, slot = segments[:, abi.SEG_ROW], segments[:, abi.SEG_SLOT]
    begins, sizes = segments[:, abi.SEG_POSITION], segments[:, abi.SEG_ELEMENTS]
    wanted = [
        row.min(), row.max(), slot.min(), slot.max(), min(begins.min(), sizes.min()),
        max(begins[0], (begins + sizes).max()),
    ]  # fmt: skip
    assert found.tolist() == wanted


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32", "F64"])
@pytest.mark.parametrize("gap", [0, 64, 4096])
@pytest.mark.parametrize("rules", [("exact",), ("exact", "atol=1")])
def test_short_rows_are_compared_as_one(dtype: str, gap: int, rules: tuple[str, ...]) -> None:
    """Rows of some units, so far apart in memory; the last of them is a ragged one."""
    width = {"U8": 1, "BF16": 2, "F32": 4, "F64": 8}[dtype]
    rng = np.random.default_rng(gap + width)
    wide, rows, rest = 2 * UNIT, 9, 77
    base = rng.integers(0, 200, rows * wide + rest, np.dtype(f"u{width}"))
    tuned = np.where(rng.random(len(base)) < 0.01, base ^ 1, base).astype(base.dtype)
    tuned[:wide] = base[:wide]
    compared, size = kernels((dtype,), rules), -(-len(base) // abi.LANES) * 8
    segments = np.zeros((rows + 1, abi.SEG_COLUMNS), np.int64)
    apart = []
    for side, column in ((base, abi.SEG_BASE), (tuned, abi.SEG_TUNED)):
        bytes_ = np.zeros((rows + 1, wide * width + gap), np.uint8)
        whole = side[: rows * wide].view(np.uint8).reshape(rows, -1)
        bytes_[:rows, : wide * width] = whole
        bytes_[rows, : rest * width] = side[rows * wide :].view(np.uint8)
        segments[:, column] = bytes_.ctypes.data + np.arange(rows + 1) * bytes_.shape[1]
        apart.append(bytes_)
    segments[:, abi.SEG_ELEMENTS] = [wide] * rows + [rest]
    segments[:, abi.SEG_POSITION] = np.arange(rows + 1) * wide
    segments[:, abi.SEG_UNIT] = 5 + np.arange(rows + 1) * 2
    one = np.array([[base.ctypes.data, tuned.ctypes.data, len(base), 0, 0, 5, 0]], np.int64)
    outcomes = []
    for table_ in (segments, one):
        into = Results(1, len(rules), with_statistics=False)
        masks = [np.zeros(size, np.uint8) for _ in rules]
        compared.run(table_, masks, into)
        outcomes.append((into.changed.tolist(), into.hashes.tolist(), [m.tobytes() for m in masks]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0][0][0] == (base != tuned).sum()
