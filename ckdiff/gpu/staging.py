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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckdiff.dtypes import DType
from ckdiff.gpu import changes
from ckdiff.gpu.sizes import SUMS, out_bytes
from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.binding import Bound
from ckdiff.kernels.hashing import UNIT

__all__ = ["Device", "Slot", "Stage"]

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Slot:
    """What is done with the elements of one dtype."""

    dtype: DType
    bounds: list[Bound]  #: one a rule; the first is exact
    tables: list[torch.Tensor | None]  #: one a rule, on the device


class Device:
    """A torch device and the stream on which it compares."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name  #: for people, such as ``NVIDIA H100``
        self.cuda = device.type == "cuda"
        self.lock = threading.Lock()  #: held while work is handed to ``comparing``
        self.comparing: Any = self.new_stream()

    def new_stream(self) -> Any:
        """A stream that first waits for what its memory may have been used for; None on a CPU."""
        if not self.cuda:
            return None
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
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

    def buffers(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (size,) twice: in pinned memory, and on the device."""
        host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)
        return host, torch.empty(size, dtype=torch.uint8, device=self.device)

    def drop_cache(self) -> None:
        """Give back device memory that torch keeps for later."""
        if self.cuda:
            torch.cuda.empty_cache()


@dataclass(slots=True, eq=False)
class _Flight:
    """The piece that a stage works on."""

    segments: Int64
    first: int  #: position of its first element
    elements: int  #: multiple of UNIT
    rules: int
    size: int  #: bytes of one side
    bits: int  #: of an element


@dataclass(slots=True, eq=False)
class Stage:
    """Room for one piece on its way. Belongs to one thread."""

    device: Device
    side: int  #: bytes of one side, at most
    out: int  #: bytes of masks and sums, at most
    _flight: _Flight | None = None
    _in: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    _out: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    _copying: Any = field(init=False)
    _copied: Any = field(init=False)
    _done: Any = field(init=False)

    def __post_init__(self) -> None:
        self._in = self.device.buffers(2 * self.side)
        self._out = self.device.buffers(self.out)
        self._copying = self.device.new_stream()  # after the memory that it will write to
        self._copied, self._done = self.device.new_event(), self.device.new_event()

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
        sums = found[cut : out_bytes(flight.elements, flight.rules)]
        ones = sums.reshape(flight.rules, units, SUMS).sum(axis=2, dtype=np.int64)
        segments = flight.segments.copy()
        inside = segments[:, abi.SEG_POSITION] - flight.first
        counts = np.add.reduceat(ones, inside // UNIT, axis=1)
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
    """Masks of all rules, then the sums of all rules."""
    elements = len(base) * 8 // slot.dtype.bits
    rules = len(slot.bounds)
    cut = rules * elements // 8
    masks = out[:cut].view(rules, -1)
    sums = out[cut:].view(torch.int64).view(rules, -1)
    exact: torch.Tensor | None = None
    for r, (bound, table) in enumerate(zip(slot.bounds, slot.tables, strict=True)):
        flags = changes.changed(bound, slot.dtype, base, tuned, exact=exact, table=table)
        changes.write_bits(flags, masks[r], sums[r])
        if exact is None:
            exact = flags
