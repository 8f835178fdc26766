"""The JSON of a safetensors header, walked one tensor at a time into columns.

What every known writer writes is matched by one expression. A member that is written otherwise,
with its fields in another order, with more fields or with escapes in them, is read as the JSON
value that it is: what the ``safetensors`` library makes of it is made of it here, and what it
refuses is refused. Refused too is what two readers could read in two ways, a key that is there
twice, and what has no use: an entry of more than a MiB.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ckdiff.checkpoints.formats.columns import LARGEST, Columns, shape_text, wrong
from ckdiff.checkpoints.formats.strictjson import (
    STRING,
    WS,
    any_value,
    key_at,
    shown,
    skip_blank,
    sound,
    string_map,
    text_of,
)
from ckdiff.dtypes import DTYPES
from ckdiff.errors import HeaderError

#: dimensions of the deepest tensor that is accepted, as in numpy
MAX_DIMS = 64

_SHAPE_CACHE = 1 << 16
_BLOCK = 1024  # tensors that are read at a time
_MARK = 6  # the group of the mark that follows a member
_LEVELS = 125  # of lists and objects in a field of an entry, as in the library

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
# writer keeps this order of fields.
_TENSOR = re.compile(_OPEN + _DTYPE + _COMMA + _SHAPE + _COMMA + _OFFSETS + _CLOSE, re.DOTALL)
_DTYPE_TOKENS = {name.encode(): name for name in DTYPES}
_FIELDS = ("dtype", "shape", "data_offsets")


class _Entry(NamedTuple):
    """One tensor, and where in the text the next member is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    begin: int
    end: int
    mark: bytes  #: ``,`` or ``}``
    after: int


class _Shapes(dict[bytes, tuple[tuple[int, ...], int]]):
    """Text of a shape -> the shape and its elements. Models repeat a few: each is parsed once, and
    the tensors share one tuple.
    """

    def __missing__(self, token: bytes) -> tuple[tuple[int, ...], int]:
        """Raises ValueError where the elements overflow an int64."""
        if len(self) >= _SHAPE_CACHE:
            self.clear()
        found = self[token] = _dims(token)
        return found


class _Gathered:
    """The columns as far as they are read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.names: list[str] = []
        self.dtypes: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.elements, self.begins, self.ends = array("q"), array("q"), array("q")
        self._known = _Shapes()

    def add(self, members: Sequence[re.Match[bytes]]) -> None:
        """Add tensors that were matched, in order. Raises HeaderError for the first wrong one."""
        if not members:
            return
        try:
            self._extend(members)
        except (KeyError, ValueError, OverflowError) as error:
            if len(members) == 1:
                raise _explain(members[0].string, members[0].start(), self.file, error) from None
            for member in members:  # what was added of them does not matter: one of them raises
                self.add([member])

    def _extend(self, members: Sequence[re.Match[bytes]]) -> None:
        # a column at a time: of 100,000 tensors, a tensor at a time takes twice as long
        tokens, dtypes, shapes, begins, ends, _ = zip(*[m.groups() for m in members], strict=True)
        self.names += [t.decode() if b"\\" not in t else text_of(t) for t in tokens]
        self.dtypes += map(_DTYPE_TOKENS.__getitem__, dtypes)
        known = list(map(self._known.__getitem__, shapes))
        self.shapes += [shape for shape, _ in known]
        self.elements.extend([elements for _, elements in known])
        self.begins.extend(map(int, begins))
        self.ends.extend(map(int, ends))

    def add_odd(self, entry: _Entry) -> None:
        """Add a tensor that was read in another way."""
        self.names.append(entry.name)
        self.dtypes.append(entry.dtype)
        self.shapes.append(entry.shape)
        self.elements.append(entry.elements)
        self.begins.append(entry.begin)
        self.ends.append(entry.end)


def parsed(raw: bytes, file: str) -> Columns:
    """The columns of the header ``raw``, not yet checked against each other. Raises HeaderError."""
    found = _Gathered(file)
    metadata: list[dict[str, str]] = []
    pos, mark = _opened(raw, file)
    while mark == b",":
        members = _usual(raw, pos)
        found.add(members)
        if members:
            pos, mark = members[-1].end(), members[-1][_MARK]
        if mark != b"," or len(members) == _BLOCK:
            continue
        odd = _odd_member(raw, pos, file, metadata)
        if isinstance(odd, _Entry):
            found.add_odd(odd)
            pos, mark = odd.after, odd.mark
        else:
            pos, mark = odd
    if skip_blank(raw, pos) != len(raw):
        raise HeaderError(f"{file}: the header goes on after its closing '}}' at byte {8 + pos}")
    if "__metadata__" in found.names:
        raise HeaderError(f"{file}: __metadata__ is not an object of strings")
    said = metadata[0] if metadata else {}
    columns = found.elements, found.begins, found.ends
    sizes, starts, stops = (np.array(column, np.int64) for column in columns)
    return Columns(found.names, found.dtypes, found.shapes, sizes, starts, stops, said)


def _usual(raw: bytes, pos: int) -> list[re.Match[bytes]]:
    """The members from ``pos`` on that are written as usual, up to a block of them. The last one
    of the header is the last one here, whatever follows it.
    """
    match = _TENSOR.scanner(raw, pos).match  # type: ignore[attr-defined]
    members: list[re.Match[bytes]] = list(islice(iter(match, None), _BLOCK))
    last = next((i for i, member in enumerate(members) if member[_MARK] == b"}"), len(members))
    return members[: last + 1]


def _opened(raw: bytes, file: str) -> tuple[int, bytes]:
    """The position behind the ``{``, and ``,`` where a member follows."""
    pos = skip_blank(raw, 0)
    if _byte(raw, pos) != b"{":
        raise HeaderError(f"{file}: the header must begin with '{{'")
    pos = skip_blank(raw, pos + 1)
    return (pos + 1, b"}") if _byte(raw, pos) == b"}" else (pos, b",")


def _dims(token: bytes) -> tuple[tuple[int, ...], int]:
    """The shape ``1, 2`` and its number of elements; ValueError where that overflows an int64."""
    # int() forgives blanks around a number; the pattern has refused everything else but digits.
    shape = tuple([int(number) for number in token.split(b",")]) if token else ()
    return shape, _elements(shape)


def _elements(shape: tuple[int, ...]) -> int:
    """How many elements a shape has; ValueError where that overflows an int64.

    A zero dimension does not excuse the others: readers that multiply from the left and readers
    that multiply from the right must agree on what overflows.
    """
    elements, product = 1, 1
    for dim in shape:
        elements *= dim
        product *= max(dim, 1)
        if product > LARGEST:
            raise ValueError(f"{shape_text(shape)} is too large (overflow)")
    return elements


def _odd_member(
    raw: bytes, pos: int, file: str, metadata: list[dict[str, str]]
) -> _Entry | tuple[int, bytes]:
    """The tensor at ``pos`` that is written in an unusual way; or ``__metadata__``, which is added
    to ``metadata``, and the position after it with the mark that is there.
    """
    try:
        name, start = key_at(raw, pos)
    except ValueError as error:
        raise HeaderError(f"{file}: {error} of the header") from None
    if name == "__metadata__":
        return _metadata(raw, start, file, metadata)
    try:
        entry, after = any_value(raw, start, whole_numbers=True)
        fields = _fields(entry)
        after = skip_blank(raw, after)
        if isinstance(fields, str):
            raise wrong(file, name, fields)
        if (mark := _byte(raw, after)) not in b",}":
            raise wrong(file, name, "is not followed by ',' or '}'")
        dtype, dims, (begin, end) = fields
        shape = tuple(dims)
        return _Entry(name, dtype, shape, _elements(shape), begin, end, mark, after + 1)
    except ValueError as problem:
        raise wrong(file, name, str(problem)) from None


def _metadata(
    raw: bytes, start: int, file: str, metadata: list[dict[str, str]]
) -> tuple[int, bytes]:
    """Read ``__metadata__``, of which the value is at ``start``: strings by strings, or null."""
    if metadata:
        raise HeaderError(f"{file}: __metadata__ is there twice (duplicate key)")
    try:
        if raw[start : start + 4] == b"null":
            value, pos = dict[str, str](), start + 4
        else:
            value, pos = string_map(raw, start)
    except ValueError as error:
        raise HeaderError(f"{file}: __metadata__: {error}") from None
    metadata.append(value)
    pos = skip_blank(raw, pos)
    mark = _byte(raw, pos)
    if mark not in b",}":
        raise HeaderError(f"{file}: ',' or '}}' expected after __metadata__")
    return pos + 1, mark


def _explain(raw: bytes, pos: int, file: str, error: Exception) -> HeaderError:
    """The error for the tensor at ``pos``, which was matched and is wrong."""
    try:
        name, start = key_at(raw, pos)
    except ValueError as problem:
        return HeaderError(f"{file}: {problem} in a tensor's name")
    try:
        entry, _ = any_value(raw, start, whole_numbers=True)
        fields = _fields(entry)
    except ValueError as problem:
        return wrong(file, name, str(problem))
    return wrong(file, name, fields if isinstance(fields, str) else str(error))


def _fields(entry: Any) -> tuple[str, list[int], list[int]] | str:
    """The dtype, shape and offsets of the decoded entry of one tensor; or what is wrong with it.

    Raises ValueError for a field that is not used and not JSON as the library reads it.
    """
    if isinstance(entry, list) and len(entry) == len(_FIELDS):
        entry = dict(zip(_FIELDS, entry, strict=True))  # the library takes the values alone
    if not isinstance(entry, dict):
        return "its entry is not an object"
    if missing := sorted(set(_FIELDS) - entry.keys()):
        return f"has no {' and no '.join(missing)}"
    dtype, shape, offsets = (entry.pop(field) for field in _FIELDS)
    sound(list(entry.items()), _LEVELS + 2)  # of which our own list and its pairs are two
    if isinstance(dtype, dict) and list(dtype.values()) == [None]:
        (dtype,) = dtype  # so does it take a name with nothing in it
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has an unknown dtype {shown(str(dtype))}"
    if not _whole_list(shape):
        return "its shape is not a list of whole numbers"
    if len(shape) > MAX_DIMS:
        return f"has {len(shape):,} dimensions, more than {MAX_DIMS}"
    if not _whole_list(offsets) or len(offsets) != 2:
        return "its data_offsets are not two whole numbers"
    return dtype, shape, offsets


def _byte(raw: bytes, pos: int) -> bytes:
    """The byte at ``pos``, or a NUL past the end."""
    return raw[pos : pos + 1] or b"\0"


def _whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
