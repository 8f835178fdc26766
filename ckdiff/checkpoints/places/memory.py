"""Checkpoints in the memory of this process: modules, state dicts, mappings of names to arrays."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ckdiff.checkpoints.places.held import Held, held_array
from ckdiff.checkpoints.places.heldtorch import (
    HeldOnDevice,
    held_tensor,
    is_module,
    synchronize,
    torch_of,
)
from ckdiff.checkpoints.places.statechoice import chosen_tensors, state_tensors
from ckdiff.checkpoints.places.wrapped import plain_names
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader, TensorTable
from ckdiff.errors import CheckpointError, SourceChanged, printable

_SLACK = 1 << 18  # bytes of a buffer besides the window: each span begins at a multiple of 64


def open_memory(given: object, key: str | None = None) -> MemoryCheckpoint | None:
    """The tensors of a mapping, a module, or whatever has a ``state_dict()``; None of all else.

    Values are tensors of torch or arrays of numpy, or of what numpy sees without a copy. A module's
    names are those of its state dict, without what wrappers such as ``torch.compile`` add to them.
    In a mapping of mappings the weights are found as they are in torch files; ``key`` is their
    path, ``.`` for all of it. They are read where they are, and must not be written to until the
    checkpoint is closed. Raises CheckpointError.
    """
    label = "a state dict"
    if isinstance(given, Mapping):
        content: Any = given
    elif callable(state := getattr(given, "state_dict", None)) and not isinstance(given, type):
        label, content = printable(type(given).__name__), state()
        if not isinstance(content, Mapping):
            return None
    else:
        return None
    with _nothing_collected():
        if is_module(given) and key is None:
            tensors = state_tensors(content)
            names, notes = plain_names(given, [name for name, _ in tensors], label)
            values = [value for _, value in tensors]
            return _opened(label, list(zip(names, values, strict=True)), "", notes)
        named, text, notes = chosen_tensors(content, label, key)
        return _opened(label, named, text, notes)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No looking for cycles meanwhile: of the objects that are made of 100,000 tensors each is
    kept, and Python would look at all of them again and again.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _opened(
    label: str, named: Sequence[tuple[str, Any]], text: str, notes: list[str]
) -> MemoryCheckpoint:
    from ckdiff.checkpoints.formats.torchzip import left_out, nothing_named

    found: list[tuple[str, Held]] = []
    left: list[tuple[str, str]] = []
    torch, tensors = None, []
    for name, value in named:
        loaded = torch_of(value)
        held: Held | str
        if loaded is None:
            held = held_array(value, name, label)
        else:
            held = held_tensor(value, loaded, name, label)
            torch = loaded
            tensors.append(value)
        if isinstance(held, str):
            left.append((name, held))
        else:
            found.append((name, held))
    if not found:
        raise nothing_named(label, text, left)
    if left:
        notes = [*notes, left_out(label, left)]
    synchronize(torch, tensors)
    return MemoryCheckpoint(label, found, notes, [name for name, _ in left])


class MemoryCheckpoint(Checkpoint):
    """Tensors that somebody else has. They are kept alive until it is closed."""

    def __init__(
        self,
        label: str,
        tensors: Sequence[tuple[str, Held]],
        notes: Sequence[str] = (),
        absent: Sequence[str] = (),
    ) -> None:
        self.label, self.notes = label, tuple(notes)
        self.held: Sequence[Held] = [held for _, held in tensors]
        self.table = TensorTable(
            [name for name, _ in tensors],
            [held.dtype for held in self.held],
            [held.shape for held in self.held],
            np.array([held.nbytes for held in self.held], np.int64),
            list(absent),
        )
        self._addresses = np.array([held.address for held in self.held], np.int64)
        self._copies = any(not held.address and held.nbytes for held in self.held)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}: {len(self.table):,} tensors>"

    @property
    def addresses(self) -> IntArray:
        """See Checkpoint."""
        return self._addresses

    def on_gpu(self) -> bool:
        """Whether some of its tensors are on a GPU."""
        return any(isinstance(held, HeldOnDevice) and held.on_gpu() for held in self.held)

    def on_device(self, device: str) -> IntArray:
        """For each tensor where it is in the memory of a device of torch's, 0 where it is not."""
        found = [held.there(device) if isinstance(held, HeldOnDevice) else 0 for held in self.held]
        return np.array(found, np.int64)

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        self._check_open()
        return MemoryReader(self)

    def _check_open(self) -> None:
        if len(self.held) != len(self.table):
            raise CheckpointError(f"the checkpoint {self.label} was closed", hint="open it again")

    def reader_memory(self, window: int) -> int:
        """See Checkpoint: where a window has to be copied, all of it."""
        return window + _SLACK if self._copies else 0

    def fingerprint(self) -> list[Any]:
        """See Checkpoint. Never the same twice: nothing says whether what was there an hour ago is
        what is there now, so no run goes on from another's work.
        """
        return ["memory", uuid.uuid4().hex]

    def verify(self) -> None:
        """Raise SourceChanged where a tensor is known to be no longer what was opened."""
        self.check(range(len(self.held)), written=True)

    def check(self, tensors: Sequence[int], *, written: bool) -> None:
        """Raise SourceChanged where the memory of a tensor is elsewhere, or was written to."""
        self._check_open()
        for tensor in tensors:
            held = self.held[tensor]
            if held.moved() or (written and held.written()):
                raise SourceChanged(
                    f"{self.label}: {printable(self.table.names[tensor])} was changed while it was "
                    "being read",
                    hint="do not train or load weights meanwhile, or give copies",
                )

    def close(self) -> None:
        """Let go of the tensors; may be called more than once. No reader may be in use."""
        self.held = ()


class MemoryReader:
    """A SpanReader of tensors in memory; one for each worker."""

    def __init__(self, checkpoint: MemoryCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._held = checkpoint.held
        self._buffer = np.empty(0, np.uint8)
        self._used: list[int] = []
        self._places = checkpoint.addresses

    def stay(self, device: str) -> None:
        """Give addresses in a device's memory for what is there, to those who compare it there."""
        there = self._checkpoint.on_device(device)
        self._places = np.where(there > 0, there, self._places)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. What lies packed in memory is not copied."""
        self._used = np.unique(tensors).tolist()
        self._checkpoint.check(self._used, written=False)
        places = self._places[tensors]
        addresses: IntArray = places + starts
        copied = np.flatnonzero((places == 0) & (nbytes > 0)).tolist()
        if copied:
            spans = [(int(tensors[i]), int(starts[i]), int(nbytes[i])) for i in copied]
            addresses[copied] = self._copied(spans)
        return addresses

    def _copied(self, spans: Sequence[tuple[int, int, int]]) -> list[int]:
        """Where in the buffer spans are, after they were copied."""
        wanted, size = [], 0
        for tensor, start, nbytes in spans:
            width = self._held[tensor].width
            first, stop = start // width, -(-(start + nbytes) // width)
            wanted.append((size, first, (stop - first) * width))
            size += -(-(stop - first) * width // 64) * 64
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        found, base = [], int(self._buffer.ctypes.data)
        for (tensor, start, _), (at, first, length) in zip(spans, wanted, strict=True):
            held = self._held[tensor]
            held.copy(first, self._buffer[at : at + length])
            found.append(base + at + start - first * held.width)
        return found

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader. There is nothing to wait for."""

    def release(self) -> None:
        """See SpanReader."""
        used, self._used = self._used, []
        self._checkpoint.check(used, written=True)

    def close(self) -> None:
        """See SpanReader."""
        self._used, self._buffer = [], np.empty(0, np.uint8)
