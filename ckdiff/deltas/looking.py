"""Single tensors out of a delta: nothing else is rebuilt, and what is, is verified."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import Given, fetch_all, open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas import container
from ckdiff.deltas.applying import ApplyTask
from ckdiff.deltas.links import Links
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.applying import filler
from ckdiff.deltas.versions.encoding import window_of
from ckdiff.deltas.versions.folding import Buffers, Folder, Tensor
from ckdiff.deltas.versions.form import version_number
from ckdiff.deltas.versions.given import VERSION, kind_of
from ckdiff.deltas.versions.reading import Version, read_version
from ckdiff.deltas.weightpatch import make_patch
from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError, printable
from ckdiff.kernels.memory import Bytes
from ckdiff.options import checked_path, checked_text

_HINT = "give the checkpoint that the delta was made from"


class Delta:
    """A delta from which you want single tensors: a file, or one version of a stream.

    Use it as a context manager, which closes the file. ``memory`` limits the memory of its tables.
    Raises DeltaError, UsageError and BudgetError.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory: str | int | None = None) -> None:
        where, room = checked_path("a delta", path), Room(memory)
        self._file: container.Delta | None = None
        self._version: Version | None = None
        if kind_of(where) == VERSION:
            name = os.path.basename(os.path.abspath(where))
            self._version = read_version(where, room, version_number(name))
            if self._version.full:
                raise self._version.fault(
                    "is a full version", "it is a checkpoint: ckdiff.open_checkpoint reads it"
                )
            self._version.open(room)
            self._version.check()
        else:
            self._file = container.Delta(where, room)

    @property
    def encoding(self) -> str:
        """``packed``, ``indices``, ``xor`` or ``overwrite``."""
        if self._file is not None:
            return self._file.encoding
        assert self._version is not None
        assert self._version.said is not None
        return self._version.said.encoding

    @property
    def names(self) -> Sequence[str]:
        """The tensors that it rebuilds; for a version, the tensors that it changes."""
        if self._file is not None:
            return list(self._file.blueprint.names)
        assert self._version is not None
        return list(self._version.frames)

    def tensor(self, name: str, base: Given, *, as_torch: bool = False) -> Any:
        """One tensor after the delta, made from ``base`` in memory and verified.

        A numpy array with the tensor's shape. If numpy lacks the dtype, it has unsigned numbers
        with the same bits (uint16 for BF16). If an element has less than a byte, it has the bytes,
        in one dimension. With ``as_torch`` it is a torch tensor. Raises DeltaError for damage and a
        wrong base, UsageError for an unknown tensor, CheckpointError and SourceChanged.
        """
        checked_text("name", name)
        with ExitStack() as stack:
            (given,) = open_all(stack, base)
            fetch_all([given])
            found = self._of_file if self._file is not None else self._of_version
            dtype, shape, data = found(name, given)
            given.verify()
        bits = DTYPES[dtype].bits
        width = bits // 8 if bits in (8, 16, 32, 64) else 1
        patch = make_patch(name, shape, dtype, data.view(f"<u{width}"), None, as_torch=as_torch)
        return patch.values if bits < 8 else patch.values.reshape(shape)

    def close(self) -> None:
        """Close it; may be called more than once."""
        for opened in (self._file, self._version):
            if opened is not None:
                opened.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _of_file(self, name: str, base: Checkpoint) -> tuple[str, tuple[int, ...], Bytes]:
        delta = self._file
        assert delta is not None
        made = delta.blueprint
        at = _position(made.names, name, delta.path)
        links = Links(base, [delta])
        out = np.empty(int(made.nbytes[at]), np.uint8)
        sink = _Kept(int(made.file[at]), int(made.begin[at]), out)
        windows = delta.windows
        none = np.full(len(windows.groups), -1, np.int64)
        task = ApplyTask(base, [delta], links, sink, none)
        sums = np.zeros((2, 2), np.uint64)
        for group, (first, stop) in enumerate(windows.groups):
            mine = np.flatnonzero(windows.tensor[first:stop] == at)
            if len(mine):
                found, _ = task(group, threading.Event())
                sums += found[mine].sum(axis=0, dtype=np.uint64)
        held = delta.ranges.nbytes[at] > 0
        if held and bool((sums[0] != delta.tensors.base_hashes[at]).any()):
            raise links.other_base(name)
        if bool((sums[1] != delta.tensors.tuned_hashes[at]).any()):
            raise delta.damaged(f"what it makes of {called(name)} is wrong")
        delta.check()
        return made.dtypes[at], made.shapes[at], out

    def _of_version(self, name: str, base: Checkpoint) -> tuple[str, tuple[int, ...], Bytes]:
        version, table = self._version, base.table
        assert version is not None
        at = _position(table.names, name, base.label)
        nbytes, dtype = int(table.nbytes[at]), table.dtypes[at]
        steps = [version] if name in version.frames else []
        out = np.empty(nbytes, np.uint8)
        folder = Folder(Path(tempfile.gettempdir()), _HINT)
        with closing(base.reader()) as reader:
            fill = filler(reader, at, threading.Event())
            tensor = Tensor(name, nbytes, window_of(dtype), fill, steps)
            for start, window in folder.fold(tensor, Buffers()):
                out[start : start + len(window)] = window
        version.verify()
        return dtype, table.shapes[at], out


def _position(names: Sequence[str], name: str, where: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise UsageError(
            f"{printable(where)} has no tensor {called(name)}",
            hint="names are as in the checkpoint",
        ) from None


class _Kept:
    """Keeps one tensor of what is rebuilt."""

    def __init__(self, file: int, begin: int, out: Bytes) -> None:
        self._file, self._begin, self._out = file, begin, out

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """See Target."""
        at = offset - self._begin
        if file == self._file and 0 <= at < len(self._out):
            self._out[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def commit(self) -> None:
        """See Target."""
