"""How the bits of principal and of low masks come about, a chunk at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckdiff import budget
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.errors import BudgetError, CheckpointError, CkdiffError, printable
from ckdiff.kernels.memory import views
from ckdiff.layout import Layout, Spans
from ckdiff.running.memory import PROCESS, Need
from ckdiff.running.threads import Stopped, run_threads
from ckdiff.runs.principals.low import Keys, Limit, magnitudes, smallest, taken
from ckdiff.runs.spectra.matrix import (
    finite,
    rank_of_energy,
    read_matrix,
    vectors_memory,
)
from ckdiff.runs.values import FloatReader, Floats
from ckdiff.stores.building import Bytes, Maker, OnBytes
from ckdiff.stores.table import IntArray

_WINDOW = 1 << 20  #: elements
ENERGY = 0.9  #: of the squares of the singular values, without a rank


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What masks are made of: a checkpoint, and how many elements of each tensor are marked."""

    checkpoint: Checkpoint
    index: Sequence[int]  #: for each tensor of the layout its position in the checkpoint
    layout: Layout
    wanted: Sequence[int]

    def touched(self, chunks: Sequence[int]) -> list[int]:
        """The tensors of some chunks of which some elements are marked, but not all."""
        ranges = (self.layout.chunk_range(chunk) for chunk in chunks)
        found = {i for span in ranges for i in self.layout.spans(*span).tensors.tolist()}
        sizes = self.layout.elements
        return sorted(i for i in found if 0 < self.wanted[i] < sizes[i])

    def verify(self, changed: IntArray) -> None:
        """Raise CkdiffError unless as many are marked as should be."""
        if changed.tolist() != list(self.wanted):
            raise CkdiffError(
                f"a mask must have exactly {sum(self.wanted):,} marked elements, and "
                f"{int(changed.sum()):,} were found",
                hint="please report it",
            )


class LowMask(Maker):
    """Marks the elements of the smallest magnitude of each tensor."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self._limits: dict[int, Limit] = {}
        #: for tensors of several chunks: elements equal to the limit before each chunk they are in
        self._before: dict[tuple[int, int], int] = {}
        self.total = 2 * chosen.layout.total // 8
        window = chosen.checkpoint.reader_memory(8 * _WINDOW)
        self.need = Need(tables=600 * len(chosen.index), worker=64 * _WINDOW + window)

    def prepare(
        self, chunks: Sequence[int], workers: int, tick: Callable[[], None], done: OnBytes
    ) -> None:
        """See Maker: find the limit of each tensor."""

        def task(chunk: int, stop: threading.Event) -> tuple[Limit, list[tuple[int, int]]]:
            found = self._limit(chunk, stop)  # a tensor is a piece of work here
            done(int(self._chosen.layout.elements[chunk]) // 8)
            return found

        def keep(tensor: int, found: tuple[Limit, list[tuple[int, int]]]) -> None:
            self._limits[tensor] = found[0]
            self._before |= {(tensor, chunk): count for chunk, count in found[1]}

        run_threads(self._chosen.touched(chunks), task, workers=workers, done=keep, tick=tick)

    def _limit(self, tensor: int, stop: threading.Event) -> tuple[Limit, list[tuple[int, int]]]:
        layout = self._chosen.layout
        elements, start = int(layout.elements[tensor]), int(layout.starts[tensor])
        bits = DTYPES[self._dtype(tensor)].bits

        def windows() -> Iterator[Keys]:
            for keys in self._keys(tensor, 0, elements):
                if stop.is_set():
                    raise Stopped
                yield keys

        limit = smallest(windows, bits, self._chosen.wanted[tensor])
        before, count = [], 0
        first, last = start // layout.chunk, (start + elements - 1) // layout.chunk
        for chunk in range(first, last + 1):
            before.append((chunk, count))
            if chunk < last:  # what is in the last one is before nothing
                low, high = layout.chunk_range(chunk)
                part = self._keys(tensor, max(low - start, 0), high - start)
                count += sum(int(np.count_nonzero(keys == limit.key)) for keys in part)
        return limit, before

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        chunk = first // self._chosen.layout.chunk
        columns = spans.tensors, spans.starts, spans.elements, spans.addresses
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (tensor, start, elements, address) in enumerate(rows):
            wanted, at = self._chosen.wanted[tensor], (address - first) // 8
            if wanted == self._chosen.layout.elements[tensor]:
                _fill(mask, at, elements)
                changed[row] = elements
            elif wanted:
                equal = self._before[tensor, chunk]
                for keys in self._keys(tensor, start, start + elements):
                    flags, equal = taken(keys, self._limits[tensor], equal)
                    bits = np.packbits(flags, bitorder="little")
                    mask[at : at + len(bits)] = bits
                    at += len(bits)
                    changed[row] += int(np.count_nonzero(flags))
            done(elements // 8)
            yield (address + elements - first) // 8

    def verify(self, changed: IntArray) -> None:
        """See Maker."""
        self._chosen.verify(changed)

    def _dtype(self, tensor: int) -> str:
        return self._chosen.checkpoint.table.dtypes[self._chosen.index[tensor]]

    def _keys(self, tensor: int, first: int, stop: int) -> Iterator[Keys]:
        """Magnitudes of elements [first, stop) of a tensor, a window of whole bytes at a time."""
        dtype, reader = self._dtype(tensor), self._chosen.checkpoint.reader()
        width = DTYPES[dtype].bits // 8
        place = np.array([self._chosen.index[tensor]], np.int64)
        try:
            for start in range(first, stop, _WINDOW):
                nbytes = np.array([min(_WINDOW, stop - start) * width], np.int64)
                begin = np.array([start * width], np.int64)
                data = views(reader.acquire(place, begin, nbytes), nbytes)[0]
                keys = magnitudes(data, dtype).copy()
                reader.release()
                yield keys
        finally:
            reader.close()


def _fill(mask: Bytes, at: int, elements: int) -> None:
    mask[at : at + elements // 8] = 255
    if elements % 8:
        mask[at + elements // 8] |= (1 << elements % 8) - 1


class PrincipalMask(Maker):
    """Marks the elements of the largest magnitude of each matrix's low-rank reconstruction.

    One matrix is in memory at a time. Its mask is kept until another one's is made: a matrix that
    lies in several chunks is decomposed once where they follow on each other.
    """

    def __init__(
        self,
        chosen: Chosen,
        shapes: Sequence[tuple[int, int]],
        rank: int | None,
        memory: str | int | None,
    ) -> None:
        self._chosen, self._shapes, self._rank = chosen, shapes, rank
        self._lock = threading.Lock()
        self._kept: tuple[int, Bytes] | None = None
        self.total = chosen.layout.total // 8
        needed = [
            vectors_memory(shapes[i]) + 12 * shapes[i][0] * shapes[i][1]
            for i in range(len(shapes)) if chosen.wanted[i] > 0
        ]  # fmt: skip
        _check_memory(max(needed, default=0), memory)

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        columns = spans.tensors, spans.starts, spans.elements, spans.addresses
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (tensor, start, elements, address) in enumerate(rows):
            at = (address - first) // 8
            if self._chosen.wanted[tensor]:
                bits = self._bits(tensor)[start // 8 : -(-(start + elements) // 8)]
                mask[at : at + len(bits)] = bits
                changed[row] = int(np.bitwise_count(bits).sum())
            done(elements // 8)
            yield (address + elements - first) // 8

    def verify(self, changed: IntArray) -> None:
        """See Maker."""
        self._chosen.verify(changed)

    def _bits(self, tensor: int) -> Bytes:
        """The packed mask of a whole tensor; one thread at a time makes one."""
        with self._lock:
            if self._kept is None or self._kept[0] != tensor:
                self._kept = tensor, self._made(tensor)
            return self._kept[1]

    def _made(self, tensor: int) -> Bytes:
        wanted, shape = self._chosen.wanted[tensor], self._shapes[tensor]
        reader = FloatReader(self._chosen.checkpoint)
        try:
            matrix = read_matrix(reader, self._chosen.index[tensor], shape)
        finally:
            reader.close()
        if not finite(matrix):
            name = self._chosen.checkpoint.table.names[self._chosen.index[tensor]]
            raise CheckpointError(
                f"{printable(name)} in {printable(self._chosen.checkpoint.label)} has elements "
                "that are not finite, so it has no singular vectors",
                hint="--kind low takes any numbers",
            )
        keys = reconstruction(matrix, self._rank).reshape(-1).view(np.uint32)
        keys &= np.uint32(0x7FFFFFFF)
        np.subtract(np.uint32(0x7FFFFFFF), keys, out=keys)  # the largest come first

        def windows() -> Iterator[Keys]:
            return (keys[at : at + _WINDOW] for at in range(0, len(keys), _WINDOW))

        limit, equal, parts = smallest(windows, 32, wanted), 0, []
        for part in windows():
            flags, equal = taken(part, limit, equal)
            parts.append(np.packbits(flags, bitorder="little"))
        return np.concatenate(parts)


def reconstruction(matrix: Floats, rank: int | None) -> Floats:
    """A matrix from its ``rank`` largest singular values; None: the fewest with 90 % of the energy.

    float32. ``matrix`` must be finite, and may not be used any more.
    """
    if not matrix.any():
        return matrix
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = rank or rank_of_energy(values.astype(np.float64), ENERGY)
    found: Floats = (left[:, :kept] * values[:kept]) @ right[:kept]
    return np.ascontiguousarray(found, np.float32)


def _check_memory(needed: int, memory: str | int | None) -> None:
    """Raise BudgetError where the largest matrix does not fit.

    Without ``memory`` it may take half of what the machine, or its cgroup, has.
    """
    from ckdiff.runs.spectra.plan import allowed_memory

    allowed, total = allowed_memory(memory), PROCESS + needed
    if total > allowed:
        raise BudgetError(
            f"{budget.format_size(allowed)} of memory is too little: the largest matrix and its "
            f"singular vectors take {budget.format_size(total)}",
            hint="raise --memory",
        )
