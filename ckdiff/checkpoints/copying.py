"""Copies of boxes of elements from what a reader holds into a buffer, a stretch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.kernels import strided
from ckdiff.kernels.memory import bytes_at

Index = tuple[int, ...]
Request = tuple[int, int, int]  #: (source, begin, bytes)
Columns = tuple[IntArray, IntArray, IntArray]  #: requests, as readers take them

#: bytes of a window that may be read for nothing, because they lie between what is copied
BETWEEN = 1 << 18
#: bytes that are read at a time of what lies farther apart, at least: else as many as the window's
STRETCH = 1 << 20


@dataclass(slots=True)
class Copy:
    """A box that is copied, as two strided views of elements."""

    request: int  #: which of what is acquired holds it
    begin: int  #: byte of the buffer at which its first element goes
    shape: Index
    strides: Index  #: elements in the source
    into: Index  #: elements in the buffer
    width: int  #: bytes of an element

    def twice(self, further: int, away: int) -> Copy:
        """Itself and another one so many bytes further on in the source, and away in the buffer."""
        return Copy(
            self.request, self.begin, (2, *self.shape),
            (further // self.width, *self.strides), (away // self.width, *self.into), self.width,
        )  # fmt: skip

    @property
    def reach(self) -> int:
        """Bytes of the source from its first element to its last."""
        return (1 + last(self.shape, self.strides)) * self.width

    def asked(self, requests: list[Request], request: Request) -> Copy:
        """Itself, once ``request`` is one more of those."""
        self.request = len(requests)
        requests.append(request)
        return self

    def run(self, source: int, into: int) -> None:
        """Copy from the lowest address of its elements to that of those in the buffer."""
        room = (1 + last(self.shape, self.into)) * self.width
        strided.copy(
            bytes_at(source, self.reach), bytes_at(into, room, writable=True),
            self.shape, self.strides, self.into, self.width,
        )  # fmt: skip


def columns_of(requests: Iterable[Request]) -> Columns:
    """Requests as a reader takes them."""
    numbers = np.array(list(requests), np.int64).reshape(-1, 3)
    sources, begins, sizes = (np.ascontiguousarray(column) for column in numbers.T)
    return sources, begins, sizes


def stretches(
    far: Iterable[tuple[Copy, Request]], most: int
) -> Iterator[tuple[list[Copy], Columns]]:
    """What to copy from stretches of the sources that have ``most`` bytes together."""
    copies: list[Copy] = []
    requests: list[Request] = []
    room = most
    for whole, request in far:
        for copy, begin, size in parts(whole, most):
            if size > room and copies:
                yield copies, columns_of(requests)
                copies, requests, room = [], [], most
            copies.append(copy)
            requests.append((request[0], request[1] + begin, size))
            room -= size
    if copies:
        yield copies, columns_of(requests)


def parts(copy: Copy, most: int) -> Iterator[tuple[Copy, int, int]]:
    """A copy in parts that reach over ``most`` bytes of the source at most; where each begins
    there, counted from the copy's first byte, and its bytes.
    """
    width, reach = copy.width, copy.reach
    if reach <= most or prod(copy.shape) == 1:
        yield copy, 0, reach
        return
    # cut where the steps are the longest
    long = max(range(len(copy.shape)), key=lambda i: (copy.shape[i] > 1, copy.strides[i]))
    step = copy.strides[long] * width
    rest = reach - (copy.shape[long] - 1) * step
    count = max(1, (most - rest) // step + 1)
    for first in range(0, copy.shape[long], count):
        shape = list(copy.shape)
        shape[long] = min(count, shape[long] - first)
        begin = copy.begin + first * copy.into[long] * width
        part = replace(copy, begin=begin, shape=tuple(shape))
        for inner, at, size in parts(part, most):
            yield inner, first * step + at, size


def last(shape: Index, strides: Index) -> int:
    """Elements from the first of a box to its last."""
    steps = [abs(stride) for stride in strides]
    return sum(map(int.__mul__, shape, steps)) - sum(steps)
