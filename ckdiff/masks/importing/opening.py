"""Opening a mask file: the format is told by content, whatever the file is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import printable
from ckdiff.masks.importing.maskfile import MaskFile, pread


def open_mask_file(path: str, stack: ExitStack) -> MaskFile:
    """The masks at ``path``, of which ``stack`` closes the files. Raises CheckpointError."""
    if not os.path.isdir(path):
        from ckdiff.checkpoints.formats.ziparchive import BEGIN, Archive

        file = OpenFile.open(path)
        stack.callback(file.close)
        if pread(file, 0, len(BEGIN)) == BEGIN:
            archive = Archive(_reading(file), file.size, printable(file.path))
            from ckdiff.checkpoints.formats.torcharchive import PICKLE
            from ckdiff.masks.importing.torchfile import read_torch

            if any(name.endswith(PICKLE) for name in archive.members):
                return read_torch(archive, file)
            from ckdiff.masks.importing.npz import read_npz

            return read_npz(archive, file)
    from ckdiff.masks.importing.tensorfile import read_tensor_file

    return read_tensor_file(path, stack)


def _reading(file: OpenFile) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        data = pread(file, offset, size)
        if len(data) < min(size, file.size - offset):
            file.check()  # says that it was cut
        return data

    return read
