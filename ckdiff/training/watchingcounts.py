"""Counting what differs between weights and copies of them, where the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ckdiff.checkpoints.places.held import Held
from ckdiff.checkpoints.places.heldtorch import held_tensor, synchronize
from ckdiff.checkpoints.places.memory import MemoryCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import Kernels, abi
from ckdiff.kernels.memory import Bytes, Int64, bytes_at
from ckdiff.layout import Layout, Spans, bits_of
from ckdiff.rules import Rule
from ckdiff.training.moving import side_by_side

_CHUNK = 1 << 22  # elements that a thread takes at a time
_PIECE = 1 << 18  # elements: compared with one copy, they are in the cache for the other
_SLICE = 1 << 24  # elements that a device compares at a time
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(slots=True)
class Pair:
    """A tensor as it is now, and contiguous copies of it as it was, of its shape and dtype."""

    now: torch.Tensor
    held: Held  #: the same
    then: list[torch.Tensor]


def count(pairs: Sequence[Pair], rule: Rule, renew: int | None = None) -> Int64:
    """How many elements differ under a rule: a row for each pair, a column for each of its copies.

    On the processor by kernels, straight from memory, in as many threads as torch has; on a device
    by torch, with one wait at the end. ``atol``, ``rtol`` and ``ulp`` of what is on a device are
    counted by the processor, window by window. The copies in column ``renew`` become what the
    tensors are now. Raises SourceChanged where a tensor was written to meanwhile.
    """
    columns = len(pairs[0].then) if pairs else 0
    counts = np.zeros((len(pairs), columns), np.int64)
    there = [_is_there(pair.now) and rule.kind == "exact" for pair in pairs]
    on_device = [i for i, flag in enumerate(there) if flag]
    in_memory = [i for i, flag in enumerate(there) if not flag]
    with torch.no_grad():
        if on_device:
            counts[on_device] = count_by_torch([pairs[i] for i in on_device], rule)
        if in_memory:
            counts[in_memory] = _count_by_kernels([pairs[i] for i in in_memory], rule, renew)
        if renew is not None:
            for pair in pairs:
                if not _in_reach(pair.then[renew], pair.now):
                    pair.then[renew].copy_(pair.now, non_blocking=True)
    return counts


def count_by_torch(pairs: Sequence[Pair], rule: Rule) -> Int64:
    """As ``count``, by operations of torch on the device of each tensor; for exact rules."""
    found: list[torch.Tensor] = []
    for pair in pairs:
        dtype = rule.rounds(DTYPES[pair.held.dtype])
        target = None if dtype is None else _FLOATS[dtype.name]
        now = pair.now.reshape(-1)  # a copy where it is not contiguous
        for then in pair.then:
            flat, total = then.reshape(-1), torch.zeros((), dtype=torch.int64, device=now.device)
            for at in range(0, len(now), _SLICE):
                old = flat[at : at + _SLICE].to(now.device, non_blocking=True)
                new = now[at : at + _SLICE]
                total += (_seen(old, target) != _seen(new, target)).sum()
            found.append(total)
    by_device: dict[torch.device, list[int]] = {}
    for i, total in enumerate(found):
        by_device.setdefault(total.device, []).append(i)
    counts = np.zeros(len(found), np.int64)
    for some in by_device.values():
        counts[some] = torch.stack([found[i] for i in some]).tolist()
    return counts.reshape(len(pairs), -1)


def _seen(tensor: torch.Tensor, target: torch.dtype | None) -> torch.Tensor:
    """The bits of elements as a rule sees them: rounded to ``target``, with one NaN, if there is
    one.
    """
    if target is None:
        return tensor.view(_WORDS[tensor.element_size()])
    if tensor.dtype == torch.float64 and target != torch.float32:
        tensor = _to_odd(tensor)
    rounded = tensor.to(target)
    words = rounded.view(_WORDS[rounded.element_size()])
    return torch.where(rounded.isnan(), torch.iinfo(words.dtype).max, words)


def _to_odd(tensor: torch.Tensor) -> torch.Tensor:
    """float64 as float32, towards zero and then with the last bit set where anything was lost: so
    that what is rounded next is rounded as if in one step.
    """
    near = tensor.to(torch.float32)
    wide = near.to(torch.float64)
    words = near.view(torch.int32) - (wide.abs() > tensor.abs()).to(torch.int32)
    odd = (words | (wide != tensor).to(torch.int32)).view(torch.float32)
    return torch.where(tensor.isnan(), near, odd)


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
