"""The files of a directory as a format is given them, and a checkpoint of what it found in them."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ckdiff.checkpoints.choosing import Choice, Shards, choice_of
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.pieces import Contents
from ckdiff.checkpoints.places.local import LocalPlace
from ckdiff.checkpoints.places.localfolder import LocalFolder


class GivenFiles:
    """What is chosen of a directory."""

    def __init__(self, folder: Path, key: str | None = None, first: int = 0) -> None:
        self.folder, self.key, self.first = folder, key, first
        self.described = str(folder)
        self.choice: Choice = choice_of(LocalFolder(str(folder)))
        self.longest = 0  #: bytes of the longest read

    def __len__(self) -> int:
        return len(self.choice.names)

    def name(self, file: int) -> str:
        return self.choice.names[file]

    def size(self, file: int) -> int:
        return (self.folder / self.name(file)).stat().st_size

    def where(self, file: int) -> str:
        return str(self.folder / self.name(file))

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        assert 0 <= file < len(self)
        assert offset >= 0
        assert nbytes >= 0
        self.longest = max(self.longest, nbytes)
        with open(self.folder / self.name(file), "rb") as opened:
            opened.seek(offset)
            return opened.read(nbytes)

    def check(self, file: int) -> None:
        pass

    def index(self) -> bytes | None:
        index = self.choice.index
        return None if index is None else (self.folder / index).read_bytes()


def contents_of(form: ModuleType, folder: Path, key: str | None = None) -> Contents:
    """What a format finds in a directory."""
    return form.read_contents(GivenFiles(folder, key))  # type: ignore[no-any-return]


def opened(form: ModuleType, folder: Path, key: str | None = None) -> FileCheckpoint:
    """A checkpoint of what a format finds in a directory."""
    files = GivenFiles(folder, key)
    contents = form.read_contents(files)
    place = LocalPlace(str(folder), Shards(str(folder), list(files.choice.names)))
    return FileCheckpoint(place, contents)


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
