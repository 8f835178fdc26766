"""What a delta is made of: the names of its parts, their digests, and the table of its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import printable

FORMAT = "ckdiff-delta"
VERSION = 1
NEWER = 2  #: of deltas with tensors that are made from a range
PREFIX = "ckdiff."
DATA, FRAMES, TENSORS, HEADS, MANIFEST = (
    PREFIX + part for part in ("data", "frames", "tensors", "heads", "manifest")
)
_SHOWN = 120  # characters of a name in a message
_AT_ONCE = 1000  # entries of a header that are objects at a time

UInt64 = npt.NDArray[np.uint64]


def called(name: str) -> str:
    """A tensor's name for a message: it may be as long as a header, and hold anything."""
    return printable(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def digest(data: bytes | memoryview) -> str:
    """What parts of a delta are checked by."""
    return xxhash.xxh3_128_hexdigest(data)


def entries_digest(entries: Iterable[list[Any]]) -> str:
    """Of what a header says, whatever blanks are in it: of the JSON text of the list of entries."""
    state, rest = xxhash.xxh3_128(b"["), iter(entries)
    between = b""
    while some := list(islice(rest, _AT_ONCE)):
        state.update(between + json.dumps(some)[1:-1].encode())
        between = b", "
    state.update(b"]")
    return state.hexdigest()


@dataclass(slots=True)
class Tensors:
    """What a delta says about each rebuilt tensor, in columns."""

    based: npt.NDArray[np.bool_]  #: whether it is made from one of the base's tensors
    base_hashes: UInt64  #: (tensors, 2): hash sums of the base's tensor, low and high
    tuned_hashes: UInt64  #: (tensors, 2)
    changed: IntArray  #: elements

    ROW: ClassVar[int] = 1 + 16 + 16 + 8  #: bytes

    @classmethod
    def empty(cls, count: int) -> Tensors:
        sums = np.zeros((2, count, 2), np.uint64)
        return cls(np.zeros(count, np.bool_), sums[0], sums[1], np.zeros(count, np.int64))

    def to_bytes(self) -> bytes:
        columns = self.based, self.base_hashes, self.tuned_hashes, self.changed
        return b"".join(np.ascontiguousarray(column).tobytes() for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> Tensors:
        """What ``to_bytes`` gave of ``count`` tensors; ValueError for what it never gives."""
        flags = np.frombuffer(data, np.uint8, count)
        if (flags > 1).any():
            raise ValueError("whether a tensor has a base is neither 0 nor 1")
        hashes, changed = data[count : 33 * count], data[33 * count :]
        sums = np.frombuffer(hashes, np.uint64).reshape(2, count, 2)
        return cls(flags != 0, sums[0], sums[1], np.frombuffer(changed, np.int64))
