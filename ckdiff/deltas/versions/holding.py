"""What a full version says of a base: the digests of its tensors, read from its files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing

import numpy as np

from ckdiff.checkpoints.opening import open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.versions.applying import filler
from ckdiff.deltas.versions.checksums import digester
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.following import Expected, Following
from ckdiff.deltas.versions.grouping import grouped
from ckdiff.options import Observer
from ckdiff.running.runners import Meter, run_chunks
from ckdiff.running.threads import PerThread

def hold_full(following: Following, base: Checkpoint, checksum: str, workers: int) -> None:
    """Expect of the base what the full version holds that the stream comes from, of each tensor
    that no version after it has changed. Where the base is that version itself nothing is read.

    Raises CheckpointError and SourceChanged.
    """
    if following.full is None:
        return
    with ExitStack() as stack:
        full = open_in(stack, following.full.path)
        if _same_files(full, base):
            return
        names = full.table.names
        wanted = [at for at, name in enumerate(names) if name not in following.expected]
        for at, digest in _digests(full, wanted, checksum, workers).items():
            following.expected[names[at]] = Expected(checksum, digest, following.full.number)
        full.verify()


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are the same files of the disk."""
    if not (one.in_files and other.in_files and one.table.names == other.table.names):
        return False
    sides = [{file.identity[:2] for file in side.open_files} for side in (one, other)]
    return bool(sides[0]) and sides[0] == sides[1]


def _digests(
    full: Checkpoint, wanted: Sequence[int], checksum: str, workers: int
) -> dict[int, str]:
    """The digests of some tensors, by their positions; on threads."""
    nbytes = full.table.nbytes
    groups = list(grouped(nbytes[list(wanted)])) if wanted else []
    buffers = PerThread(lambda: np.empty(WINDOW, np.uint8))
    found: dict[int, str] = {}

    def digest(chunk: int, stop: threading.Event) -> dict[int, str]:
        made = {}
        with closing(full.reader()) as reader:
            for at in wanted[slice(*groups[chunk])]:
                work, fill, size = digester(checksum), filler(reader, at, stop), int(nbytes[at])
                for start in range(0, size, WINDOW):
                    window = buffers()[: min(WINDOW, size - start)]
                    fill(start, window)
                    work.update(window)
                made[at] = work.hexdigest()
        return made

    def finished(_: int, made: dict[int, str]) -> None:
        found.update(made)

    meter = Meter(Observer(), 0)  # nobody looks at it: comparing begins when all is known
    run_chunks(range(len(groups)), digest, workers=workers, done=finished, meter=meter)
    return found
