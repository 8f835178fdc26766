"""The header of a file that may be a delta: read within bounds, whatever the file is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT, Header, header_from
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.deltas.parts import FORMAT, MANIFEST
from ckdiff.deltas.room import OWN_TENSOR, Room, header_cost
from ckdiff.errors import BudgetError, CheckpointError

_PIECE, _LONGEST_WORD = 1 << 20, 64  # bytes of a header that are looked at in one go, and again


def read_own_header(file: OpenFile, room: Room, shown: str) -> Header:
    """The header of an open file, which is taken out of ``room`` before it is read and parsed.

    Raises HeaderError, BudgetError and OSError.
    """
    passing = 0

    def read(offset: int, size: int) -> bytes:
        nonlocal passing
        room.take(size, shown)
        passing += size
        raw = pread(file.fd, offset, size)
        room.take(header_cost(raw, OWN_TENSOR) if offset else 0, shown)
        return raw

    header = header_from(read, file.size, shown)
    room.give(passing)
    return header


def is_delta(path: str) -> bool:
    """Whether a file says that it is a delta or has a delta's manifest, damaged or not.

    A header that has neither word in it is not parsed: it may be a checkpoint's, and large. Raises
    nothing.
    """
    try:
        file = OpenFile.open(path)
    except CheckpointError:
        return False
    try:
        if not _mentions(file, (FORMAT.encode(), MANIFEST.encode())):
            return False
        header = read_own_header(file, Room(), path)
        # what lost its metadata on the way must not be taken for a checkpoint
        return header.metadata.get("format") == FORMAT or MANIFEST in header.names
    except BudgetError:
        return True  # whoever opens it will be told
    except (CheckpointError, OSError):
        return False
    finally:
        file.close()


def pread(fd: int, begin: int, size: int) -> bytes:
    """Up to ``size`` bytes; fewer only at the end of the file."""
    data = os.pread(fd, size, begin)
    if len(data) == size or not data:
        return data
    parts, got = [data], len(data)
    while got < size and (more := os.pread(fd, size - got, begin + got)):
        parts.append(more)
        got += len(more)
    return b"".join(parts)


def _mentions(file: OpenFile, words: Sequence[bytes]) -> bool:
    """Whether one of the words is in the header."""
    end = 8 + min(int.from_bytes(pread(file.fd, 0, 8), "little"), HEADER_LIMIT)
    end, at, before = min(end, file.size), 8, b""
    while at < end and (data := pread(file.fd, at, min(_PIECE, end - at))):
        if any(word in before + data for word in words):
            return True
        at, before = at + len(data), data[-_LONGEST_WORD:]
    return False
