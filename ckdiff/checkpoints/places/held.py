"""Tensors in the memory of this process: where their elements are, and how they are copied.

What lies packed is read where it is. Everything else (strided, reversed, of the other byte order,
on a device) is copied a window at a time: its bits are, never its values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.formats.torcharchive import TORCH_DTYPES
from ckdiff.checkpoints.pieces import boxes
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable

#: names of dtypes, of numpy, ml_dtypes and torch -> those of safetensors
KNOWN_DTYPES = {**TORCH_DTYPES, "float4_e2m1fn_x2": "F4"}
_FAR = 1 << 62  # more than any stride: repeated elements are no way through memory
_BLOCK = 512, 16  # words along the way that they lie in memory, and across
_HOST = (1, 3)  # kDLCPU, kDLCUDAHost


class Held(ABC):
    """One tensor. It is kept alive, but whoever has it can still write to it.

    There may be 100,000 of them: what is not needed for each is made when it is.
    """

    __slots__ = ("address", "dtype", "shape", "width", "words")

    def __init__(self, dtype: str, words: tuple[int, ...], width: int, address: int) -> None:
        self.dtype = dtype  #: the safetensors name
        self.words = self.shape = words  #: its shape in words, and in elements of the dtype
        self.width = width  #: bytes of a word: of an element, or of some that are packed in a byte
        self.address = address  #: of the packed words; 0 where they are to be copied
        packed = width * 8 // DTYPES[dtype].bits
        if packed > 1:
            self.shape = (*words[:-1], words[-1] * packed)

    @property
    def nbytes(self) -> int:
        """Bytes of its packed elements."""
        return prod(self.words) * self.width

    @abstractmethod
    def copy(self, first: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill ``into``, whole words of bytes, with the words from ``first`` on, in their order."""

    @abstractmethod
    def moved(self) -> bool:
        """Whether its memory is not where it was: it must not be touched then."""

    @abstractmethod
    def written(self) -> bool:
        """Whether it is known to have been written to since it was opened."""

    def copy_words(self, words: npt.NDArray[Any], first: int, into: npt.NDArray[np.uint8]) -> None:
        """``copy`` of what numpy sees as ``words``."""
        # of the machine's byte order: numpy swaps the bytes on the way
        out = into.view(words.dtype.newbyteorder("="))
        for part, start, stop in self.parts(first, len(out)):
            found = words[part]
            copy_blocks(found, out[start:stop].reshape(found.shape))

    def parts(self, first: int, count: int) -> Iterator[tuple[tuple[slice, ...], int, int]]:
        """The words [first, first + count) as boxes: slices, and which words [from, to) of the
        ``count`` each of them is.
        """
        done = 0
        for at, extent in boxes(self.words, first, first + count):
            size = prod(extent)
            pairs = zip(at, extent, strict=True)
            yield tuple(slice(low, low + n) for low, n in pairs), done, done + size
            done += size


class HeldArray(Held):
    """Words that numpy can see."""

    __slots__ = ("_array", "_at", "_owner")

    def __init__(self, words: npt.NDArray[Any], dtype: str, owner: Any) -> None:
        """``words`` is a view of ``owner``'s memory, which it keeps alive."""
        self._array, self._owner = words, owner
        self._at = at = self._now()
        packed = words.flags.c_contiguous and words.dtype.isnative
        address = (at or _address(words)) if packed else 0
        super().__init__(dtype, words.shape, words.dtype.itemsize, address)

    def copy(self, first: int, into: npt.NDArray[np.uint8]) -> None:
        """See Held."""
        self.copy_words(self._array, first, into)

    def _now(self) -> int:
        """Where the owner's memory is, as far as it can be asked."""
        return _address(self._owner) if isinstance(self._owner, np.ndarray) else 0

    def moved(self) -> bool:
        """See Held."""
        return self._now() != self._at

    def written(self) -> bool:
        """See Held. Nobody counts what is written to an array of numpy."""
        return False


def _address(array: npt.NDArray[Any]) -> int:
    """Where an array's first element is. To ask takes a microsecond."""
    return int(array.__array_interface__["data"][0])


def copy_blocks(words: npt.NDArray[Any], into: npt.NDArray[Any]) -> None:
    """Copy words to packed ones. What lies along another dimension is taken in blocks, so that of
    what is fetched into the cache all is used.
    """
    inner = min(range(words.ndim), key=lambda i: abs(words.strides[i]) or _FAR, default=0)
    if words.ndim < 2 or inner == words.ndim - 1:
        np.copyto(into, words)
        return
    rows, columns = np.moveaxis(words, inner, 0), np.moveaxis(into, inner, 0)
    along, across = _BLOCK
    for row in range(0, rows.shape[0], along):
        for column in range(0, rows.shape[-1], across):
            part = slice(row, row + along), ..., slice(column, column + across)
            np.copyto(columns[part], rows[part])


def is_array(value: Any) -> bool:
    """Whether a value is an array of numpy, or says that it is one like it; scalars are none."""
    if isinstance(value, np.ndarray):
        return True
    if isinstance(value, (type, np.generic)):
        return False
    return all(hasattr(value, name) for name in ("__array__", "shape", "dtype"))


def held_array(value: Any, name: str, where: str) -> HeldArray | str:
    """An array as a tensor, or in words why it is left out: that safetensors has no such dtype.
    Raises CheckpointError for what is none.
    """
    array = value if isinstance(value, np.ndarray) else _as_numpy(value, name, where)
    if isinstance(array, np.ma.MaskedArray):
        raise _wrong(where, name, "is a masked array", "fill it: array.filled(...)")
    array = np.asarray(array)
    known, word, refused = _word_of(array.dtype)
    if refused:
        raise _wrong(
            where, name, f"is an array of {printable(str(array.dtype))[:60]}, not of numbers",
            "leave it out, or give arrays of numbers",
        )  # fmt: skip
    if word is None:
        return f"of dtype {printable(str(array.dtype))[:40]}"
    return HeldArray(array if word == array.dtype else array.view(word), known, value)


@lru_cache(256)  # there may be 100,000 arrays
def _word_of(dtype: np.dtype[Any]) -> tuple[str, np.dtype[Any] | None, bool]:
    """The safetensors name of a dtype, the words that arrays of it are seen as, and whether it is
    none of numbers. There are no words where there is no name.
    """
    if dtype.fields is not None or dtype.kind in "OSUTMm" or dtype.type is np.void:
        return "", None, True
    known = KNOWN_DTYPES.get(dtype.name)
    if known is None or DTYPES[known].bits != 8 * dtype.itemsize:
        return "", None, False
    if dtype.kind == "c":  # words of one half would be in the other order
        return known, dtype, False
    return known, np.dtype(f"u{dtype.itemsize}").newbyteorder(dtype.byteorder), False


def _as_numpy(value: Any, name: str, where: str) -> npt.NDArray[Any]:
    """An array of another library, without a copy."""
    what = f"is a {printable(type(value).__name__)[:60]}"
    if hasattr(value, "__dlpack_device__"):
        try:
            device = int(value.__dlpack_device__()[0])
        except Exception:  # whatever another library raises where it is in several places
            device = -1
        if device not in _HOST:
            raise _wrong(where, name, f"{what} that is not in the memory of this machine",
                         "copy it: np.asarray(array)")  # fmt: skip
    try:
        return np.asarray(value, copy=False)
    except Exception:  # it may be anything
        raise _wrong(
            where, name, f"{what} that numpy cannot see without a copy", "give np.asarray(array)"
        ) from None


def _wrong(where: str, name: str, what: str, hint: str) -> CheckpointError:
    return CheckpointError(f"{where}: {printable(name)} {what}", hint=hint)
