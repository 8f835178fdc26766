"""Adding up chunk results in address order, whatever order they arrive in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ckdiff.kernels import HASH_COLUMNS
from ckdiff.kernels import statistics as columns
from ckdiff.layout import IntArray, Layout
from ckdiff.stores.chunkresult import ChunkResult
from ckdiff.stores.objects import file_digest
from ckdiff.stores.table import Statistics
from ckdiff.stores.workdir import WorkDir, store_errors


class Collected:
    """Sums over chunks, per tensor.

    Counts and hash sums are integers and can be added in any order. Float statistics are added
    in address order, so that they do not depend on which worker was faster: a tensor's rows wait
    until the chunks before have come.
    """

    def __init__(self, tensors: int, rules: int, layout: Layout, *, with_statistics: bool) -> None:
        self.changed = np.zeros((tensors, rules), np.int64)
        self.hashes = np.zeros((tensors, HASH_COLUMNS), np.uint64)
        self.survived: IntArray | None = None  #: see ChunkResult; of all chunks
        self.objects: dict[str, tuple[int, str]] = {}
        self._chunks = layout.chunks
        self._next = 0
        self._waiting: dict[int, ChunkResult] = {}
        self._floats: npt.NDArray[np.float64] | None = None
        if with_statistics:
            self._floats = np.zeros((tensors, columns.HISTOGRAM), np.float64)
            self._counts = np.zeros((tensors, columns.COLUMNS - columns.SIGN_FLIPS), np.int64)

    def add(self, chunk: int, result: ChunkResult) -> None:
        """Take in one chunk's result."""
        self.changed[result.tensors] += result.changed
        self.hashes[result.tensors] += result.hashes
        self.objects.update(result.objects)
        if result.survived is not None:
            self.survived = result.survived + (0 if self.survived is None else self.survived)
        if self._floats is None:
            return
        self._waiting[chunk] = result
        while self._next in self._waiting:
            self._add_statistics(self._waiting.pop(self._next))
            self._next += 1

    def _add_statistics(self, result: ChunkResult) -> None:
        assert self._floats is not None
        assert result.statistics is not None
        rows, found = result.tensors, result.statistics
        sums = self._floats[rows]
        largest = np.maximum(sums[:, columns.MAX_ABS], found[:, columns.MAX_ABS])
        sums[:, : columns.SIGN_FLIPS] += found[:, : columns.SIGN_FLIPS]
        sums[:, columns.MAX_ABS] = largest
        self._floats[rows] = sums
        self._counts[rows] += found.view(np.int64)[:, columns.SIGN_FLIPS :]

    def statistics(self, defined: npt.NDArray[np.bool_]) -> Statistics | None:
        """The statistics columns; ``defined`` says for which tensors they have a meaning."""
        if self._floats is None:
            return None
        sums = self._floats
        histogram = self._counts[:, columns.HISTOGRAM - columns.SIGN_FLIPS :]
        return Statistics(
            sum_abs_delta=sums[:, columns.SUM_ABS],
            l2_delta=np.sqrt(sums[:, columns.SUM_SQUARES]),
            max_abs_delta=sums[:, columns.MAX_ABS],
            l2_base=np.sqrt(sums[:, columns.BASE_SQUARES]),
            l2_tuned=np.sqrt(sums[:, columns.TUNED_SQUARES]),
            dot=sums[:, columns.DOT],
            sign_flips=self._counts[:, 0],
            nonfinite=self._counts[:, columns.NONFINITE - columns.SIGN_FLIPS],
            ulp_histogram=[_trimmed(row) for row in histogram],
            defined=defined,
        )


def _trimmed(row: npt.NDArray[np.int64]) -> list[int]:
    """The histogram without the empty buckets at its end."""
    filled = np.flatnonzero(row)
    return [int(x) for x in row[: int(filled[-1]) + 1]] if filled.size else []


def resume(work: WorkDir | None, collected: Collected, chunks: int) -> list[int]:
    """Add up what an earlier run finished; gives the chunks that are left to do."""
    todo = []
    for chunk in range(chunks):
        found = None if work is None else finished_before(work, chunk)
        if found is None:
            todo.append(chunk)
        else:
            collected.add(chunk, found)
    return todo


def resuming(todo: list[int], chunks: int) -> str:
    """What people are told where an earlier run left only some of the chunks to do."""
    return f"resuming: {chunks - len(todo)} of {chunks} chunks were done already"


#: takes in the result of a chunk
Recorder = Callable[[int, ChunkResult], None]


def recorder(work: WorkDir | None, collected: Collected) -> Recorder:
    """What takes in the results of a run, so that they can be resumed from."""

    def record(chunk: int, result: ChunkResult) -> None:
        if work is not None:
            with store_errors(work.out):
                work.record(chunk, result.to_bytes())
        collected.add(chunk, result)

    return record


def finished_before(work: WorkDir, chunk: int) -> ChunkResult | None:
    """The result of a chunk that an earlier run finished, if its objects are still whole."""
    payload = work.recorded(chunk)
    if payload is None:
        return None
    try:
        result = ChunkResult.from_bytes(payload)
        for key, (size, digest) in result.objects.items():
            path = work.store / key
            # after a power cut a file can have its size and not its bytes
            if path.stat().st_size != size or file_digest(path) != digest:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return result
