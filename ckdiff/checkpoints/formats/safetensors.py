"""The header of a safetensors file.

The format: 8 bytes of little-endian header length, a JSON object, then the data. What the
``safetensors`` library accepts and has one meaning is accepted: blanks around the object, null for
``__metadata__``, fields of an entry that nobody knows. Whatever the library rejects is rejected; so
are things it lets pass that would make two readers see two different files (duplicate keys), and
sizes that our own numbers cannot hold.

A header is untrusted input. Nothing of a declared length is allocated before it is known to be in
the file, the JSON is walked one tensor at a time instead of being turned into a tree of objects,
and every tensor passes through :func:`~ckdiff.checkpoints.formats.columns.validate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ckdiff.checkpoints.formats.columns import validate
from ckdiff.checkpoints.formats.headertext import MAX_DIMS, parsed
from ckdiff.checkpoints.formats.lookalikes import guess
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import HeaderError

__all__ = ["HEADER_LIMIT", "MAX_DIMS", "Header", "header_from", "parse_header", "read_header"]

#: bytes of the longest header that is accepted, as in the ``safetensors`` library
HEADER_LIMIT = 100_000_000
_BLANKS = b" \t\n\r"


@dataclass(slots=True)
class Header:
    """What a header says, in columns; a tensor is known by its position."""

    names: list[str]  #: unique, in the order of the header
    dtypes: list[str]  #: safetensors dtype names
    shapes: list[tuple[int, ...]]
    begins: IntArray  #: first byte of each tensor, counted from the start of the file
    nbytes: IntArray  #: bytes of each tensor
    metadata: dict[str, str]  #: the ``__metadata__`` of the file
    data_start: int  #: first byte of the data area, counted from the start of the file


def read_header(fd: int, size: int, file: str) -> Header:
    """Read and validate the header of the open file ``fd`` of ``size`` bytes.

    ``file`` is how messages name it. Raises HeaderError for anything the format does not allow,
    and OSError when reading fails. The file position is neither used nor moved.
    """
    return header_from(lambda offset, nbytes: _pread(fd, nbytes, offset), size, file)


def header_from(read: Callable[[int, int], bytes], size: int, file: str) -> Header:
    """``read_header`` of a file of ``size`` bytes that is wherever ``read`` finds it.

    ``read(offset, nbytes)`` gives the bytes at an offset, fewer only at the end of the file. It is
    called twice, and asked for nothing beyond the header but what the first 16 bytes hold.
    """
    head = read(0, 16)
    if size < 8 or len(head) < 8:
        raise _foreign(
            file, head, f"{min(size, len(head))} bytes, too short for a safetensors file"
        )
    length = int.from_bytes(head[:8], "little")
    if length > HEADER_LIMIT:
        raise _foreign(
            file, head, f"declares a header of {length:,} bytes, more than {HEADER_LIMIT:,}"
        )
    if length > size - 8:
        raise _foreign(
            file, head, f"declares a header of {length:,} bytes but has {size - 8:,} after it"
        )
    if length < 2:
        raise _foreign(file, head, f"declares a header of {length} bytes, too short to be one")
    first = head[8 : 8 + length].lstrip(_BLANKS)
    if first and not first.startswith(b"{"):
        what = "begins with a byte order mark" if head[8:11] == b"\xef\xbb\xbf" else "is not JSON"
        raise _foreign(file, head, f"the header {what}: it must begin with '{{'")
    raw = read(8, length)
    if len(raw) < length:
        raise HeaderError(f"{file}: the file ended inside its header: it was cut while it was read")
    return parse_header(raw, size - 8 - length, file)


def parse_header(raw: bytes, data_bytes: int, file: str) -> Header:
    """Parse and validate the JSON ``raw`` of a header that ``data_bytes`` bytes of data follow.

    Raises HeaderError.
    """
    columns = parsed(raw, file)
    nbytes = validate(columns, data_bytes, file)
    data_start = 8 + len(raw)
    columns.begins += data_start
    return Header(
        columns.names,
        columns.dtypes,
        columns.shapes,
        columns.begins,
        nbytes,
        columns.metadata,
        data_start,
    )


def _foreign(file: str, head: bytes, reason: str) -> HeaderError:
    """The error for a file whose first bytes cannot be a safetensors header."""
    found = guess(head)
    if found is None:
        hint = "give a safetensors file; if it was downloaded, fetch it again"
        return HeaderError(f"{file}: {reason}", hint=hint)
    what, advice = found
    return HeaderError(f"{file}: {reason}; it looks like {what}", hint=advice)


def _pread(fd: int, nbytes: int, offset: int) -> bytes:
    """Up to ``nbytes`` bytes from ``offset``; less only at the end of the file."""
    data = os.pread(fd, nbytes, offset)
    if len(data) == nbytes or not data:
        return data
    parts = [data]
    have = len(data)
    while have < nbytes and (data := os.pread(fd, nbytes - have, offset + have)):
        parts.append(data)
        have += len(data)
    return b"".join(parts)
