"""The files of a directory as a format is given them, and all bytes of a checkpoint."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.pieces import Contents
from ckdiff.checkpoints.places.local import local_place
from ckdiff.checkpoints.places.place import Files, files_of


class Watched:
    """The files of a directory, and the longest read of them so far."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.longest = 0  #: bytes
        reading = files.place.read

        def read(file: int, begin: int, nbytes: int) -> bytes:
            assert min(file, begin, nbytes) >= 0
            self.longest = max(self.longest, nbytes)
            return reading(file, begin, nbytes)

        files.place.read = read  # type: ignore[method-assign]


@contextmanager
def watched(folder: Path, key: str | None = None) -> Iterator[Watched]:
    """The files of what is chosen of a directory."""
    place = local_place(folder)
    with closing(place):
        (files,) = files_of(place, key)
        yield Watched(files)


def contents_of(form: ModuleType, folder: Path, key: str | None = None) -> Contents:
    """What a format finds in a directory."""
    with watched(folder, key) as given:
        return checked(form.read_contents(given.files))


def checked(contents: Contents) -> Contents:
    """What is to be known before anything is read."""
    if contents.unchecked is not None:
        contents.unchecked()
    return contents


def opened(form: ModuleType, folder: Path, key: str | None = None) -> FileCheckpoint:
    """A checkpoint in a directory that is of this format."""
    checkpoint = open_local(folder, key=key)
    (files,) = files_of(checkpoint.place, key)
    assert form.__name__.endswith({"pieces": "dcppieces"}.get(f := files.choice.format, f))
    return checkpoint


def all_bytes(checkpoint: FileCheckpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """All tensors of a checkpoint: dtype, shape, bytes."""
    table = checkpoint.table
    found = {}
    with closing(checkpoint.reader()) as reader:
        for i, name in enumerate(table.names):
            size = int(table.nbytes[i])
            columns = (np.array([n], np.int64) for n in (i, 0, size))
            (address,) = reader.acquire(*columns).tolist()
            found[name] = table.dtypes[i], table.shapes[i], ctypes.string_at(address, size)
            reader.release()
    return found


def of_torch(tensors: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same of tensors of torch."""
    import torch

    from ckdiff.checkpoints.formats.torcharchive import TORCH_DTYPES

    names = {getattr(torch, name): known for name, known in TORCH_DTYPES.items()}

    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous().clone()
        data = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        found[name] = names[tensor.dtype], tuple(tensor.shape), data
    return found
