"""Advising about several ranges at a time."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from ckdiff.kernels.advising import advise
from ckdiff.kernels.memory import bytes_at

PAGE, PAGES = mmap.PAGESIZE, 8
_NO_SUCH = 9999  # advice


def test_ranges_are_advised_until_one_is_refused() -> None:
    """Pages of anonymous memory that are not needed are zeros again."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, PAGE * PAGES, flags=private) as held:
        held.write(b"\1" * PAGE * PAGES)
        data = np.frombuffer(held, np.uint8)
        first = data.ctypes.data
        ranges = [(first, PAGE), (first + 2 * PAGE, 2 * PAGE), (first + 5, PAGE), (first, PAGE)]
        assert advise(np.array(ranges, np.int64), mmap.MADV_DONTNEED) == 2
        pages = bytes_at(first, PAGE * PAGES).reshape(PAGES, PAGE)
        assert pages.any(axis=1).tolist() == [False, True, False, False, *[True] * 4]
        assert advise(np.array(ranges[:2], np.int64), _NO_SUCH) == 0
        assert advise(np.empty((0, 2), np.int64), mmap.MADV_DONTNEED) == 0
        del data, pages


def test_what_is_no_range() -> None:
    with pytest.raises(ValueError, match="an address and a size"):
        advise(np.zeros((1, 3), np.int64), mmap.MADV_NORMAL)
