"""What a chunk of a timeline adds up to, how the journal keeps it, and the sums of all chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckdiff.kernels.paths import COUNTS, Float64
from ckdiff.kernels.timeline import Sums
from ckdiff.layout import IntArray
from ckdiff.stores.objects import file_digest
from ckdiff.stores.workdir import WorkDir, store_errors


@dataclass(slots=True)
class TimelineChunk:
    """What a chunk adds up to; rows are the tensors of the chunk in address order."""

    tensors: IntArray  #: positions in the layout
    sums: Sums
    objects: dict[str, tuple[int, str]]  #: key, from the timeline's directory -> size, digest

    @classmethod
    def of(
        cls, tensors: IntArray, sums: Sums, objects: dict[str, tuple[int, str]]
    ) -> TimelineChunk:
        """The result of a chunk."""
        return cls(tensors, sums, objects)

    def to_bytes(self) -> bytes:
        """For the journal."""
        sums = self.sums
        rows, steps, rules = sums.firsts.shape
        shape = [rows, steps + 1, rules, sums.moves.shape[1] - 1]
        stats = sums.paths.shape[1] > 0
        head = {"shape": shape, "stats": stats, "objects": self.objects}
        parts = self.tensors, sums.firsts, sums.nexts, sums.hashes, sums.moves, sums.paths
        return json.dumps(head).encode() + b"\n" + b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> TimelineChunk:
        """What ``to_bytes`` wrote; ValueError where it does not add up."""
        line, _, body = data.partition(b"\n")
        head = json.loads(line)
        rows, sides, rules, steps = map(int, head["shape"])
        sums = Sums(rows, sides, rules, steps, stats=bool(head["stats"]))
        words = np.frombuffer(body, np.int64)
        arrays = (
            sums.firsts, sums.nexts, sums.hashes.view(np.int64), sums.moves,
            sums.paths.view(np.int64),
        )  # fmt: skip
        if len(words) != rows + sum(array.size for array in arrays):
            raise ValueError("sizes do not add up")
        tensors, at = words[:rows].copy(), rows
        for array in arrays:
            array[...] = words[at : at + array.size].reshape(array.shape)
            at += array.size
        objects = {key: (size, digest) for key, (size, digest) in head["objects"].items()}
        return cls(tensors, sums, objects)


class TimelineSums:
    """Sums over chunks, per tensor.

    Integers can be added in any order; lengths are added in address order, so that they do not
    depend on which worker was faster: those of a chunk wait until the chunks before have come.
    """

    def __init__(
        self, tensors: int, sides: int, rules: int, steps: int, *, stats: bool = False
    ) -> None:
        self.sums = Sums(tensors, sides, rules, steps, stats=stats)
        self.objects: dict[str, tuple[int, str]] = {}
        self._next = 0
        self._waiting: dict[int, tuple[IntArray, Float64]] = {}

    def add(self, chunk: int, result: TimelineChunk) -> None:
        """Take in one chunk's result."""
        for name in ("firsts", "nexts", "hashes", "moves"):
            getattr(self.sums, name)[result.tensors] += getattr(result.sums, name)
        self.objects.update(result.objects)
        if not self.sums.paths.shape[1]:
            return
        self._waiting[chunk] = result.tensors, result.sums.paths
        while self._next in self._waiting:
            tensors, found = self._waiting.pop(self._next)
            sums = self.sums.paths[tensors]
            sums[..., :COUNTS] += found[..., :COUNTS]
            sums.view(np.int64)[..., COUNTS:] += found.view(np.int64)[..., COUNTS:]
            self.sums.paths[tensors] = sums
            self._next += 1

    def hashes(self, side: int) -> npt.NDArray[np.uint64]:
        """(low, high) of each tensor of a side."""
        return self.sums.hashes[:, side]


Recorder = Callable[[int, TimelineChunk], None]


def recorder(work: WorkDir, collected: TimelineSums) -> Recorder:
    """What takes in the results of a run, so that they can be resumed from."""

    def record(chunk: int, result: TimelineChunk) -> None:
        with store_errors(work.out):
            work.record(chunk, result.to_bytes())
        collected.add(chunk, result)

    return record


def resume(work: WorkDir, collected: TimelineSums, chunks: int) -> list[int]:
    """Add up what an earlier run finished; gives the chunks that are left to do."""
    todo = []
    for chunk in range(chunks):
        found = _finished(work, chunk)
        if found is None or not _fits(found.sums, collected.sums):
            todo.append(chunk)
        else:
            collected.add(chunk, found)
    return todo


def _fits(found: Sums, wanted: Sums) -> bool:
    pairs = (found.moves, wanted.moves), (found.paths, wanted.paths)
    return all(one.shape[1] == other.shape[1] for one, other in pairs)


def _finished(work: WorkDir, chunk: int) -> TimelineChunk | None:
    """The result of a chunk that an earlier run finished, if its objects are still whole."""
    payload = work.recorded(chunk)
    if payload is None:
        return None
    try:
        result = TimelineChunk.from_bytes(payload)
        for key, (size, digest) in result.objects.items():
            path = work.store / key
            # after a power cut a file can have its size and not its bytes
            if path.stat().st_size != size or file_digest(path) != digest:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result
