"""Counting what differs between weights and copies of them, where the weights are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from ckdiff.checkpoints.places.held import Held
from ckdiff.checkpoints.places.heldtorch import held_tensor, synchronize
from ckdiff.checkpoints.places.memory import MemoryCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError
from ckdiff.kernels import Kernels, abi
from ckdiff.kernels.memory import Bytes, Int64, bytes_at
from ckdiff.layout import Layout, Spans, bits_of
from ckdiff.rules import Rule
from ckdiff.training.moving import side_by_side

_CHUNK = 1 << 22  # elements that a thread takes at a time
_PIECE = 1 << 18  # elements: compared with one copy, they are in the cache for the other
_SLICE = 1 << 24  # elements that a device compares at a time


@dataclass(slots=True)
class Pair:
    """A tensor as it is now, and contiguous copies of it as it was, of its shape and dtype."""

    now: torch.Tensor
    held: Held  #: the same
    then: list[torch.Tensor]


def count(pairs: Sequence[Pair], rule: Rule, renew: int | None = None) -> Int64:
    """How many elements differ under a rule: a row for each pair, a column for each of its copies.

    On the processor by kernels, straight from memory, in as many threads as torch has; on a GPU by
    its own code, with one wait at the end. Where that cannot be used, and on other devices, windows
    are copied to the processor. The copies in column ``renew`` become what the tensors are now.
    Raises SourceChanged where a tensor was written to meanwhile.
    """
    columns = len(pairs[0].then) if pairs else 0
    counts = np.zeros((len(pairs), columns), np.int64)
    on_device = [i for i, pair in enumerate(pairs) if _is_there(pair.now)]
    with torch.no_grad():
        if on_device:
            try:
                counts[on_device] = _count_there([pairs[i] for i in on_device], rule)
            except (CkdiffError, torch.OutOfMemoryError):
                on_device = []
        in_memory = sorted({*range(len(pairs))} - {*on_device})
        if in_memory:
            counts[in_memory] = _count_by_kernels([pairs[i] for i in in_memory], rule, renew)
        if renew is not None:
            for pair in pairs:
                if not _in_reach(pair.then[renew], pair.now):
                    pair.then[renew].copy_(pair.now, non_blocking=True)
    return counts


def _count_there(pairs: Sequence[Pair], rule: Rule) -> Int64:
    """As ``count``, by the code of the device that each tensor is on. Raises what that raises."""
    from ckdiff.kernels.gpu.counting import count_changed

    found: dict[torch.device, list[tuple[list[int], torch.Tensor]]] = defaultdict(list)
    for rows, sides, dtypes in _batches(pairs):
        counts = count_changed(sides, dtypes, (rule,))[:, 0]
        found[counts.device].append((rows, counts))
    total: Int64 = np.zeros(len(pairs) * len(pairs[0].then), np.int64)
    for some in found.values():  # only here the device is waited for
        rows = [row for batch, _ in some for row in batch]
        np.add.at(total, rows, torch.cat([counts for _, counts in some]).tolist())
    return total.reshape(len(pairs), -1)


def _batches(
    pairs: Sequence[Pair],
) -> Iterator[tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]], list[str]]]:
    """What is counted together: the places of counts, both sides, and dtypes. All that is on one
    device in one piece is; of the others a slice is copied at a time.
    """
    together: dict[Any, Any] = defaultdict(lambda: ([], [], []))
    for i, pair in enumerate(pairs):
        now = pair.now.contiguous().view(-1)
        for place, copy in enumerate(pair.then, i * len(pair.then)):
            then = copy.view(-1)
            if then.device == now.device and pair.now.is_contiguous():
                some = place, (then, now), pair.held.dtype
                for column, value in zip(together[now.device], some, strict=True):
                    column.append(value)
                continue
            for at in range(0, len(now), _SLICE):
                old = then[at : at + _SLICE].to(now.device, non_blocking=True)
                yield [place], [(old, now[at : at + _SLICE])], [pair.held.dtype]
    yield from together.values()


def _is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a device, and not in the memory of the processor."""
    return tensor.device.type != "cpu"


def _in_reach(then: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether kernels that compare the two can write to the copy."""
    return not _is_there(then) and not _is_there(now)


def _count_by_kernels(pairs: Sequence[Pair], rule: Rule, renew: int | None) -> Int64:
    columns = len(pairs[0].then)
    synchronize(torch, [pair.now for pair in pairs])  # copies may still be on their way
    now = MemoryCheckpoint("the model", [("", pair.held) for pair in pairs])
    then = [
        MemoryCheckpoint("the copy", [("", _held(pair.then[column])) for pair in pairs])
        for column in range(columns)
    ]
    work = _Counting(now, then, rule)
    if renew is not None:
        work.renew(renew, [_in_reach(pair.then[renew], pair.now) for pair in pairs])
    threads = max(1, min(torch.get_num_threads(), work.chunks))
    sums = [np.zeros((len(pairs) * columns, 1), np.int64) for _ in range(threads)]
    chunks = iter(range(work.chunks))  # each takes the next
    side_by_side([_Share(work, chunks, changed) for changed in sums])
    total: Int64 = np.sum(sums, axis=0)
    return total.reshape(len(pairs), columns)


def _held(tensor: torch.Tensor) -> Held:
    held = held_tensor(tensor, torch, "", "the copy")
    assert isinstance(held, Held)  # of a dtype that was looked at before
    return held


@dataclass(slots=True)
class _Share:
    """What one thread does of it."""

    work: _Counting
    chunks: Iterator[int]
    changed: Int64

    def __call__(self) -> None:
        self.work.run(self.chunks, self.changed)


class _Counting:
    """Tensors side by side with copies of them, cut into chunks."""

    def __init__(self, now: MemoryCheckpoint, then: Sequence[MemoryCheckpoint], rule: Rule) -> None:
        self._sides = [now, *then]
        dtypes = now.table.dtypes
        self._kernels = Kernels([DTYPES[name] for name in dict.fromkeys(dtypes)], [rule])
        self._slots = np.array([self._kernels.slot_of[name] for name in dtypes], np.int64)
        self._bits = bits_of(dtypes)
        elements = np.array([prod(shape) for shape in now.table.shapes], np.int64)
        self._layout = Layout(elements, _CHUNK)
        self._renew: tuple[int, list[bool]] | None = None
        self.chunks = self._layout.chunks

    def renew(self, column: int, which: list[bool]) -> None:
        """Make copies of a column what the tensors are, as they are counted, where ``which``."""
        self._renew = column, which

    def run(self, chunks: Iterator[int], changed: Int64) -> None:
        """Take chunks while there are any, and add up what differs: rows x copies."""
        mask = np.zeros(_PIECE // 8, np.uint8)
        with ExitStack() as stack:
            readers = [stack.enter_context(closing(side.reader())) for side in self._sides]
            for chunk in chunks:
                self._chunk(chunk, readers, mask, changed)

    def _chunk(
        self, chunk: int, readers: Sequence[SpanReader], mask: Bytes, changed: Int64
    ) -> None:
        first, stop = self._layout.chunk_range(chunk)
        spans = self._layout.spans(first, stop)
        spans = spans.cut(np.arange(first + _PIECE, stop, _PIECE, dtype=np.int64))
        starts, nbytes = spans.byte_ranges(self._bits)
        now, *then = (reader.acquire(spans.tensors, starts, nbytes) for reader in readers)
        self._kernels.count(self._table(spans, now, then), mask, changed)
        if self._renew is not None:
            column, which = self._renew
            columns = spans.tensors.tolist(), now.tolist(), then[column].tolist(), nbytes.tolist()
            for tensor, source, target, size in zip(*columns, strict=True):
                if which[tensor]:
                    bytes_at(target, size, writable=True)[:] = bytes_at(source, size)
        for reader in readers:
            reader.release()

    def _table(self, spans: Spans, now: IntArray, then: Sequence[IntArray]) -> Int64:
        """Segments as kernels take them: each piece with every copy, one after the other. Their
        masks are written over each other.
        """
        table = np.zeros((len(spans), len(then), abi.SEG_COLUMNS), np.int64)
        table[:, :, abi.SEG_BASE] = np.stack(then, axis=1)
        table[:, :, abi.SEG_TUNED] = now[:, None]
        table[:, :, abi.SEG_ELEMENTS] = spans.elements[:, None]
        table[:, :, abi.SEG_SLOT] = self._slots[spans.tensors][:, None]
        rows = spans.tensors[:, None] * len(then) + np.arange(len(then))
        table[:, :, abi.SEG_ROW] = rows
        return table.reshape(-1, abi.SEG_COLUMNS)
