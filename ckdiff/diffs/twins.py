"""Which tensors of a checkpoint have the bits of another: each candidate is read once, at most.

Nearly all are told apart by their first bytes. What begins alike is told apart by a digest of all
of it, and a twin is only called one after their bits were compared.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from xxhash import xxh3_128

from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.kernels.memory import views

_WINDOW = 1 << 20  # bytes that are read at a time
_FIRST = 1 << 12  # bytes that are looked at first


class _Bucket:
    """Tensors of the same content, in the order in which they may be named as a twin."""

    def __init__(self) -> None:
        self.members: list[tuple[int, str]] = []
        self._begin = 0

    def twin(self, tensor: int, taken: set[str]) -> tuple[int, str] | None:
        """The first that is another one and not taken; what is taken stays so."""
        members = self.members
        while self._begin < len(members) and members[self._begin][1] in taken:
            self._begin += 1
        rest = range(self._begin, len(members))
        return next(
            (members[k] for k in rest if members[k][0] != tensor and members[k][1] not in taken),
            None,
        )


class Twins:
    """The tensors of one checkpoint among which twins are looked for: (position, name) each."""

    def __init__(self, checkpoint: Checkpoint, reader: SpanReader) -> None:
        self._table, self._reader = checkpoint.table, reader
        self._alike: dict[Any, dict[bytes, list[tuple[int, str]]]] = {}
        self._buckets: dict[Any, dict[bytes, _Bucket]] = {}
        self._wholes: dict[int, bytes] = {}

    def add(self, tensors: list[tuple[int, str]]) -> None:
        """Candidates; those that come first are named first."""
        firsts: dict[Any, dict[bytes, list[tuple[int, str]]]] = self._alike
        for i, name in tensors:
            key = self._table.dtypes[i], self._table.shapes[i]
            firsts.setdefault(key, defaultdict(list))[self._digest(i, _FIRST)].append((i, name))

    def of(self, tensor: int, taken: set[str]) -> str | None:
        """The name of a candidate with the bits of this one, which is a candidate too."""
        key = self._table.dtypes[tensor], self._table.shapes[tensor]
        first = self._digest(tensor, _FIRST)
        like = self._alike[key][first]
        if len(like) < 2:
            return None
        buckets = self._buckets.setdefault((key, first), {})
        if not buckets:
            for i, name in like:
                buckets.setdefault(self._whole(i), _Bucket()).members.append((i, name))
        found = buckets[self._whole(tensor)].twin(tensor, taken)
        if found is None or not self._same_bits(tensor, found[0]):
            return None
        return found[1]

    def _whole(self, tensor: int) -> bytes:
        if tensor not in self._wholes:
            self._wholes[tensor] = self._digest(tensor, int(self._table.nbytes[tensor]))
        return self._wholes[tensor]

    def _digest(self, tensor: int, most: int) -> bytes:
        """Of a tensor's first ``most`` bytes."""
        found = xxh3_128()
        for start, count in _parts(min(most, int(self._table.nbytes[tensor])), _WINDOW):
            (data,) = _read(self._reader, (tensor,), start, count)
            found.update(data)
            self._reader.release()
        return found.digest()

    def _same_bits(self, one: int, other: int) -> bool:
        for start, count in _parts(int(self._table.nbytes[one]), _WINDOW):
            first, second = _read(self._reader, (one, other), start, count)
            same = np.array_equal(first, second)
            self._reader.release()
            if not same:
                return False
        return True


def constant(reader: SpanReader, tensor: int, size: int, shape: tuple[int, ...]) -> bool:
    """Whether all elements of a tensor have the same bits."""
    width = max(1, size // int(np.prod(shape, dtype=np.int64)))
    pattern = None
    for start, count in _parts(size, _WINDOW // width * width):
        (data,) = _read(reader, (tensor,), start, count)
        pattern = data[:width].copy() if pattern is None else pattern
        same = bool((data.reshape(-1, width) == pattern).all())
        reader.release()
        if not same:
            return False
    return True


def _parts(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(step, size - start)) for start in range(0, size, step)]


def _read(reader: SpanReader, tensors: tuple[int, ...], start: int, count: int) -> list[Any]:
    """The same bytes of each tensor; until the reader lets go of them."""
    index = np.array(tensors, np.int64)
    nbytes = np.full(len(tensors), count, np.int64)
    return list(
        views(reader.acquire(index, np.full(len(tensors), start, np.int64), nbytes), nbytes)
    )
