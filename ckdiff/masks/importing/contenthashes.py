"""Content hashes of one checkpoint's tensors, as any diff records them: each byte is read once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.kernels import hashing
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import views
from ckdiff.layout import ALIGNMENT, Layout, bits_of
from ckdiff.options import Observer
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import Stopped

_WINDOW = 1 << 22  # elements that are made addressable at a time
_AHEAD = 3  # windows asked of the source before they are needed

Sums = tuple[IntArray, npt.NDArray[np.uint64]]  # tensors, and what a chunk adds to their hashes


def content_hashes(
    checkpoint: Checkpoint, names: Sequence[str], observer: Observer
) -> dict[str, str]:
    """The content hash of each of these tensors, by name.

    On threads, whatever Dask client is active: the checkpoint is open here, and only here. Raises
    SourceChanged, CheckpointError, BudgetError and Interrupted.
    """
    place = {name: i for i, name in enumerate(checkpoint.table.names)}
    index = np.array([place[name] for name in names], np.int64)
    bits = bits_of([checkpoint.table.dtypes[i] for i in index])
    nbytes = checkpoint.table.nbytes[index]
    layout = Layout(nbytes * 8 // np.maximum(bits, 1))
    sums = np.zeros((len(index), 2), np.uint64)

    def add(chunk: int, found: Sums) -> None:
        sums[found[0]] += found[1]  # each row once

    meter = Meter(observer, int(nbytes.sum()))
    task = _HashTask(checkpoint, index, layout, bits, meter.add)
    spans = min(len(index), _WINDOW // ALIGNMENT)  # of a window, at most
    reader = checkpoint.reader_memory(_WINDOW * int(bits.max(initial=8)) // 8)
    need = Need(tables=400 * len(index), worker=1200 * spans + (2 << 20) + reader)
    workers = fit_workers(None, layout.chunks, need, None, option=False)
    with interruptible():
        run_chunks(range(layout.chunks), task, workers=workers, done=add, meter=meter)
        checkpoint.verify()
    finished = hashing.finish_all(sums, nbytes)
    return dict(zip(names, finished, strict=True))


@dataclass(slots=True)
class _HashTask:
    """The chunk task: what a chunk adds to the hashes of its tensors. Shared by the threads."""

    checkpoint: Checkpoint
    index: IntArray  #: for each tensor of the layout its position in the checkpoint
    layout: Layout
    bits: IntArray  #: of one element, for each tensor
    on_bytes: Callable[[int], None]
    _hasher: ContentHasher = field(default_factory=ContentHasher)

    def __call__(self, chunk: int, stop: threading.Event) -> Sums:
        """See ChunkTask. Raises SourceChanged, CheckpointError, Stopped."""
        first, end = self.layout.chunk_range(chunk)
        tensors = self.layout.spans(first, end).tensors
        sums = np.zeros((len(tensors), 2), np.uint64)
        windows = [
            self.layout.spans(at, min(at + _WINDOW, end)) for at in range(first, end, _WINDOW)
        ]
        ranges = [(self.index[w.tensors], *w.byte_ranges(self.bits)) for w in windows]
        with closing(self.checkpoint.reader()) as reader:
            for coming in ranges[:_AHEAD]:
                reader.prefetch(*coming)
            for i, (window, (_, starts, nbytes)) in enumerate(zip(windows, ranges, strict=True)):
                if stop.is_set():
                    raise Stopped
                for coming in ranges[i + _AHEAD : i + _AHEAD + 1]:
                    reader.prefetch(*coming)
                data = views(reader.acquire(*ranges[i]), nbytes)
                rows = np.searchsorted(tensors, window.tensors)
                columns = rows, starts, self.bits[window.tensors]
                numbers = zip(*(column.tolist() for column in columns), strict=True)
                for piece, (row, start, bits) in zip(data, numbers, strict=True):
                    self._hasher.add(sums[row], piece, start, bits)
                reader.release()
                self.on_bytes(int(nbytes.sum()))
        return tensors, sums
