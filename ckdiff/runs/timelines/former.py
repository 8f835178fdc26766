"""A timeline that is there already: what of it is used where checkpoints are appended to it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, StoreExists, printable
from ckdiff.kernels import hashing
from ckdiff.layout import IntArray
from ckdiff.outputs.placing import MANIFEST
from ckdiff.runs.timelines.file import (
    COUNTS,
    LENGTHS,
    WAYS,
    step_folder,
    table_key,
    tables,
)
from ckdiff.stores.manifest import read_manifest
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.maskstream import MaskSource
from ckdiff.stores.objects import file_digest, object_keys, objects_folder

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def tensors_of(
    root: Path, manifest: dict[str, Any]
) -> tuple[list[str], list[str], list[tuple[int, ...]]]:
    """Names, dtypes (of the first checkpoint) and shapes of what a timeline compares."""
    table = open_step(root, manifest, 1).table
    return table.names, table.dtypes, table.shapes


def read_counts(root: Path, manifest: dict[str, Any]) -> IntArray:
    """The counts of a timeline, (rows, tensors), verified. Raises StoreCorrupt."""
    return read_table(root, manifest, COUNTS)


def read_table(root: Path, manifest: dict[str, Any], name: str) -> npt.NDArray[Any]:
    """One of the tables of a timeline, (rows, tensors), verified. Raises StoreCorrupt."""
    key = table_key(name)
    verify(root, key, manifest["objects"][key])
    known = tables(len(manifest["steps"]), statistics=manifest["statistics"])
    rows, dtype = known[name]
    kind: Any = np.dtype(dtype).newbyteorder("<")
    return np.fromfile(root / key, kind).reshape(rows, manifest["tensors"])


def verify(root: Path, key: str, known: Sequence[Any]) -> None:
    """Hold a file against its size and digest. Raises StoreCorrupt."""
    path, (size, digest) = root / key, known
    try:
        if os.stat(path).st_size == size and file_digest(path) == digest:
            return
    except OSError as error:
        raise StoreCorrupt(f"cannot read {printable(str(path))}: {error.strerror}") from error
    raise StoreCorrupt(
        f"{printable(str(path))} is damaged: its digest differs",
        hint="--overwrite makes a new timeline",
    )


def open_step(root: Path, manifest: dict[str, Any], step: int) -> MaskStore:
    """The store of a step, held against what the timeline says of it. Raises StoreCorrupt."""
    key = f"{step_folder(step)}/{MANIFEST}"
    verify(root, key, manifest["objects"][key])
    store = MaskStore(root / step_folder(step))
    said = manifest["tensors"], manifest["elements"], manifest["addresses"], (manifest["rule"],)
    found = store.manifest["layout"]["addresses"]
    if said != (len(store.table), store.table.total_elements, found, store.masks):
        raise StoreCorrupt(
            f"{printable(str(store.path))} is not a step of the timeline that it is in",
            hint="make the timeline again",
        )
    return store


def unpaired_at(root: Path, manifest: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The tensors that the first checkpoint and that of a step do not share. Raises StoreCorrupt.

    Reads the manifest of the step's store, and nothing else of it.
    """
    key = f"{step_folder(step)}/{MANIFEST}"
    verify(root, key, manifest["objects"][key])
    found: list[dict[str, Any]] = read_manifest(root / step_folder(step)).get("unpaired", [])
    return found


class Former:
    """The steps of a timeline that are taken over into the next one: the first ``count``."""

    def __init__(self, root: Path, manifest: dict[str, Any], count: int) -> None:
        self.root, self.manifest, self.count = root, manifest, count
        self.counts = read_counts(root, manifest)
        #: of all of its steps, the last one included: nothing of these is summed again
        self.paths: tuple[npt.NDArray[np.float64], IntArray] | None = None
        if manifest["statistics"]:
            lengths, ways = (read_table(root, manifest, name) for name in (LENGTHS, WAYS))
            self.paths = lengths, ways
        #: all of its steps: the last one is compared again
        steps = range(1, len(manifest["steps"]) + 1)
        self.stores = [open_step(root, manifest, step) for step in steps]

    def sources(self, rule: str) -> list[MaskSource]:
        """The masks of the steps that are taken over."""
        found = []
        for step, store in enumerate(self.stores[: self.count], 1):
            length = store.manifest["layout"]["addresses"] // 8
            folder = store.path / objects_folder(rule)
            objects = tuple(store.objects[key] for key in object_keys(rule, length))
            found.append(MaskSource(str(folder), f"{step_folder(step)}/masks/{rule}", objects))
        return found

    def take_over(self, target: Path) -> None:
        """Put the stores of the steps into the timeline in the making, each file verified.

        Raises StoreCorrupt; OSError passes through.
        """
        for step, store in enumerate(self.stores[: self.count], 1):
            for key in (*store.objects, MANIFEST):
                to = target / step_folder(step) / key
                to.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    to.unlink()
                _second_name(store.path / key, to)
                if key != MANIFEST:
                    verify(target / step_folder(step), key, store.objects[key])

    def check(self, side: int, hashes: np.ndarray[Any, Any], nbytes: IntArray, label: str) -> None:
        """Raise StoreExists where what was read of the first checkpoint (side 0), or of the last
        (side 1), is not what the timeline was made of.
        """
        table = self.stores[-1].table
        known = table.tuned_hashes if side else table.base_hashes
        columns = hashes[:, 0].tolist(), hashes[:, 1].tolist(), nbytes.tolist()
        if list(map(hashing.finish, *columns)) != known:
            raise StoreExists(
                f"{printable(str(self.root))} is of other weights than those of {printable(label)}",
                hint="--overwrite makes it anew, and reads all checkpoints",
            )


def _second_name(path: Path, to: Path) -> None:
    """Give a file another name, or copy it where the file system has no such thing."""
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(path, to)
