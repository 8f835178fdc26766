"""What is known of a base: what versions say, and what a full version holds in its files."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing

import numpy as np

from ckdiff.checkpoints.opening import open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.parts import called
from ckdiff.deltas.versions.applying import filler
from ckdiff.deltas.versions.checksums import digester
from ckdiff.deltas.versions.encoding import WINDOW, window_of
from ckdiff.deltas.versions.following import Expected, Following, other_base
from ckdiff.deltas.versions.form import version_name
from ckdiff.deltas.versions.grouping import grouped
from ckdiff.dtypes import DTYPES
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
        left = (at for at, name in enumerate(names) if name not in following.expected)
        for at, digest in digests(full, dict.fromkeys(left, checksum), workers).items():
            following.expected[names[at]] = Expected(checksum, digest, following.full.number)
        full.verify()


def hold_base(base: Checkpoint, expected: Mapping[str, Expected], workers: int) -> None:
    """Raise DeltaError where a base is not what is expected of it. It is read for that."""
    names = base.table.names
    wanted = {at: expected[name].checksum for at, name in enumerate(names) if name in expected}
    for at, digest in digests(base, wanted, workers).items():
        if digest != expected[names[at]].digest:
            version = version_name(expected[names[at]].version)
            raise other_base(f"{called(names[at])} is not what {version} says")


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are the same files of the disk."""
    if not (one.in_files and other.in_files and one.table.names == other.table.names):
        return False
    sides = [{file.identity[:2] for file in side.open_files} for side in (one, other)]
    return bool(sides[0]) and sides[0] == sides[1]


def digests(source: Checkpoint, wanted: Mapping[int, str], workers: int) -> dict[int, str]:
    """The digests of some tensors, by their positions, which have checksums; on threads."""
    table, order = source.table, list(wanted)
    groups = list(grouped(table.nbytes[order])) if order else []
    buffers = PerThread(lambda: np.empty(WINDOW, np.uint8))
    found: dict[int, str] = {}

    def digest(chunk: int, stop: threading.Event) -> dict[int, str]:
        made = {}
        with closing(source.reader()) as reader:
            for at in order[slice(*groups[chunk])]:
                dtype, size = table.dtypes[at], int(table.nbytes[at])
                work, fill = digester(wanted[at], DTYPES[dtype].bits), filler(reader, at, stop)
                step = window_of(dtype)
                for start in range(0, size, step):
                    window = buffers()[: min(step, size - start)]
                    fill(start, window)
                    work.update(window)
                made[at] = work.hexdigest()
        return made

    def finished(_: int, made: dict[int, str]) -> None:
        found.update(made)

    meter = Meter(Observer(), 0)  # nobody looks at it: comparing begins when all is known
    run_chunks(range(len(groups)), digest, workers=workers, done=finished, meter=meter)
    return found
