"""Whether a checkpoint on this disk holds what deltas lead to already, tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ckdiff.checkpoints.places.openfile import read_into
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.container import Delta
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.parts import UInt64
from ckdiff.errors import SourceChanged
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import Bytes
from ckdiff.layout import bits_of
from ckdiff.options import Observer
from ckdiff.running.runners import Meter, run_chunks
from ckdiff.running.threads import PerThread, Stopped


def holds(files: Sequence[int], last: Delta, workers: int) -> bool:
    """Whether ``files``, descriptors in the order of the delta's, have what ``last`` leads to.

    Their headers are not looked at. Raises SourceChanged; OSError passes through.
    """
    windows = last.windows
    sums = np.zeros((len(last.blueprint.names), 2), np.uint64)

    def finished(group: int, found: UInt64) -> None:
        np.add.at(sums, windows.tensor[slice(*windows.groups[group])], found)

    task = _HashTask(files, last)
    groups = range(len(windows.groups))
    meter = Meter(Observer(), len(groups))
    run_chunks(groups, task, workers=workers, done=finished, meter=meter)
    return bool((sums == last.tensors.tuned_hashes).all())


def _buffer() -> Bytes:
    return np.empty(FRAME_BYTES, np.uint8)


@dataclass(slots=True)
class _HashTask:
    """The task of a group of windows: gives their hash sums. Shared by the threads."""

    files: Sequence[int]
    last: Delta
    _buffer: PerThread[Bytes] = field(default_factory=lambda: PerThread(_buffer))
    _hasher: ContentHasher = field(default_factory=ContentHasher)
    _bits: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self._bits = bits_of(self.last.blueprint.dtypes)

    def __call__(self, chunk: int, stop: threading.Event) -> UInt64:
        """See ChunkTask; a chunk is a group of windows."""
        windows, made = self.last.windows, self.last.blueprint
        first, after = windows.groups[chunk]
        sums = np.zeros((after - first, 2), np.uint64)
        for window in range(first, after):
            if stop.is_set():
                raise Stopped
            tensor, start = int(windows.tensor[window]), int(windows.start[window])
            data = self._buffer()[: int(windows.size[window])]
            self._read(int(made.file[tensor]), int(made.begin[tensor]) + start, data)
            self._hasher.add(sums[window - first], data, start, int(self._bits[tensor]))
        return sums

    def _read(self, file: int, begin: int, into: Bytes) -> None:
        if read_into(self.files[file], into.data, begin) < len(into):
            raise SourceChanged(
                "the checkpoint was cut while it was being read",
                hint="let whatever writes it finish, then run again",
            )
