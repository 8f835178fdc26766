"""The way of a piece of a window to the device and back: pinned buffers, streams, events.

A stage has pinned memory for one piece and its masks, the same on the device, and a stream of its
own for copying. While the device works on one stage, the CPU fills the next. Comparing happens on
one stream for all: it is much faster than copying, and its intermediate results then exist once.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.dtypes import DType
from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.binding import Bound
from ckdiff.kernels.gpu import changes
from ckdiff.kernels.gpu.sizes import STAGES, out_bytes
from ckdiff.kernels.hashing import UNIT

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.fused import Fused

__all__ = ["Device", "Slot", "Stage", "Stages"]

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Slot:
    """What is done with the elements of one dtype."""

    dtype: DType
    bounds: list[Bound]  #: one a rule; the first is exact
    tables: list[torch.Tensor | None]  #: one a rule, on the device; not needed where it is fused
    fused: Fused | None = None  #: all rules at once, where that can be had


class Device:
    """A torch device and the stream on which it compares."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name  #: for people, such as ``NVIDIA H100``
        self.cuda = device.type == "cuda"
        self.fused = False  #: whether Triton is to be used
        self.notes: list[str] = []  #: for people, on how the device is used
        self.lock = threading.Lock()  #: held while work is handed to ``comparing``
        # before copies where both are ready; and torch hands out its streams in turn, 32 of each
        # priority, so that no worker's copies end up in this one
        self.comparing: Any = self.new_stream(priority=-1)

    def new_stream(self, priority: int = 0) -> Any:
        """A stream that first waits for what its memory may have been used for; None on a CPU."""
        if not self.cuda:
            return None
        stream: Any = torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    def new_event(self) -> Any:
        """An event to wait for without spinning, as other workers want the core; None on a CPU."""
        if not self.cuda:
            return None
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Work goes to this stream inside the ``with``."""
        return torch.cuda.stream(stream) if self.cuda else contextlib.nullcontext()

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 (size,) of host memory that a GPU can copy by itself."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)

    def memory(self, size: int) -> torch.Tensor:
        """uint8 (size,) on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def reserve(self, size: int) -> None:
        """Have torch keep so much for intermediate results, which it cuts from one block then."""
        if self.cuda and size:
            with self.lock, self.on(self.comparing):
                self.memory(size)

    def drop_cache(self) -> None:
        """Give back memory that torch keeps for later, on the device and pinned."""
        if self.cuda:
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()


@dataclass(slots=True, eq=False)
class _Flight:
    """The piece that a stage works on."""

    segments: Int64
    first: int  #: position of its first element
    elements: int  #: multiple of UNIT
    rules: int
    size: int  #: bytes of one side
    bits: int  #: of an element


class Stages:
    """The stages of one worker, in one block of each kind of memory."""

    def __init__(self, device: Device, side: int, out: int, generation: int) -> None:
        """For pieces of ``side`` bytes a side, with ``out`` bytes of masks and counts."""
        self.side = side
        self.generation = generation  #: see :class:`ckdiff.kernels.gpu.pool.Pool`
        into, total = 2 * side, 2 * side + out
        there = device.memory(STAGES * total)
        here, back = device.pinned(STAGES * into), device.pinned(STAGES * out)
        self.each = [
            Stage(
                device,
                (here[i * into :][:into], there[i * total :][:into]),
                (back[i * out :][:out], there[i * total + into :][:out]),
            )
            for i in range(STAGES)
        ]

    def release(self) -> None:
        """Let go of the memory; nothing may be on its way."""
        self.each.clear()


class Stage:
    """Room for one piece on its way. Used by one thread at a time."""

    def __init__(
        self,
        device: Device,
        into: tuple[torch.Tensor, torch.Tensor],
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.device = device
        self._in, self._out = into, out  # in pinned memory and on the device
        self._flight: _Flight | None = None
        self._copying = device.new_stream()  # after the memory that it will write to
        self._copied, self._done = device.new_event(), device.new_event()

    def start(self, segments: Int64, slot: Slot) -> None:
        """Copy the segments, which lie next to each other, and have them compared.

        Nothing waits for the device here. Raises what torch raises; the stage is free again then.
        """
        first = int(segments[0, abi.SEG_POSITION])
        last = segments[-1]
        stop = int(last[abi.SEG_POSITION] + last[abi.SEG_ELEMENTS])
        elements = -(-(stop - first) // UNIT) * UNIT
        bits = slot.dtype.bits
        size = elements * bits // 8
        flight = _Flight(segments, first, elements, len(slot.bounds), size, bits)
        self._fill(flight)
        try:
            self._send(flight, slot)
        except BaseException:
            self.abandon()
            raise
        self._flight = flight

    def _send(self, flight: _Flight, slot: Slot) -> None:
        device, size = self.device, flight.size
        host, there = self._in
        with device.on(self._copying):
            there[: 2 * size].copy_(host[: 2 * size], non_blocking=True)
            if device.cuda:
                self._copied.record(self._copying)
        used = out_bytes(flight.elements, flight.rules)
        with device.lock, device.on(device.comparing):
            if device.cuda:
                device.comparing.wait_event(self._copied)
            found = self._out[1][:used]
            _compare(slot, there[:size], there[size : 2 * size], found)
            self._out[0][:used].copy_(found, non_blocking=True)
            if device.cuda:
                self._done.record(device.comparing)

    def finish(self, cpu: Kernels, masks: Sequence[npt.NDArray[np.uint8]], into: Results) -> None:
        """Wait for the piece, and hand on its bits and counts; hashes and statistics are added."""
        flight, self._flight = self._flight, None
        assert flight is not None
        if self.device.cuda:
            self._done.synchronize()
        found = self._out[0].numpy()
        width, cut = flight.elements // 8, flight.rules * flight.elements // 8
        for mask, line in zip(masks, found[:cut].reshape(flight.rules, width), strict=True):
            mask[flight.first // 8 : flight.first // 8 + width] = line
        units = flight.elements // UNIT
        ones = found[cut : out_bytes(flight.elements, flight.rules)].view(np.int32)
        segments = flight.segments.copy()
        inside = segments[:, abi.SEG_POSITION] - flight.first
        counts = np.add.reduceat(ones.reshape(flight.rules, units), inside // UNIT, axis=1)
        np.add.at(into.changed, segments[:, abi.SEG_ROW], counts.T)
        # what was compared is what is hashed, and it may still be in the cache
        segments[:, abi.SEG_BASE] = self._in[0].data_ptr() + inside * flight.bits // 8
        segments[:, abi.SEG_TUNED] = segments[:, abi.SEG_BASE] + flight.size
        cpu.measure(segments, masks[0], into)

    def abandon(self) -> None:
        """Wait until the device touches nothing of this any more, and forget the piece."""
        self._flight = None
        if self.device.cuda:
            with contextlib.suppress(RuntimeError):  # a device that is lost touches nothing
                self._copying.synchronize()
                self.device.comparing.synchronize()

    def _fill(self, flight: _Flight) -> None:
        """Both sides one after the other, zeros where no tensor is."""
        tuned = flight.size
        to = self._in[0].data_ptr()
        full = 0
        for row in flight.segments.tolist():
            at = (row[abi.SEG_POSITION] - flight.first) * flight.bits // 8
            size = row[abi.SEG_ELEMENTS] * flight.bits // 8
            if at > full:
                ctypes.memset(to + full, 0, at - full)
                ctypes.memset(to + tuned + full, 0, at - full)
            ctypes.memmove(to + at, row[abi.SEG_BASE], size)
            ctypes.memmove(to + tuned + at, row[abi.SEG_TUNED], size)
            full = at + size
        ctypes.memset(to + full, 0, flight.size - full)
        ctypes.memset(to + tuned + full, 0, flight.size - full)


def _compare(slot: Slot, base: torch.Tensor, tuned: torch.Tensor, out: torch.Tensor) -> None:
    """Masks of all rules, then the counts of all rules."""
    elements = len(base) * 8 // slot.dtype.bits
    rules = len(slot.bounds)
    cut = rules * elements // 8
    masks = out[:cut].view(rules, -1)
    counts = out[cut:].view(torch.int32).view(rules, -1)
    if slot.fused is not None:
        slot.fused(base, tuned, masks, counts)
        return
    exact: torch.Tensor | None = None
    for r, (bound, table) in enumerate(zip(slot.bounds, slot.tables, strict=True)):
        flags = changes.changed(bound, slot.dtype, base, tuned, exact=exact, table=table)
        changes.write_bits(flags, masks[r], counts[r])
        if exact is None:
            exact = flags
