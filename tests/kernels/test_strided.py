"""Boxes copied from one order to another, against a twin that goes from element to element."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.kernels import strided
from ckdiff.kernels.strided import WIDTHS, copy

Bytes = npt.NDArray[np.uint8]
Numbers = Sequence[int]
_GUARD = 64 * 5  # more than what is moved or picked at a time


def reach(shape: Numbers, strides: Numbers) -> int:
    return 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))


def packed(shape: Numbers) -> list[int]:
    return [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]


def twin(
    source: Bytes, out: Bytes, shape: Numbers, strides: Numbers, into: Numbers, width: int
) -> None:
    """One element after the other."""
    ends = [
        -sum(min((n - 1) * s, 0) for n, s in zip(shape, steps, strict=True))
        for steps in (strides, into)
    ]
    for index in itertools.product(*map(range, shape)):
        here, to = (
            (end + sum(i * s for i, s in zip(index, steps, strict=True))) * width
            for end, steps in zip(ends, (strides, into), strict=True)
        )
        out[to : to + width] = source[here : here + width]


def fast_twin(
    source: Bytes, out: Bytes, shape: Numbers, strides: Numbers, into: Numbers, width: int
) -> None:
    """By numpy's strides."""
    views = [
        np.lib.stride_tricks.as_strided(
            memory[-width * sum(min((n - 1) * s, 0) for n, s in zip(shape, steps, strict=True)) :],
            (*shape, width), (*(width * s for s in steps), 1), writeable=memory is out,
        )
        for memory, steps in ((out, into), (source, strides))
    ]  # fmt: skip
    views[0][...] = views[1]


def check(
    shape: Numbers, strides: Numbers, into: Numbers, width: int, by: Any = twin,
    *, shifts: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Copy random bytes with others around them; what is read ends where the array ends.

    ``shifts``: how many bytes later both begin than where arrays do.
    """
    random = np.random.default_rng(sum(shape) + width)
    begin, to = shifts[0], _GUARD + shifts[1]
    source = random.integers(0, 256, begin + reach(shape, strides) * width, np.uint8)[begin:]
    size = reach(shape, into) * width
    found = random.integers(0, 256, to + size + _GUARD, np.uint8)
    wanted = found.copy()
    by(source, wanted[to : to + size], shape, strides, into, width)
    copy(source, found[to : to + size], shape, strides, into, width)
    assert found.tobytes() == wanted.tobytes()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Shapes with the strides of arrays in any order, in steps, backwards or repeated."""
    shape = draw(st.lists(st.integers(1, 6) | st.sampled_from([9, 16, 33]), max_size=4))
    while np.prod(shape) > 3000:
        shape.pop()
    both = []
    for side in range(2):
        order = draw(st.permutations(range(len(shape))))
        step, strides = 1, [0] * len(shape)
        for axis in order:
            step *= draw(st.sampled_from([1, 1, 1, 2, 3, 4, 5]))
            strides[axis] = step * draw(st.sampled_from([1, 1, 1, -1]))
            step *= shape[axis]
            if not side and draw(st.integers(0, 7)) == 0:
                strides[axis] = 0
        both.append(strides)
    return shape, both[0], both[1], draw(st.sampled_from(WIDTHS))


@settings(deadline=None)
@given(boxes())
def test_any_box(box: tuple[list[int], list[int], list[int], int]) -> None:
    check(*box)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_small_box(width: int) -> None:
    """Two dimensions of all small sizes, in all orders and some steps."""
    for shape in itertools.product((1, 2, 3), repeat=2):
        for step, gap in ((1, 0), (1, 1), (2, 1)):
            rows = [step * (shape[1] + gap), step]
            turned = [step, step * (shape[0] + gap)]
            for strides, into in itertools.product((rows, turned), repeat=2):
                check(shape, strides, into, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_transposed(width: int, every: int) -> None:
    """Whole tiles, some more, and fewer; the last element of each row is the last of its memory."""
    side = 64 // width
    for rows, columns in ((side, side), (side + 1, 2 * side), (3 * side - 1, side + 3), (3, side)):
        for gap in (0, 1):
            into = columns + gap, 1
            check((rows, columns), (every, rows * every + gap), into, width, fast_twin)
    check((2, side + 2, side + 1), (5 * side, every, 20 * side), (9 * side**2, 2 * side, 1), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("every", [1, 2])
def test_transposed_from_anywhere_in_a_line(width: int, every: int) -> None:
    """Tiles begin where lines of the cache do, or nearly; there are more than in a band of them."""
    side = 64 // width
    for first, to in itertools.product(range(0, 64, 7), (0, 8, 33, 63)):
        shape = side + first % 5, side + to
        check(shape, (every, every * shape[0]), (shape[1], 1), width, fast_twin, shifts=(first, to))
    for rows in (side * side, side * side + 5):
        shape = rows, side + 1
        check(shape, (every, every * rows), (side + 1, 1), width, fast_twin, shifts=(8, 16))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_woven(width: int) -> None:
    """Two boxes whose rows alternate, from anywhere in a line, whichever is written first."""
    side = 64 // width
    for rows, columns in ((side, side), (side + 3, side + 1), (side * side // 2 + 5, side)):
        strides, size = (1, 2, 2 * rows + 1), rows * columns
        for away, first in itertools.product((size, -size, 2 * size + 3), (0, 7, 8 + width, 62)):
            into = away, columns, 1
            check((2, rows, columns), strides, into, width, fast_twin, shifts=(first, 5))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("every", [2, 3])
def test_interleaved(width: int, every: int) -> None:
    for size in (*range(1, 36), 63, 64, 65):
        check((size,), (every,), (1,), width, fast_twin)
        check((3, size), (size * every, every), (size + 1, 1), width, fast_twin)


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_of_any_length(width: int) -> None:
    for size in (*range(1, 70), 127, 128, 129, 1000):
        check((3, size), (size + 1, 1), (size + 2, 1), width, fast_twin)


@pytest.mark.parametrize(
    ("shape", "strides", "kind"),
    [
        ((), (), "runs"),
        ((4, 5, 6), (30, 6, 1), "runs"),  # one
        ((1, 40, 1, 64), (7, 64, 9, 1), "runs"),
        ((40, 64), (128, 1), "runs"),
        ((64, 128), (1, 64), "tiles 2,1"),
        ((8, 4, 16), (4, 1, 32), "lines 2,0"),  # fewer than a tile has
        ((64, 128), (2, 128), "tiles 2,2"),
        ((64, 128), (3, 300), "lines 2,0"),
        ((2, 64, 128), (1, 2, 128), "woven 2,1"),
        ((2, 64, 128), (-1, 2, 128), "tiles 2,2"),
        ((2, 64, 128), (8192, 1, 64), "tiles 2,1"),
        ((100, 64), (256, 2), "lines 2,2"),
        ((100, 64), (0, 1), "runs"),
    ],
)
def test_how_a_box_is_copied(shape: Numbers, strides: Numbers, kind: str) -> None:
    plan = strided._plan(tuple(shape), tuple(strides), tuple(packed(shape)), 2)
    assert plan is not None
    assert plan.kind == kind
    check(shape, strides, packed(shape), 2)


def test_nothing_is_copied_of_nothing() -> None:
    nothing = np.zeros(0, np.uint8)
    copy(nothing, nothing, (3, 0), (1, 1), (0, 1), 2)


def _call(**wrong: Any) -> None:
    right: dict[str, Any] = {
        "source": np.zeros(24, np.uint8), "out": np.zeros(24, np.uint8), "shape": (3, 4),
        "source_strides": (1, 3), "out_strides": (4, 1), "width": 2,
    }  # fmt: skip
    copy(**(right | wrong))


def test_boxes_that_do_not_fit() -> None:
    _call()
    for wrong in (
        {"source": np.zeros(23, np.uint8)},
        {"out": np.zeros(23, np.uint8)},
        {"out": np.zeros(48, np.uint8)[::2]},
        {"out": np.frombuffer(bytes(24), np.uint8)},
        {"shape": (3, -4)},
        {"shape": (3,)},
        {"source_strides": (1,)},
        {"source_strides": (-1, 4)},
        {"out_strides": (0, 1)},
        {"width": 3},
        {"width": 0},
    ):
        with pytest.raises(ValueError, match=r"box|kernel"):
            _call(**wrong)
    with pytest.raises(TypeError):
        _call(source=np.zeros(24, np.int8))
