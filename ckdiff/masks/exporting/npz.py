"""Masks as a numpy archive: one bool array for each tensor, not compressed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from ckdiff.errors import UsageError, printable
from ckdiff.masks.exporting.format import Format
from ckdiff.masks.exporting.masks import Masks, compact, encoded
from ckdiff.stores.table import IntArray

METADATA = "__metadata__"  #: an array of the UTF-8 bytes of a JSON object
_LONGEST = 60_000  # bytes of a name; a zip's names end at 65,535
_ENTRY = 512  # bytes that a member takes at most besides its name and data, roughly
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip must have a time; the same masks give the same bytes


class Npz:
    """An archive to be written."""

    def __init__(self, masks: Masks, chosen: IntArray) -> None:
        self._masks = masks
        self._chosen = chosen
        self._metadata = encoded(compact(masks.metadata("bool", chosen)))
        self.names = [masks.names[i] for i in chosen.tolist()]
        known = set(self.names)
        for name in self.names:
            # numpy would give another tensor's mask under this name
            ambiguous = name.endswith(".npy") and name.removesuffix(".npy") in known
            if ambiguous or "\0" in name or name == METADATA or len(encoded(name)) > _LONGEST:
                raise UsageError(
                    f"npz cannot hold a tensor called {printable(name[:80])}",
                    hint="use --to safetensors",
                )
        self.data_size = int(masks.elements[chosen].sum())
        #: bytes of the file, about
        self.size = self.data_size + len(self._metadata) + _ENTRY * (len(self.names) + 1)
        self.size += 2 * sum(map(len, self.names))

    def write(self, path: Path, done: Callable[[int], None]) -> None:
        """See Output."""
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
            with _member(archive, METADATA, len(self._metadata)) as member:
                _header(member, (len(self._metadata),), "|u1")
                member.write(self._metadata)
            for position, pieces in self._masks.by_tensor(self._chosen):
                name = self._masks.names[position]
                with _member(archive, name, int(self._masks.elements[position])) as member:
                    _header(member, self._masks.shapes[position], "|b1")
                    for piece in pieces:
                        member.write(piece.flags().tobytes())
                        done(piece.elements)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    info.file_size = size + _ENTRY  # decides whether the entry is one for large files
    return archive.open(info, "w")


def _header(member: IO[bytes], shape: tuple[int, ...], descr: str) -> None:
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, fields)


FORMAT = Format(Npz, suffixes=(".npz",))
