"""Masks in a numpy archive, compressed or not. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import CheckpointError, printable
from ckdiff.exports.npz import METADATA
from ckdiff.imports.maskfile import (
    METADATA_LIMIT,
    PIECE,
    MaskFile,
    Notes,
    Shape,
    is_shape,
    make_item,
)
from ckdiff.writing.objects import file_digest

_SUFFIX = ".npy"
#: what reading a zip of another's making can raise
_BROKEN = (
    zipfile.BadZipFile, zlib.error, tokenize.TokenError, EOFError, LookupError, MemoryError,
    NotImplementedError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(f"{where}: cannot be read as npz: {reason}") from None


def read_npz(path: str, stack: ExitStack) -> MaskFile:
    """The masks at ``path``; ``stack`` closes it. Raises CheckpointError."""
    where = printable(path)
    with _readable(where):
        digest = file_digest(Path(path))
        archive = stack.enter_context(zipfile.ZipFile(path))
    notes, found = Notes(), []
    seen = set[str]()
    for info in archive.infolist():
        name = info.filename.removesuffix(_SUFFIX)
        if name in seen or not info.filename.endswith(_SUFFIX):
            what = "is there twice" if name in seen else "is no array"
            raise CheckpointError(f"{where}: {printable(info.filename)} {what}")
        seen.add(name)
        with _readable(f"{where}: {printable(name)}"), archive.open(info) as member:
            dtype, shape = _header(member)
            size = math.prod(shape) * dtype.itemsize
            if info.file_size != member.tell() + size:
                raise ValueError("its size disagrees with its header")
            if name == METADATA and size <= METADATA_LIMIT:
                notes = Notes.of(json.loads(member.read(size)))
                continue
        found.append((name, dtype, shape, info))
    notes.checked(where)
    items = [
        make_item(where, name, dtype, shape, _Reader(archive, info, dtype, where), notes.encoding)
        for name, dtype, shape, info in found
    ]
    described = notes.described(where)
    files = [{"label": Path(path).name, "digest": digest}]
    return MaskFile("npz", items, files, notes.polarity, notes.rule, described)


def _header(member: IO[bytes]) -> tuple[np.dtype[Any], Shape]:
    # newer versions of the format only allow for headers that are long, and ours are short
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("an array format that no mask needs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers by Python 2
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.hasobject or dtype.kind not in "biu":
        raise ValueError(f"is no mask: {dtype}")
    if fortran and len(shape) > 1:
        raise ValueError("is in Fortran order: save np.ascontiguousarray of it")
    if not is_shape(shape):
        raise ValueError(f"has no sensible shape: {shape}")
    return dtype, shape


class _Reader:
    """Reads one array, unpacked on the way."""

    def __init__(
        self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtype: np.dtype[Any], where: str
    ) -> None:
        self._archive, self._info, self._dtype = archive, info, dtype
        self._where = f"{where}: {printable(info.filename)}"

    def __call__(self) -> Iterator[npt.NDArray[Any]]:
        with _readable(self._where):
            member = self._archive.open(self._info)
            _header(member)
        with member:
            while True:
                with _readable(self._where):  # at the end the checksum is verified
                    data = member.read(PIECE * self._dtype.itemsize)
                    piece = np.frombuffer(data, self._dtype)
                if not len(piece):
                    return
                yield piece.view(np.uint8) if self._dtype.kind == "b" else piece
