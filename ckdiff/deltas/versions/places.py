"""Which bytes of its tensors a weight version changes, found without the base.

Every frame is decoded to its end, so what is given is all there is; nothing grows with a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ckdiff.deltas.parts import called
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.decoding import COMMON_WINDOW, Decoder, checked_head
from ckdiff.deltas.versions.form import XOR
from ckdiff.deltas.versions.reading import Version
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import Bytes
from ckdiff.kernels.zstdframes import LONGEST_HEADER

#: bytes of anonymous memory of a thread that looks for places
PLACES_MEMORY = COMMON_WINDOW + (24 << 20)

Places = npt.NDArray[np.int64]
T = TypeVar("T")

_WINDOW = 3 << 18  # bytes that are looked at in one go; whole elements of any dtype
_PART = 1 << 16  # positions that are decoded at a time
_SORTED_HERE = 1 << 20  # positions that may be in any order
_MOST = 1 << 44  # bytes of a tensor: what is larger is none
_large = threading.Lock()  # held while a frame is decoded that needs much memory


def places(version: Version, tensor: str, nbytes: int | None = None) -> Iterator[Places]:
    """Positions of the changed bytes of a tensor, ascending and each once, a part at a time.

    ``nbytes`` are the tensor's bytes, where they are known. Raises DeltaError for a frame that is
    damaged, or does not fit.
    """
    assert version.said is not None
    version.reader(version.frames[tensor])  # a packed one says so here
    head = version.head(tensor, nbytes)
    if head.window > COMMON_WINDOW:
        with _large:
            yield from _found(version, tensor, nbytes)
        return
    yield from _found(version, tensor, nbytes)


def count_places(version: Version, tensor: str, nbytes: int | None = None) -> int:
    """How many bytes of a tensor a version changes; of a packed one those of changed elements.

    Raises DeltaError.
    """
    if version.packed is not None:
        version.head(tensor, nbytes)
        version.packed.check_frames(tensor)
        return version.packed.changed_bytes(tensor)
    return sum(len(part) for part in places(version, tensor, nbytes))


def changes(version: Version, tensor: str, window: int) -> Iterator[Bytes]:
    """The bytes of an ``xor`` tensor's frame, ``window`` of them at a time, but for the last.

    They hold until the next are taken. Raises DeltaError.
    """
    buffer = np.empty(window, np.uint8)

    def read(decoder: Decoder, content: int) -> Iterator[Bytes]:
        for start in range(0, content, window):
            part = buffer[: min(window, content - start)]
            decoder.fill(part)
            yield part
        decoder.finish()

    yield from _decoded(version, tensor, None, read)


def _found(version: Version, tensor: str, nbytes: int | None) -> Iterator[Places]:
    assert version.said is not None
    read = _differing if version.said.encoding == XOR else _listed(nbytes)
    yield from _decoded(version, tensor, nbytes, read)


def _decoded(
    version: Version,
    tensor: str,
    nbytes: int | None,
    read: Callable[[Decoder, int], Iterator[T]],
) -> Iterator[T]:
    """What ``read`` gives of a tensor's frame; what is wrong with it is said of the version."""
    assert version.said is not None
    source = version.reader(version.frames[tensor])
    try:
        head = checked_head(version.said.encoding, source(0, LONGEST_HEADER), nbytes)
        if head.content > _MOST:
            raise Damaged(f"holds {head.content:,} bytes, more than any tensor")
        with closing(Decoder(source, head)) as decoder:
            yield from read(decoder, head.content)
    except Damaged as error:
        raise version.fault(f"{called(tensor)} {error}") from None
    except OSError as error:
        raise version.fault(f"cannot be read: {error.strerror}") from None


def _differing(decoder: Decoder, content: int) -> Iterator[Places]:
    """Where the exclusive or of two tensors is not zero."""
    window = np.empty(min(_WINDOW, content), np.uint8)
    for start in range(0, content, _WINDOW):
        part = window[: min(_WINDOW, content - start)]
        decoder.fill(part)
        found = nonzero(part)
        if len(found):
            yield found + start
    decoder.finish()


def nonzero(data: Bytes) -> Places:
    """Where bytes are not zero, ascending: most words of eight have none."""
    whole = len(data) - len(data) % 8
    words = np.flatnonzero(data[:whole].view(np.uint64) != 0)
    row, column = np.nonzero(data[:whole].reshape(-1, 8)[words] != 0)
    rest = np.flatnonzero(data[whole:] != 0) + whole
    return np.concatenate([8 * words[row] + column, rest])


def _listed(nbytes: int | None) -> Callable[[Decoder, int], Iterator[Places]]:
    """Positions as a frame lists them; the values behind them are passed over."""

    def read(decoder: Decoder, content: int) -> Iterator[Places]:
        count, last = (content - 4) // 5, -1
        if int(decoder.numbers(1)[0]) != count:
            raise Damaged("does not hold as many values as it says")
        size = count if count <= _SORTED_HERE else _PART
        for start in range(0, count, max(size, 1)):
            found = decoder.numbers(min(size, count - start))
            if count <= _SORTED_HERE:
                found.sort()
            if int(found[0]) <= last or bool((found[1:] <= found[:-1]).any()):
                raise Damaged("has positions that are not in order, or are there twice")
            last = int(found[-1])
            if nbytes is not None and last >= nbytes:
                raise Damaged(f"changes bytes beyond the {nbytes:,} of the tensor")
            yield found
        values = np.empty(min(count, _WINDOW), np.uint8)
        for start in range(0, count, _WINDOW):
            decoder.fill(values[: min(_WINDOW, count - start)])
        decoder.finish()

    return read


def elements(version: Version, tensor: str, dtype: str, nbytes: int) -> Iterator[Places]:
    """Positions of the changed elements of a tensor, ascending and each once, a part at a time.

    Raises DeltaError; also for ``overwrite`` of elements that share bytes: which of them changed
    is not known without the base.
    """
    assert version.said is not None
    version.reader(version.frames[tensor])  # a packed one says so here
    bits, last = DTYPES[dtype].bits, -1
    if bits < 8:
        if version.said.encoding != XOR:
            raise version.fault(
                f"{called(tensor)} has elements of {bits} bits, and overwrite says only which "
                "bytes changed",
                "ckdiff diff of the two checkpoints finds the elements",
            )
        version.head(tensor, nbytes)
        for number, part in enumerate(changes(version, tensor, _WINDOW)):
            marked = np.unpackbits(part, bitorder="little").reshape(-1, bits).any(axis=1)
            yield np.flatnonzero(marked) + number * (_WINDOW * 8 // bits)
        return
    for found in places(version, tensor, nbytes):
        at = found // (bits // 8)
        keep = np.empty(len(at), np.bool_)
        keep[0], keep[1:] = at[0] != last, at[1:] != at[:-1]
        last = int(at[-1])
        yield at[keep]
