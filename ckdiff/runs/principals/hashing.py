"""What a mask is made from, by content: the hash of every tensor that a checkpoint has of a store.

It makes the mask's base known, so that overlaps with the runs that started from it know it too; and
a run that is resumed knows whether it reads the same weights.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ckdiff.budget import usable_cores
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import hashing
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import views
from ckdiff.running.threads import Stopped, run_threads
from ckdiff.stores.matching import Matched
from ckdiff.stores.table import UNKNOWN

_WINDOW = 1 << 20  #: elements


def content_hashes(
    checkpoint: Checkpoint, index: Sequence[int], matched: Matched, *, workers: int | None
) -> list[str]:
    """The content hash of each of the store's tensors; UNKNOWN where the checkpoint has none.

    Of a tensor of which the store has the first rows only, that of these. Raises CheckpointError
    and SourceChanged.
    """
    sizes = matched.layout.elements.tolist()
    found = [UNKNOWN] * len(index)
    hasher = ContentHasher()

    def task(chunk: int, stop: threading.Event) -> str:
        reader, tensor = checkpoint.reader(), index[chunk]
        bits = DTYPES[checkpoint.table.dtypes[tensor]].bits
        sums, total = np.zeros(2, np.uint64), sizes[chunk] * bits // 8
        try:
            for start in range(0, total, _WINDOW * bits // 8):
                if stop.is_set():
                    raise Stopped
                nbytes = np.array([min(_WINDOW * bits // 8, total - start)], np.int64)
                place = np.array([tensor], np.int64), np.array([start], np.int64), nbytes
                hasher.add(sums, views(reader.acquire(*place), nbytes)[0], start, bits)
                reader.release()
        finally:
            reader.close()
        low, high = sums.tolist()
        return hashing.finish(low, high, total)

    def done(chunk: int, digest: str) -> None:
        found[chunk] = digest

    known = [i for i, at in enumerate(index) if at >= 0]
    run_threads(known, task, workers=workers or usable_cores(), done=done)
    return found
