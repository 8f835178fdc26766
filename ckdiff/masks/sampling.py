"""Exactly k of n elements, every choice equally likely, any part of them drawn alone.

Every element of a *population* (a tensor, or the model) has a random 64-bit key, and those with the
k smallest keys are changed. That is uniform over all masks with exactly k changed elements, needs
no floating point, and lets any chunk be drawn alone once the k-th smallest key, the *limit*, is
known. It is found by counting the keys below a narrow window in which the limit must be, as good as
always, and looking only at those inside. See docs/design/0011-random-masks.md.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.abi import DRAW_SCRATCH
from ckdiff.kernels.sample import Stream, draw, near
from ckdiff.running.memory import Need

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]

_LARGEST = (1 << 64) - 1
_SIGMAS = 8  # half the width of the first window around where the limit is expected


@dataclass(slots=True)
class Population:
    """Some elements of which a fixed number is changed, all choices being equally likely."""

    seed: int
    label: str
    elements: int
    changed: int
    limit: int | None = None  #: the largest key of a changed element, once it is known
    stream: Stream = (0, 0)
    _attempt: int = -1
    _width: float = _SIGMAS

    def __post_init__(self) -> None:
        if self.changed == self.elements:
            self.limit = _LARGEST
        self._begin()

    def _begin(self) -> None:
        """Give all elements their keys, or new ones."""
        self._attempt += 1
        text = f"ckdiff random mask 1\0{self.seed}\0{self._attempt}\0{self.label}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        key, high = struct.unpack_from("<QQ", digest)
        self.stream = key, high

    def window(self) -> tuple[int, int]:
        """The limit is in here, first end excluded, but for once in 10^15 times."""
        n, k = self.elements, self.changed
        # Floats decide only where to look first, never what is found.
        half = (self._width * math.sqrt(k * (n - k) / n) + 5 * self._width) / n
        ends = (int((k / n + side * half) * 2.0**64) for side in (-1, 1))
        low, high = (max(0, min(end, _LARGEST)) for end in ends)
        return low, high

    def settle(self, below: int, keys: Keys) -> None:
        """Find the limit among all keys of the window; ``below`` are at most its low end.

        Where it is not among them, the window is made wider. Should two keys be equal right at the
        limit (once in 2**64 / elements times), all elements get new keys: no number of smallest
        keys would then be exact, and which elements it happens to does not depend on their places.
        """
        low, _ = self.window()
        rank = self.changed - below
        if rank == 0:
            self.limit = low
        elif 0 < rank <= len(keys):
            keys = np.sort(keys)
            if rank < len(keys) and keys[rank] == keys[rank - 1]:
                self._begin()
            else:
                self.limit = int(keys[rank - 1])
        elif rank < 0 and low == 0:  # several keys are 0
            self._begin()
        else:
            self._width *= _SIGMAS

    def look(self, word: int, elements: int) -> Seen:
        """What is seen of so many elements, the first in mask word ``word`` of the population."""
        low, high = self.window()
        expected = elements * (high - low) / 2.0**64
        room = min(elements, int(expected + 8 * math.sqrt(expected)) + 64)
        while True:
            below, found, keys = near(self.stream, word, elements, low, high, room)
            if found <= room:
                return Seen(elements, below, [keys])
            room = found

    def draw(self, word: int, elements: int, mask: Bytes) -> int:
        """Write the bits of so many elements to where ``mask`` begins; gives how many are set."""
        if not self.changed:
            return 0
        assert self.limit is not None
        return draw(self.stream, word, elements, self.limit, mask)


@dataclass(slots=True)
class Seen:
    """What was seen of a population so far."""

    elements: int
    below: int  #: keys that are at most the window's low end
    keys: list[Keys]  #: those inside the window

    def add(self, other: Seen) -> None:
        """Take in what was seen elsewhere of the same."""
        self.elements += other.elements
        self.below += other.below
        self.keys += other.keys


def memory(populations: Sequence[Population]) -> Need:
    """What drawing takes. Populations that go on in other chunks wait: one that is all of the model
    for all of it, others about as many as there are workers, at either end of a chunk.
    """
    most = max((population.elements for population in populations), default=0)
    # the keys in a window, at most: as they were found, joined, and sorted
    keys = 3 * 8 * _SIGMAS * (math.isqrt(most) + 10)
    one = len(populations) == 1
    return Need(
        tables=600 * len(populations) + (keys if one else 0),
        worker=DRAW_SCRATCH + (0 if one else 2 * keys),
    )
