"""A checkpoint being written: files of known headers and sizes, filled by any thread in any order.

Nothing of it is under the output's name before every byte of every file was written and is on the
disk. The files lie as they would in the checkpoint: one file, or a directory with an index or none.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.budget import format_size
from ckdiff.checkpoints.formats.safetensors import read_header
from ckdiff.checkpoints.indexes import (
    INDEX_SUFFIX,
    SUFFIX,
    file_name_fault,
    index_of,
    read_index,
    shard_name_fault,
)
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, OutputError, printable
from ckdiff.outputs.checks import ELSEWHERE
from ckdiff.outputs.companionfiles import Companion
from ckdiff.outputs.companionnames import RECORD
from ckdiff.outputs.copied import is_as_copied, read_record, write_companions
from ckdiff.outputs.place import Place, write_errors
from ckdiff.outputs.writing import start_writeback
from ckdiff.running.threads import PerThread

RENAME_SHARD = "rename the file in the checkpoint, and in its index"  #: a hint
_WORTHWHILE = 4 << 20  # bytes that the disk is told of at once
_OTHERS = "ckdiff-"  # how the formats of our own files begin that are no checkpoints
_AT_ONCE = 1 << 30  # bytes that one call writes; Linux stops a little before 2 GiB


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file to be written."""

    name: str  #: relative to the checkpoint; of a checkpoint that is one file it is not used
    head: bytes  #: the header verbatim, its 8 bytes of length included
    size: int  #: bytes of the whole file


class Rebuilt:
    """A checkpoint being written. A context manager: nothing stays unless ``commit`` returned.

    With ``directory`` false there is one file, which is ``out`` itself, and no ``index``; else
    ``index`` is a file's name and bytes, or None; those of the components of a pipeline lie in
    the folders of their files, and are ``more_indexes``. ``companions`` are copied into a
    directory, and listed there. ``overwrite`` replaces what is a checkpoint and nothing else: files
    whose content is safetensors, indexes, and companions that are listed and as they were copied.
    ``apart`` and ``inputs`` are what is being read, and never overwritten.

    Making one raises OutputError for names that must not be written and for an output that is
    among the inputs; entering raises OutputError for what is in the way, BudgetError for a disk
    without room, and CheckpointError where so many files cannot be open.
    """

    def __init__(
        self,
        out: Path,
        files: Sequence[FilePlan],
        *,
        index: tuple[str, bytes] | None,
        directory: bool,
        overwrite: bool,
        more_indexes: Sequence[tuple[str, bytes]] = (),
        companions: Sequence[Companion] = (),
        apart: Sequence[Checkpoint] = (),
        inputs: Sequence[Path] = (),
    ) -> None:
        self.out = out
        self.files = list(files)
        self._companions = list(companions)
        self._indexes = [*([] if index is None else [index]), *more_indexes]
        self._directory = directory
        self._check_plans()
        self._place = Place(out, directory=directory, overwrite=overwrite, in_the_way=_foreign)
        self._place.keep_away_from(apart, inputs)
        self._missing = [plan.size for plan in self.files]
        self._fds: list[int] = []
        self._lock = threading.Lock()
        self._written = PerThread(lambda: [-1, 0, 0])  # the file and the bytes of the last writes

    def check(self) -> None:
        """Raise what entering would raise as things stand, before what is written is downloaded:
        OutputError and BudgetError.
        """
        self._place.check()
        self._check_disk()

    def __enter__(self) -> Rebuilt:
        self._place.__enter__()
        try:
            self._check_disk()
            make_room(len(self.files))
            with write_errors(self.out):
                for number, plan in enumerate(self.files):
                    self._create(plan)
                    self._put(number, 0, plan.head)
                for name, raw in self._indexes:
                    (self._place.path / name).write_bytes(raw)
                write_companions(self._place.path, self._companions)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # there is nothing left to lose
            self._close()
        self._place.__exit__()

    def write(self, file: int, offset: int, data: memoryview | bytes | npt.NDArray[Any]) -> None:
        """Write ``data``, contiguous and of any dtype, at byte ``offset`` of ``files[file]``.

        Any thread may call it; no byte may be written twice, and none of the header. Raises
        OutputError.
        """
        if isinstance(data, np.ndarray):
            data = data.reshape(-1).view(np.uint8).data
        view = memoryview(data).cast("B")
        plan = self.files[file]
        if offset < len(plan.head) or offset + len(view) > plan.size:
            raise OutputError(
                f"{self._shown(file)} has no place for {len(view):,} bytes at byte {offset:,}"
            )
        if len(view) == 0:
            return
        with write_errors(self.out):
            self._put(file, offset, view)
            self._let_begin(file, offset, offset + len(view))

    def commit(self) -> None:
        """Bring everything to the disk and give it its name.

        Raises OutputError, also where not every byte of every file was written.
        """
        for number, missing in enumerate(self._missing):
            if missing:
                least = f"{abs(missing):,} bytes too {'few' if missing > 0 else 'many'}"
                raise OutputError(f"{self._shown(number)} was given {least}")
        with write_errors(self.out):
            for fd in self._fds:
                os.fsync(fd)
            self._close()  # network file systems report here what they could not write
            self._place.commit()

    @property
    def names(self) -> list[str]:
        """The files of the checkpoint, and its index, as people look for them."""
        if not self._directory:
            return [self.out.name]
        return [*(plan.name for plan in self.files), *(name for name, _ in self._indexes)]

    @property
    def copied(self) -> list[str]:
        """The companions beside them, as people look for them."""
        return [companion.name for companion in self._companions]

    @property
    def stopped_hint(self) -> str:
        """What to tell whoever interrupted the writing."""
        return self._place.stopped_hint

    # inside

    def _check_disk(self) -> None:
        extra = sum(len(raw) for _, raw in self._indexes)
        extra += sum(companion.size for companion in self._companions)
        self._place.check_disk(sum(plan.size for plan in self.files) + extra)

    def _check_plans(self) -> None:
        """Raise OutputError for names that would leave the output, or get in each other's way."""
        for plan in self.files:
            if not 8 <= len(plan.head) <= plan.size:
                raise OutputError(
                    f"{printable(plan.name)} of {plan.size:,} bytes cannot begin with a header of "
                    f"{len(plan.head):,}"
                )
        if not self._directory:
            if len(self.files) != 1 or self._indexes or self._companions:
                raise OutputError(
                    f"{len(self.files):,} files cannot be written as one file", hint=ELSEWHERE
                )
            return
        names = [plan.name for plan in self.files]
        for name in names:
            if (fault := shard_name_fault(name)) is not None:
                raise OutputError(f"the file name {printable(name)!r} {fault}", hint=RENAME_SHARD)
        names += [name for name, _ in self._indexes]
        if self._companions:
            names += [*self.copied, RECORD]
        taken = set(names)
        for name in names:
            fault = _name_fault(name)
            parents = (str(parent) for parent in Path(name).parents)
            if fault is None and any(parent in taken for parent in parents):
                fault = "lies in another file of the checkpoint"
            if fault is not None:
                raise OutputError(f"the file name {printable(name)!r} {fault}")
        if len(taken) < len(names):
            raise OutputError("two files of the checkpoint have the same name")

    def _create(self, plan: FilePlan) -> None:
        """Make a file, as long as it will be: what follows may come in any order."""
        path = self._place.path
        if self._directory:
            path /= plan.name
            path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._fds.append(fd)
        os.ftruncate(fd, plan.size)

    def _put(self, file: int, offset: int, data: memoryview | bytes) -> None:
        view = memoryview(data)
        at = 0
        while at < len(view):
            at += os.pwrite(self._fds[file], view[at : at + _AT_ONCE], offset + at)
        with self._lock:
            self._missing[file] -= len(view)

    def _let_begin(self, file: int, start: int, stop: int) -> None:
        """Let the disk begin with what a thread wrote; pieces that follow each other together."""
        last = self._written()
        if last[0] == file and last[2] == start:
            start = last[1]
        if stop - start >= _WORTHWHILE:
            start_writeback(self._fds[file], start, stop - start)
            start = stop
        last[:] = file, start, stop

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        with contextlib.ExitStack() as stack:  # closes all, and raises the last failure
            for fd in fds:
                stack.callback(os.close, fd)

    def _shown(self, file: int) -> str:
        path = self.out / self.files[file].name if self._directory else self.out
        return f"{printable(str(path))} ({format_size(self.files[file].size)})"


def _name_fault(name: str) -> str | None:
    """Why a file of this name must not be made, or None."""
    fault = file_name_fault(name)
    if fault is None:
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            return "is not valid text"
    return fault


def _foreign(out: Path) -> str | None:
    """What a rebuilt checkpoint must not replace: anything that is more than a checkpoint."""
    if not stat.S_ISDIR(os.lstat(out).st_mode):
        return None if _is_shard(str(out)) else "is not a checkpoint in safetensors"
    record = read_record(str(out))
    for folder, folders, names in os.walk(out):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, out)
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                ours = bool(os.listdir(path))
            elif not stat.S_ISREG(mode):
                ours = False
            elif name.endswith(SUFFIX):
                ours = _is_shard(path)
            elif record is not None and relative in record:
                if not is_as_copied(path, record[relative]):
                    return f"holds {printable(relative)}, which is no longer as it was copied"
                continue
            else:
                ours = relative == RECORD and record is not None
                ours = ours or (name.endswith(INDEX_SUFFIX) and _is_index(path))
            if not ours:
                return f"holds {printable(relative)}, which is not part of a checkpoint"
    return None


def _is_shard(path: str) -> bool:
    """Whether a file holds weights: safetensors, but neither exported masks nor a delta."""
    try:
        with closing(OpenFile.open(path)) as file:
            metadata = read_header(file.fd, file.size, path).metadata
    except (CheckpointError, OSError):
        return False
    return not metadata.get("format", "").startswith(_OTHERS)


def _is_index(path: str) -> bool:
    try:
        index_of(read_index(path), path)
    except (CheckpointError, ValueError):
        return False
    return True
