"""The header of a safetensors file, read strictly.

The format: 8 bytes of little-endian header length, a JSON object, then the data. Whatever the
``safetensors`` library rejects is rejected here; so are things it lets pass that would make two
readers see two different files (duplicate keys, unknown fields, text before the ``{``).

A header is untrusted input. Nothing of a declared length is allocated before it is known to be in
the file, the JSON is walked one tensor at a time instead of being turned into a tree of objects,
and every tensor passes through :func:`validate`.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np

from ckdiff.checkpoints.formats.lookalikes import guess
from ckdiff.checkpoints.formats.strictjson import (
    STRING,
    WS,
    any_value,
    key_at,
    shown,
    skip_blank,
    string_map,
    text_of,
)
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.dtypes import DTYPES
from ckdiff.errors import HeaderError

#: bytes of the longest header that is accepted, as in the ``safetensors`` library
HEADER_LIMIT = 100_000_000
#: dimensions of the deepest tensor that is accepted, as in numpy
MAX_DIMS = 64

_MAX = 2**63 - 1
_SHAPE_CACHE = 1 << 16

_NUMBER = rb"(?:0|[1-9][0-9]{0,18})"
_COMMA = WS + rb"," + WS
_COLON = WS + rb":" + WS
_DTYPE = rb'"dtype"%s"([A-Z0-9_]{1,16})"' % _COLON
_SHAPE = rb'"shape"%s\[%s((?:%s(?:%s%s){0,%d})?)%s\]' % (
    _COLON, WS, _NUMBER, _COMMA, _NUMBER, MAX_DIMS - 1, WS,
)  # fmt: skip
_OFFSETS = rb'"data_offsets"%s\[%s(%s)%s(%s)%s\]' % (_COLON, WS, _NUMBER, _COMMA, _NUMBER, WS)
_OPEN = WS + STRING + _COLON + rb"\{" + WS
_CLOSE = WS + rb"\}" + WS + rb"([,}])"
# A whole member in one match: name, dtype, shape, begin, end and the mark that follows. Every known
# writer keeps this order of fields; the other five orders get patterns of their own below.
_TENSOR = re.compile(_OPEN + _DTYPE + _COMMA + _SHAPE + _COMMA + _OFFSETS + _CLOSE, re.DOTALL)
_PADDING = re.compile(rb" *+")
_DTYPE_TOKENS = {name.encode(): name for name in DTYPES}
_FIELDS = {"dtype", "shape", "data_offsets"}


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


@dataclass(slots=True)
class _Columns:
    """A parsed header before validation: offsets count from the start of the data area."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    elements: IntArray
    begins: IntArray
    ends: IntArray
    metadata: dict[str, str]


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
    if head[8:9] != b"{":
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
    columns = _parse(raw, file)
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


def validate(columns: _Columns, data_bytes: int, file: str) -> IntArray:
    """Check the tensors against each other and against the data area; their sizes in bytes.

    The ranges must cover the ``data_bytes`` bytes exactly, without holes or overlaps, and each
    must have the size that its dtype and shape ask for. Raises HeaderError.
    """
    names, begins, ends = columns.names, columns.begins, columns.ends
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise _wrong(file, name, "is there twice (duplicate key)")
            seen.add(name)
    if (bad := _first(begins > ends)) is not None:
        raise _wrong(file, names[bad], f"begins at {begins[bad]} but ends at {ends[bad]}")
    if (bad := _first(ends > data_bytes)) is not None:
        raise _wrong(
            file,
            names[bad],
            f"ends at byte {ends[bad]:,} of the data but there are only {data_bytes:,}",
        )

    bits = _bits(columns.dtypes)
    if (bad := _first(columns.elements > _MAX // bits)) is not None:
        raise _wrong(file, names[bad], f"{_shape(columns.shapes[bad])} is too large (overflow)")
    wanted = columns.elements * bits
    if (bad := _first(wanted % 8 != 0)) is not None:
        raise _wrong(
            file,
            names[bad],
            f"{columns.elements[bad]} elements of {columns.dtypes[bad]} do not fill whole bytes",
        )
    nbytes = ends - begins
    if (bad := _first(nbytes != wanted // 8)) is not None:
        raise _wrong(
            file,
            names[bad],
            f"has {nbytes[bad]:,} bytes but {columns.dtypes[bad]} {_shape(columns.shapes[bad])} "
            f"needs {wanted[bad] // 8:,}",
        )

    # Empty tensors sit between their neighbours: at equal begins the one with the smaller end first
    order = np.lexsort((ends, begins))
    expected = np.zeros(len(names) + 1, np.int64)
    expected[1:] = ends[order]
    if (bad := _first(begins[order] != expected[:-1])) is not None:
        name, at = names[order[bad]], int(begins[order[bad]])
        if at > expected[bad]:
            raise _wrong(
                file,
                name,
                f"begins at byte {at:,}: a hole, the data before ends at {expected[bad]:,}",
            )
        raise _wrong(file, name, f"overlaps {shown(names[order[bad - 1]])} at byte {at:,}")
    if expected[-1] != data_bytes:
        raise HeaderError(
            f"{file}: {data_bytes - int(expected[-1]):,} bytes after the last tensor belong to none"
        )
    return nbytes


def _parse(raw: bytes, file: str) -> _Columns:
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    elements, begins, ends = array("q"), array("q"), array("q")
    metadata: dict[str, str] | None = None
    # Models repeat a few shapes: parse each once, and let the tensors share one tuple.
    known: dict[bytes, tuple[tuple[int, ...], int]] = {}
    match_tensor = _TENSOR.match

    if raw[:1] != b"{":
        raise HeaderError(f"{file}: the header must begin with '{{'")
    pos = skip_blank(raw, 1)
    mark = b"}" if _byte(raw, pos) == b"}" else b","
    if mark == b"}":
        pos += 1
    while mark == b",":
        match = match_tensor(raw, pos)
        if match is not None:
            token, dtype_token, shape_token, begin, end, mark = match.groups()
            after = match.end()
        elif (found := _in_another_order(raw, pos)) is not None:
            (token, dtype_token, shape_token, begin, end, mark), after = found
        else:
            metadata, pos, mark = _metadata(raw, pos, file, metadata)
            continue
        try:
            names.append(token.decode() if b"\\" not in token else text_of(token))
            dtypes.append(_DTYPE_TOKENS[dtype_token])
            shape = known.get(shape_token)
            if shape is None:
                if len(known) >= _SHAPE_CACHE:
                    known.clear()
                shape = known[shape_token] = _dims(shape_token)
            shapes.append(shape[0])
            elements.append(shape[1])
            begins.append(int(begin))
            ends.append(int(end))
        except (KeyError, ValueError, OverflowError) as error:
            raise _explain(raw, pos, file, error) from None
        pos = after
    padding = _PADDING.match(raw, pos)
    if padding is None or padding.end() != len(raw):
        raise HeaderError(f"{file}: the header goes on after its closing '}}' at byte {8 + pos}")
    if "__metadata__" in names:
        raise HeaderError(f"{file}: __metadata__ is not an object of strings")
    return _Columns(
        names,
        dtypes,
        shapes,
        np.array(elements, np.int64),
        np.array(begins, np.int64),
        np.array(ends, np.int64),
        metadata or {},
    )


def _in_another_order(raw: bytes, pos: int) -> tuple[list[bytes], int] | None:
    """The tensor at ``pos`` if its fields are in an unusual order, and the position after it.

    The parts are in the usual order; None where it is not a tensor at all.
    """
    for pattern, groups in _other_orders():
        match = pattern.match(raw, pos)
        if match is not None:
            return [match[group] for group in groups], match.end()
    return None


@cache
def _other_orders() -> list[tuple[re.Pattern[bytes], list[int]]]:
    """Patterns for the unusual orders of fields, each with its groups in the usual order."""
    fields = ((_DTYPE, (0,)), (_SHAPE, (1,)), (_OFFSETS, (2, 3)))
    result = []
    for order in list(permutations(fields))[1:]:
        pattern = re.compile(
            _OPEN + _COMMA.join(field for field, _ in order) + _CLOSE,
            re.DOTALL,
        )
        parts = [part for _, numbers in order for part in numbers]
        result.append((pattern, [1, *(2 + parts.index(part) for part in range(4)), 6]))
    return result


def _dims(token: bytes) -> tuple[tuple[int, ...], int]:
    """The shape ``1, 2`` and its number of elements; ValueError where that overflows an int64.

    A zero dimension does not excuse the others: readers that multiply from the left and readers
    that multiply from the right must agree on what overflows.
    """
    # int() forgives blanks around a number; the pattern has refused everything else but digits.
    shape = tuple([int(number) for number in token.split(b",")]) if token else ()
    elements, product = 1, 1
    for dim in shape:
        elements *= dim
        product *= max(dim, 1)
        if product > _MAX:
            raise ValueError(f"{_shape(shape)} is too large (overflow)")
    return shape, elements


def _metadata(
    raw: bytes, pos: int, file: str, before: dict[str, str] | None
) -> tuple[dict[str, str], int, bytes]:
    """Read a member that is not a tensor: ``__metadata__``, or an error."""
    try:
        name, start = key_at(raw, pos)
    except ValueError as error:
        raise HeaderError(f"{file}: {error} of the header") from None
    if name != "__metadata__":
        raise _explain(raw, pos, file, None)
    if before is not None:
        raise HeaderError(f"{file}: __metadata__ is there twice (duplicate key)")
    try:
        value, pos = string_map(raw, start)
    except ValueError as error:
        raise HeaderError(f"{file}: __metadata__: {error}") from None
    pos = skip_blank(raw, pos)
    mark = _byte(raw, pos)
    if mark not in b",}":
        raise HeaderError(f"{file}: ',' or '}}' expected after __metadata__")
    return value, pos + 1, mark


def _explain(raw: bytes, pos: int, file: str, error: Exception | None) -> HeaderError:
    """The error for the member at ``pos``, which the fast path did not take."""
    try:
        name, start = key_at(raw, pos)
    except ValueError as problem:
        return HeaderError(f"{file}: {problem} in a tensor's name")
    try:
        entry, after = any_value(raw, start, whole_numbers=True)
        reason = _entry_fault(entry)
        if reason is None and _byte(raw, skip_blank(raw, after)) not in b",}":
            reason = "is not followed by ',' or '}'"
    except ValueError as problem:
        reason = str(problem)
    return _wrong(file, name, reason or str(error or "is written in a way that is not accepted"))


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with the decoded entry of one tensor."""
    if not isinstance(entry, dict):
        return "its entry is not an object"
    if missing := sorted(_FIELDS - entry.keys()):
        return f"has no {' and no '.join(missing)}"
    if unknown := sorted(entry.keys() - _FIELDS):
        return f"has an unknown field {shown(unknown[0])}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has an unknown dtype {shown(str(dtype))}"
    if not _whole_list(shape):
        return "its shape is not a list of whole numbers"
    if len(shape) > MAX_DIMS:
        return f"has {len(shape):,} dimensions, more than {MAX_DIMS}"
    if not _whole_list(offsets) or len(offsets) != 2:
        return "its data_offsets are not two whole numbers"
    return None


def _byte(raw: bytes, pos: int) -> bytes:
    """The byte at ``pos``, or a NUL past the end."""
    return raw[pos : pos + 1] or b"\0"


def _whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _bits(dtypes: list[str]) -> IntArray:
    width = {name: dtype.bits for name, dtype in DTYPES.items()}
    return np.fromiter((width[name] for name in dtypes), np.int64, len(dtypes))


def _first(bad: Any) -> int | None:
    """The position of the first True of a boolean column."""
    return int(np.argmax(bad)) if bad.any() else None


def _shape(shape: tuple[int, ...]) -> str:
    return shown(str(list(shape)), 80)[1:-1]


def _wrong(file: str, name: str, reason: str) -> HeaderError:
    return HeaderError(f"{file}: tensor {shown(name)}: {reason}")


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
