"""Masks as torch saves them: ``{"masks": {name: bool tensor}, "metadata": {...}}``.

``torch.save`` wants all tensors at once. They lie in a file beside the output meanwhile, mapped, so
that memory stays bounded; the disk must hold the masks twice until it is done.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.errors import StoreError, UsageError, install, printable
from ckdiff.masks.exporting.format import Format
from ckdiff.masks.exporting.masks import Masks, encoded
from ckdiff.outputs.writing import write_all
from ckdiff.stores.table import IntArray

_ENTRY = 512  # bytes that a tensor takes besides its elements, about


def load_torch() -> Any:
    """The torch module; raises UsageError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            "this format needs torch, which is not installed",
            hint=f"{install('torch')}, or use another format",
        ) from None
    return torch


class TorchFile:
    """A file to be written."""

    def __init__(self, masks: Masks, chosen: IntArray) -> None:
        self._torch = load_torch()
        self._masks = masks
        self._chosen = chosen
        self.names = [masks.names[i] for i in chosen.tolist()]
        self.data_size = int(masks.elements[chosen].sum())
        # encoded now: a name that is no text is said before the work
        names = sum(len(encoded(name)) for name in self.names)
        #: bytes on the disk while it is written, about
        self.size = 2 * self.data_size + _ENTRY * len(chosen) + 2 * names

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        """See Output."""
        flags = path.with_name("flags")
        fd = os.open(flags, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.unlink(flags)
            for piece in self._masks.pieces(self._chosen):
                write_all(fd, piece.flags().tobytes())
                done(piece.elements)
            # private: torch wants memory that it could write to
            memory = mmap.mmap(fd, self.data_size, mmap.MAP_PRIVATE) if self.data_size else b""
        finally:
            os.close(fd)
        content = {"masks": self._tensors(memory), "metadata": self._metadata()}
        try:
            self._save(content, path)
        except RuntimeError as error:  # how torch reports a full disk
            reason = str(error).splitlines()[0]
            raise StoreError(
                f"torch cannot write {printable(str(path))}: {printable(reason)}",
                hint="is there room on the disk?",
            ) from None

    def _save(self, content: Any, path: Path) -> None:
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError:  # torch takes names that are text, and files of any name
            with open(path, "xb") as file:
                self._torch.save(content, file)
        else:
            self._torch.save(content, os.fspath(path))

    def _tensors(self, memory: mmap.mmap | bytes) -> dict[str, Any]:
        tensors, at = {}, 0
        for i in self._chosen.tolist():
            count = int(self._masks.elements[i])
            if count:
                array = np.frombuffer(memory, np.bool_, count, at)
                tensor = self._torch.from_numpy(array)
            else:
                tensor = self._torch.zeros(0, dtype=self._torch.bool)
            tensors[self._masks.names[i]] = tensor.reshape(self._masks.shapes[i])
            at += count
        return tensors

    def _metadata(self) -> dict[str, str]:
        return self._masks.metadata("bool", self._chosen)


FORMAT = Format(TorchFile, suffixes=(".pt", ".pth"), also=(".bin", ".ckpt"))
