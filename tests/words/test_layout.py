"""The address space: every element at one address, every address in one chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckdiff.layout import ALIGNMENT, CHUNK, Layout

SIZES = st.one_of(
    st.integers(0, 3), st.integers(0, 2000), st.sampled_from([511, 512, 513, 1024]),
    st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5]),
)  # fmt: skip


def covered(layout: Layout, first: int, stop: int) -> list[tuple[int, int, int]]:
    """(tensor, first element, stop) of each span, after checking that the columns agree."""
    spans = layout.spans(first, stop)
    assert len(spans) == len(spans.starts) == len(spans.elements) == len(spans.addresses)
    assert (np.diff(spans.tensors) > 0).all()
    assert (spans.elements > 0).all()
    assert (spans.addresses >= first).all()
    assert (spans.addresses + spans.elements <= stop).all()
    assert (spans.addresses == layout.starts[spans.tensors] + spans.starts).all()
    ends = spans.starts + spans.elements
    return list(zip(spans.tensors.tolist(), spans.starts.tolist(), ends.tolist(), strict=True))


@settings(deadline=None)
@given(
    st.lists(SIZES, max_size=12),
    st.sampled_from([1 << 19, 1 << 24, CHUNK]),
    st.sampled_from([CHUNK, 1 << 23]),
)
@example([], CHUNK, CHUNK)
@example([0], CHUNK, CHUNK)
@example([0, 0, 5, 0, 0, CHUNK, 0], 1 << 19, CHUNK)
@example([512, 511, 5], 512, 512)
def test_windows_cover_every_element_once(sizes: list[int], window: int, chunk_size: int) -> None:
    layout = Layout(np.array(sizes, np.int64), chunk_size)
    assert (layout.starts % ALIGNMENT == 0).all()
    at = [0] * len(sizes)
    end = 0
    for chunk in range(layout.chunks):
        first, stop = layout.chunk_range(chunk)
        assert first == end == chunk * chunk_size
        assert first < stop <= layout.total
        end = stop
        pieces = [p for low in range(first, stop, window)
                  for p in covered(layout, low, min(low + window, stop))]  # fmt: skip
        for tensor, start, until in pieces:
            assert at[tensor] == start
            assert start % ALIGNMENT == 0
            at[tensor] = until
        # the chunk as a whole lists the same tensors
        assert sorted({p[0] for p in pieces}) == [p[0] for p in covered(layout, first, stop)]
    assert end == layout.total
    assert at == sizes


def test_byte_ranges_follow_the_width_of_each_tensor() -> None:
    layout = Layout(np.array([1024, 0, 8, 1024], np.int64))
    starts, nbytes = layout.spans(512, 2048).byte_ranges(np.array([4, 8, 6, 64], np.int64))
    assert starts.tolist() == [256, 0, 0]  # half of the first, none of the second
    assert nbytes.tolist() == [256, 6, 8 * 512]


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=12))
def test_tensors_lie_one_after_the_other(sizes: list[int]) -> None:
    layout = Layout(np.array(sizes, np.int64))
    end = 0
    for start, size in zip(layout.starts.tolist(), sizes, strict=True):
        assert start == end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    assert layout.total == end
    assert layout.chunks == -(-end // CHUNK)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1500), max_size=30), st.data())
def test_any_range(sizes: list[int], data: st.DataObject) -> None:
    layout = Layout(np.array(sizes, np.int64))
    units = layout.total // ALIGNMENT
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, units)] * 2)))
    first, stop = low * ALIGNMENT, high * ALIGNMENT
    expected = []
    for tensor, (start, size) in enumerate(zip(layout.starts.tolist(), sizes, strict=True)):
        begin, end = max(start, first), min(start + size, stop)
        if end > begin:
            expected.append((tensor, begin - start, end - start))
    assert covered(layout, first, stop) == expected


def test_very_many_elements() -> None:
    huge = 1 << 50
    layout = Layout(np.array([huge, 1, huge - 1], np.int64))
    assert layout.total == 2 * huge + ALIGNMENT
    assert covered(layout, huge, huge + 2 * ALIGNMENT) == [(1, 0, 1), (2, 0, ALIGNMENT)]


@pytest.mark.parametrize("count", [0, 1, 100_000])
def test_tensors_without_elements_lie_nowhere(count: int) -> None:
    layout = Layout(np.zeros(count, np.int64))
    assert layout.total == 0
    assert layout.chunks == 0
    assert len(layout.spans(0, CHUNK)) == 0
