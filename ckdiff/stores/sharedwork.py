"""A work directory that the workers of a cluster write mask objects into, by a shared file system.

One process owns the directory, as always. Workers put objects into it and nothing else, and only
while it is still that of the run they work for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from ckdiff.errors import ClusterError, printable
from ckdiff.outputs.ownership import PLAN, SUFFIX, check_work_path
from ckdiff.stores.objects import objects_folder
from ckdiff.stores.workdir import WorkDir, store_errors

_HINT = "the output must be on a file system that all workers share"


def prepare(work: WorkDir, rules: Iterable[str]) -> str:
    """Make the directories of masks, which workers never do; gives the plan's digest."""
    with store_errors(work.out):
        for rule in rules:
            (work.store / objects_folder(rule)).mkdir(parents=True, exist_ok=True)
        return _digest(work.path)


def check_plan(path: Path, digest: str) -> None:
    """Raise ClusterError unless the work directory is here too, and still of the same run.

    Raises StoreError where what is here is not ours.
    """
    check_work_path(path.with_name(path.name.removesuffix(SUFFIX)))
    try:
        same = _digest(path) == digest
    except OSError:
        same = False
    if not same:
        raise ClusterError(
            f"the worker on {socket.gethostname()} does not see the work directory "
            f"{printable(str(path))}",
            hint=_HINT,
        )


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest((path / PLAN).read_bytes())


def check_objects(work: WorkDir, objects: Mapping[str, tuple[int, str]]) -> None:
    """Raise ClusterError unless objects that a worker wrote are here too."""
    for key, (size, _) in objects.items():
        path = work.store / key
        try:
            here = os.stat(path).st_size == size
        except OSError:
            here = False
        if not here:
            raise ClusterError(
                f"a worker wrote {printable(str(path))}, but it cannot be seen here", hint=_HINT
            )
