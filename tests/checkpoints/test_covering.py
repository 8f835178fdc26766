"""Pieces of a tensor: they cover it once exactly where a naive count of each element says so."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.formats.covering import Box, cover_fault, is_shape


def naive(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    count = np.zeros(shape, int)
    for at, extent in boxes:
        if any(a < 0 or a + n > size for a, n, size in zip(at, extent, shape, strict=True)):
            return False
        count[tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))] += 1
    return bool((count == 1).all())


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape cut again and again, and then, sometimes, one piece made wrong."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        at, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        wide = [axis for axis, n in enumerate(extent) if n > 1]
        if not wide:
            boxes.append((at, extent))
            continue
        axis = draw(st.sampled_from(wide))
        low = draw(st.integers(1, extent[axis] - 1))
        first, second = list(extent), list(extent)
        first[axis], second[axis] = low, extent[axis] - low
        after = list(at)
        after[axis] += low
        boxes += [(at, tuple(first)), (tuple(after), tuple(second))]
    wrong = draw(st.integers(0, 3))
    victim = draw(st.integers(0, len(boxes) - 1))
    if wrong == 1:
        boxes.append(boxes[victim])
    elif wrong == 2:
        boxes.pop(victim)
    elif wrong == 3 and shape:
        at, extent = boxes[victim]
        axis = draw(st.integers(0, len(shape) - 1))
        moved = list(at)
        moved[axis] += draw(st.sampled_from([-1, 1]))
        boxes[victim] = tuple(moved), extent
    return shape, draw(st.permutations(boxes))


@given(tilings())
def test_it_is_what_a_count_of_each_element_says(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = tiling
    assert (cover_fault(shape, boxes) is None) == naive(shape, boxes)


def test_thousands_of_pieces_take_no_time() -> None:
    sides = itertools.product(range(60), range(40), range(10))
    boxes: list[Box] = [((a * 2, b * 3, c * 5), (2, 3, 5)) for a, b, c in sides]
    assert cover_fault((120, 120, 50), boxes) is None
    assert "overlap" in str(cover_fault((120, 120, 50), [*boxes[:-1], boxes[0]]))


def test_sizes_do_not_matter() -> None:
    huge = 1 << 50
    assert cover_fault((huge, 3), [((0, 0), (huge, 1)), ((0, 1), (huge, 2))]) is None
    assert "missing" in str(cover_fault((huge, 3), [((0, 0), (huge, 1))]))
    assert "beyond" in str(cover_fault((huge, 3), [((1, 0), (huge, 3))]))


@pytest.mark.parametrize(
    "numbers",
    [None, [1], (1.0,), (-1,), (True,), (1 << 62,), (1 << 31, 1 << 31), (0, 1 << 60), (1,) * 65],
)
def test_what_is_no_shape(numbers: object) -> None:
    assert not is_shape(numbers)
