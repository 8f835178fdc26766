"""The way of a piece of a window to the device and back: pinned buffers, streams, events.

A stage has pinned memory for one piece and what is found in it, the same on the device, and a
stream of its own for copying. While the device works on one stage, the CPU fills the next.
Comparing happens on one stream for all: it is much faster than copying.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.copying import copy_runs
from ckdiff.kernels.gpu.device import Device, out_of_memory
from ckdiff.kernels.gpu.digests import Ends, tails
from ckdiff.kernels.gpu.preparing import Slot
from ckdiff.kernels.gpu.sizes import SMALLEST, STAGES, Sizes, halved
from ckdiff.kernels.gpu.tables import SIDES, Int64, Table
from ckdiff.kernels.hashing import UNIT

__all__ = ["Pool", "Stage"]

Flags = npt.NDArray[np.bool_]


class Pool:
    """The stages of all workers, made at once: nothing more is taken while windows run."""

    def __init__(self, device: Device, sizes: Sizes, workers: int, memory: int) -> None:
        """Pieces get smaller where less memory is free than may be used. Raises BudgetError, and
        what torch raises.
        """
        self.elements = sizes.fitting(workers, memory)  #: of a piece
        self.messages: deque[str] = deque()  #: warnings, to be taken out by whoever reports them
        self._device, self._sizes = device, sizes
        self._free: SimpleQueue[list[Stage]] = SimpleQueue()
        while not self._made(workers):  # now the error is gone, with what its frames held
            self.elements = halved(self.elements)
            device.drop_cache()
        if self.elements < sizes.fitting(workers, memory):
            self.warn("going on with smaller pieces")

    @contextlib.contextmanager
    def lent(self) -> Iterator[list[Stage]]:
        """The stages of a worker, once there are some; afterwards the device touches none."""
        stages = self._free.get()
        try:
            yield stages
        finally:
            for stage in stages:
                stage.abandon()
            self._free.put(stages)

    def warn(self, then: str) -> None:
        """Say that memory ran out, and what follows."""
        self.messages.append(f"warning: {self._device.name} is out of memory: {then}")

    def _made(self, workers: int) -> bool:
        """Whether memory suffices for pieces of this size, or else for smaller ones."""
        device, parts = self._device, self._sizes.parts(self.elements)
        try:
            # what pieces need on the device is one block; pinned blocks are rounded up one by one
            block = device.memory(workers * STAGES * sum(parts))
            there = iter(block.view(workers * STAGES, sum(parts)))
            made = []
            for _ in range(workers):
                here = [device.pinned(STAGES * size).view(STAGES, size) for size in parts]
                each = zip(*here, strict=True)
                made.append([Stage(device, one, _cut(next(there), parts)) for one in each])
        except RuntimeError as error:
            if not out_of_memory(error) or self.elements == SMALLEST:
                raise
            return False
        for stages in made:
            self._free.put(stages)
        return True


@dataclass(slots=True, eq=False)
class _Flight:
    """The piece that a stage works on."""

    segments: Int64  #: their addresses are those of the pinned copy
    bits: npt.NDArray[np.int64]  #: of an element of each
    first: int  #: position of its first element
    elements: int  #: multiple of UNIT
    size: int  #: bytes of one side
    parts: list[tuple[Slot, Table, npt.NDArray[np.bool_]]]  #: whose segments are in each table
    hashing: bool  #: with the device's digests; else the CPU's
    ends: Ends | None = None  #: of what is on the device already

    def found(
        self, out: torch.Tensor, rules: int
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Masks, and the sums of digests and the counts of each part in ``out``."""
        programs = [table.programs for _, table, _ in self.parts]
        sizes = [32 * n for n in programs] + [4 * rules * n for n in programs]
        masks, *others = _cut(out, [rules * self.elements // 8, *sizes])
        return (
            masks.view(rules, -1),
            [sums.view(torch.int64).view(4, -1) for sums in others[: len(programs)]],
            [ones.view(torch.int32).view(rules, -1) for ones in others[len(programs) :]],
        )


class Stage:
    """Room for one piece on its way. Used by one thread at a time."""

    def __init__(
        self, device: Device, here: Sequence[torch.Tensor], there: Sequence[torch.Tensor]
    ) -> None:
        """Pinned memory and memory on the device: of both sides, of tables, of what is found."""
        self.device = device
        self._here, self._there = here, there
        self._flight: _Flight | None = None
        self._copying = device.new_stream()  # after the memory that it will write to
        self._copied, self._done = device.new_event(), device.new_event()

    def start(
        self, segments: Int64, slots: Sequence[Slot], *, hashing: bool, resident: Flags
    ) -> None:
        """Copy the segments, in the order of their positions, and have them compared.

        ``resident``, (segments, 2), says which sides are on the device already. Nothing
        waits for the device here. Raises what torch raises; the stage is free again then.
        """
        self._flight = self._filled(segments, slots, resident, hashing=hashing)
        try:
            self._send(self._flight)
        except BaseException:
            self.abandon()
            raise

    def _filled(
        self, segments: Int64, slots: Sequence[Slot], resident: Flags, *, hashing: bool
    ) -> _Flight:
        """Both sides one after the other, each segment where a unit may begin, and the tables."""
        first = int(segments[0, abi.SEG_POSITION])
        bits = np.array([slot.dtype.bits for slot in slots])[segments[:, abi.SEG_SLOT]]
        units = -(-segments[:, abi.SEG_ELEMENTS] // UNIT)
        room = units * UNIT * bits // 8
        size, at = int(room.sum()), np.cumsum(room) - room
        if resident.all():  # nothing is copied
            size = 0
        here, there = (where[0].data_ptr() for where in (self._here, self._there))
        nbytes = segments[:, abi.SEG_ELEMENTS] * bits // 8
        pinned, sent, runs = segments.copy(), segments.copy(), []
        for column, begin, goes in zip(SIDES, (0, size), ~resident.T, strict=True):
            moved = begin + at[goes]
            runs.append(np.stack([here + moved, segments[goes, column], nbytes[goes]], axis=1))
            pinned[goes, column], sent[goes, column] = here + moved, there + moved
        copy_runs(np.concatenate(runs))
        parts, units_at = [], (segments[:, abi.SEG_POSITION] - first) // UNIT
        for number in np.unique(segments[:, abi.SEG_SLOT]).tolist():
            of = segments[:, abi.SEG_SLOT] == number
            base, tuned, elements = sent[of][:, [*SIDES, abi.SEG_ELEMENTS]].T
            table = Table.of(base, tuned, elements, units_at[of], segments[of, abi.SEG_UNIT])
            parts.append((slots[number], table, of))
        covered = int(units_at[-1] + units[-1]) * UNIT
        ends = Ends(sent, bits) if hashing and resident.any() else None
        return _Flight(pinned, bits, first, covered, size, parts, hashing, ends)

    def _send(self, flight: _Flight) -> None:
        device = self.device
        tables = np.concatenate([table.here for _, table, _ in flight.parts])
        host, numbers = (where[1][: tables.nbytes].view(torch.int64)
                         for where in (self._here, self._there))  # fmt: skip
        host.numpy()[:] = tables
        lengths = [len(table.here) for _, table, _ in flight.parts]
        for (_, table, _), part in zip(flight.parts, _cut(numbers, lengths), strict=True):
            table.numbers = part
        with device.on(self._copying):
            used = 2 * flight.size
            self._there[0][:used].copy_(self._here[0][:used], non_blocking=True)
            numbers.copy_(host, non_blocking=True)
            if device.cuda:
                self._copied.record(self._copying)
        with device.lock, device.on(device.comparing):
            if device.cuda:
                device.comparing.wait_event(self._copied)
            _compare(flight, self._there[2], self._here[2])
            if flight.ends is not None:
                flight.ends.fetch(device)
            if device.cuda:
                self._done.record(device.comparing)

    def finish(self, cpu: Kernels, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """Wait for the piece, and hand on its bits and counts; hashes and statistics are added."""
        flight = self._flight
        assert flight is not None
        if self.device.cuda:
            self._done.synchronize()
        self._flight = None
        lines, digests, counts = flight.found(self._here[2], len(masks))
        byte = slice(flight.first // 8, (flight.first + flight.elements) // 8)
        for mask, line in zip(masks, lines.numpy(), strict=True):
            mask[byte] = line
        segments = flight.segments
        for (_, table, of), sums, ones in zip(flight.parts, digests, counts, strict=True):
            np.add.at(into.changed, segments[of, abi.SEG_ROW], table.sums(ones.numpy()))
            if flight.hashing:
                found = table.sums(sums.numpy()).view(np.uint64)
                np.add.at(into.hashes, segments[of, abi.SEG_ROW], found)
        if flight.hashing:
            segments = tails(segments, flight.bits)
            if flight.ends is not None:
                flight.ends.place(segments)
        # what was compared is what is hashed
        cpu.measure(segments, masks[0], into)

    def abandon(self) -> None:
        """Forget the piece, if there is one, once the device touches nothing of it any more."""
        if self._flight is not None and self.device.cuda:
            with contextlib.suppress(RuntimeError):  # a device that is lost touches nothing
                self._copying.synchronize()
                self.device.comparing.synchronize()
        self._flight = None


def _cut(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The first items, those after them, and so on."""
    ends = np.cumsum(sizes).tolist()
    return [tensor[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _compare(flight: _Flight, there: torch.Tensor, here: torch.Tensor) -> None:
    """Everything that the device does with a piece, and the copy of what it found."""
    rules = sum(code.rules for code in flight.parts[0][0].code)
    masks, digests, counts = flight.found(there, rules)
    masks.zero_()  # padding between tensors
    for (slot, table, _), sums, ones in zip(flight.parts, digests, counts, strict=True):
        slot.compare(table, masks, ones, sums)
    used = sum(part.nbytes for part in (masks, *digests, *counts))
    here[:used].copy_(there[:used], non_blocking=True)
