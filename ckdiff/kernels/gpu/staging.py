"""The way of a piece of a window to the device and back: pinned buffers, streams, events.

A stage has pinned memory for one piece and what is found in it, the same on the device, and a
stream of its own for copying. While the device works on one stage, the CPU fills the next.
Comparing happens on one stream for all: it is much faster than copying.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.gpu.device import Device, out_of_memory
from ckdiff.kernels.gpu.preparing import Slot
from ckdiff.kernels.gpu.sizes import SMALLEST, STAGES, Sizes, halved
from ckdiff.kernels.gpu.tables import SIDES, Int64, Table
from ckdiff.kernels.hashing import UNIT

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.digests import Ends

__all__ = ["Pool", "Stage"]

Flags = npt.NDArray[np.bool_]


#: bytes that are copied with Python's lock held: to hand it on and wait for it takes longer
_SHORT = 1 << 15
_move_short = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


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
    hashing: bool  #: on the device
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
        ends = np.cumsum(units * UNIT * bits // 8)
        size, at = int(ends[-1]), ends - units * UNIT * bits // 8
        if resident.all():  # nothing is copied
            size = 0
        here, there = (where[0].data_ptr() for where in (self._here, self._there))
        copied, sides = segments.copy(), []
        nbytes = segments[:, abi.SEG_ELEMENTS] * bits // 8
        for column, begin, stays in zip(SIDES, (0, size), resident.T, strict=True):
            source, to = segments[:, column], here + begin + at
            sides.append(np.where(stays, source, there + begin + at))
            copied[:, column] = np.where(stays, source, to)
            for move in joined(np.stack([to, source, nbytes])[:, ~stays]).T.tolist():
                (_move_short if move[2] < _SHORT else ctypes.memmove)(*move)
        parts, position = [], segments[:, abi.SEG_POSITION]
        for number in np.unique(segments[:, abi.SEG_SLOT]).tolist():
            of = segments[:, abi.SEG_SLOT] == number
            units_at = (position[of] - first) // UNIT
            base, tuned = (side[of] for side in sides)
            begin = segments[of, abi.SEG_UNIT]
            table = Table.of(base, tuned, segments[of, abi.SEG_ELEMENTS], units_at, begin)
            parts.append((slots[number], table, of))
        elements = int(position[-1] + units[-1] * UNIT) - first
        flight = _Flight(copied, bits, first, elements, size, parts, hashing)
        if hashing and resident.any():
            from ckdiff.kernels.gpu.digests import Ends

            flight.ends = Ends(copied, bits, resident)
        return flight

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
            from ckdiff.kernels.gpu.digests import tails

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


def joined(moves: Int64) -> Int64:
    """Copies, (3, n): where to, where from, bytes. Those that go on where the one before ends, on
    both sides, are one with it, as neighbours in a file are: copied by one call, without a lock.
    """
    begin = np.ones(moves.shape[1], np.bool_)
    begin[1:] = (moves[:2, :-1] + moves[2, :-1] != moves[:2, 1:]).any(axis=0)
    first = np.flatnonzero(begin)
    sizes = np.add.reduceat(moves[2], first) if len(first) else moves[2]
    return np.concatenate([moves[:2, first], sizes[None]])


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
        slot.compare(table, masks, ones)
        if flight.hashing and slot.digests is not None:
            slot.digests(table, sums, slot.dtype.bits)
    used = sum(part.nbytes for part in (masks, *digests, *counts))
    here[:used].copy_(there[:used], non_blocking=True)
