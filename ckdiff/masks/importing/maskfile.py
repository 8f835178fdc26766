"""A mask file as a list of tensors with their bits, whatever the format. Nothing is trusted.

A file says how many items a tensor has, and it says so where lies are cheap: in a header. So
whatever reads a format hands over raw bytes, and :func:`items_of` alone turns them into items and
proves that there are exactly as many as were declared.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.formats.strictjson import STRING, WS, any_value, key_at, skip_blank, text_of
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, printable
from ckdiff.masks.exporting.indices import INDICES
from ckdiff.masks.exporting.masks import CHANGED, FORMAT, FROZEN

#: what the items of a tensor are: bytes of 0 or 1, eight elements in a byte, positions of ones
Kind = Literal["flags", "packed", "indices"]
Shape = tuple[int, ...]

PIECE = 1 << 20  #: items that are read at a time
STEP = 1 << 20  #: bytes that are read at a time
#: bytes of metadata that are read: the table of three times as many tensors as any model has
METADATA_LIMIT = 1 << 26
#: tensors of a file: each costs memory before a bit is read, and models have at most 90,000
MOST_TENSORS = 1 << 18
_MOST = 1 << 60  # elements of a tensor
_LONGEST_RULE = 200  # characters
_UNIT = 8  # items: every piece but the last has a multiple of it, which is whole bytes of mask

_PAIR = re.compile(WS + STRING + WS + rb":" + WS + STRING + WS + rb"([,}])", re.DOTALL)
_TENSOR = re.compile(
    WS + STRING + WS + rb":" + WS + rb"\[" + WS + rb'"([A-Za-z0-9_]{1,16})"' + WS + rb"," + WS
    + rb"\[([0-9, \t\n\r]{0,2000})\]" + WS + rb"\]" + WS + rb"([,}])",
    re.DOTALL,
)  # fmt: skip
_KEYS = ("format", "encoding", "polarity", "rule", "tensors")


@dataclass(slots=True)
class Item:
    """One tensor of a mask file."""

    name: str  #: of the model's tensor
    kind: Kind
    shape: Shape  #: of what is stored
    dtype: np.dtype[Any]  #: of what is stored
    read: Callable[[], Iterator[bytes]]  #: the bytes in order, in pieces of any size

    @property
    def length(self) -> int:
        """How many items there are, as the file declares."""
        return math.prod(self.shape)


@dataclass(slots=True)
class MaskFile:
    """What is known of a mask file before its bits are read."""

    format: str  #: safetensors, npz or torch
    items: list[Item]
    files: list[OpenFile]  #: what is read; open until the caller closes them
    notes: Notes
    tensors: dict[str, tuple[str, Shape]]  #: dtype and shape of the model's tensors, if it says so
    checkpoint: Checkpoint | None = None  #: of safetensors
    #: proves what the format has to prove before any item is read; raises CheckpointError
    prove: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise SourceChanged if a file is not what it was when it was opened."""
        for file in self.files:
            file.check()


@dataclass(slots=True)
class Notes:
    """What the metadata of a file by ``ckdiff export`` says; nothing for other files."""

    encoding: str | None = None
    polarity: str | None = None
    rule: str | None = None
    tensors: str = field(default="{}", repr=False)
    ours: bool = False  #: whether an export wrote it
    others: int = 0  #: tensors that it describes and the file does not have; see described

    @classmethod
    def of(cls, metadata: Any) -> Notes:
        """Read metadata; what is not ours is ignored."""
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            return cls()
        texts = {k: v for k, v in metadata.items() if isinstance(v, str)}
        return cls(
            texts.get("encoding"),
            texts.get("polarity"),
            texts.get("rule"),
            texts.get("tensors", "{}"),
            ours=True,
        )

    @classmethod
    def parse(cls, raw: bytes) -> Notes:
        """Read metadata that is JSON; ValueError.

        An object of texts is walked one pair at a time and only what we know is kept: as objects,
        hostile JSON takes thirty times the memory. Other JSON is not ours and is ignored.
        """
        found: dict[str, str] = {}
        pos = skip_blank(raw, 0)
        if raw[pos : pos + 1] == b"{":
            pos += 1
            while match := _PAIR.match(raw, pos):
                key, value, mark = match.groups()
                pos = match.end()
                if key.decode("latin-1") in _KEYS:
                    if key.decode() in found:
                        raise ValueError(f"{key.decode()} is there twice")
                    found[key.decode()] = text_of(value)
                if mark == b"}" and skip_blank(raw, pos) == len(raw):
                    return cls.of(found)
        if found.get("format") == FORMAT:
            key_at(raw, pos)
            raise ValueError("it is not an object of texts")
        _, end = any_value(raw, skip_blank(raw, 0), whole_numbers=False)
        if skip_blank(raw, end) != len(raw):
            raise ValueError("it goes on after its end")
        return cls()

    def described(self, where: str, wanted: set[str]) -> dict[str, tuple[str, Shape]]:
        """The model's tensors, those called ``wanted``; raises CheckpointError."""
        raw = self.tensors.encode("utf-8", "surrogatepass")
        if len(raw) > METADATA_LIMIT:
            raise _nonsense(where, "tensors")
        found: dict[str, tuple[str, Shape]] = {}
        try:
            for name, entry in _described(raw):
                if name not in wanted:
                    self.others += 1  # what the file does not have costs no memory
                    continue
                if name in found:
                    raise ValueError("a tensor is there twice")
                found[name] = entry
        except ValueError:
            raise _nonsense(where, "tensors") from None
        return found

    def checked(self, where: str) -> Notes:
        """Itself; raises CheckpointError for a polarity that is none, or a rule that is a book."""
        if self.polarity not in (None, CHANGED, FROZEN):
            raise _nonsense(where, "polarity")
        if self.rule is not None and len(self.rule) > _LONGEST_RULE:
            raise _nonsense(where, "rule")
        return self


def _described(raw: bytes) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """Name, dtype and shape of each tensor of ``{NAME: [DTYPE, [DIMENSIONS]]}``; ValueError."""
    known: dict[bytes, Shape] = {}  # models repeat a few shapes
    pos = skip_blank(raw, 0)
    mark = b"," if raw[pos : pos + 1] == b"{" else b""
    pos = skip_blank(raw, pos + 1)
    if raw[pos : pos + 1] == b"}":
        mark, pos = b"}", pos + 1
    while mark == b",":
        match = _TENSOR.match(raw, pos)
        if match is None:
            raise ValueError("no tensor")
        token, dtype, dims, mark = match.groups()
        pos = match.end()
        shape = known.get(dims)
        if shape is None:
            shape = _dims(dims)
            if len(known) < MOST_TENSORS // 16:
                known[dims] = shape
        if dtype.decode() not in DTYPES:
            raise ValueError("no such type")
        yield text_of(token), (dtype.decode(), shape)
    if mark != b"}" or skip_blank(raw, pos) != len(raw):
        raise ValueError("not an object")


def _dims(token: bytes) -> Shape:
    parts = [part.strip() for part in token.split(b",")] if token.strip() else []
    if not all(part.isdigit() and len(part) < 20 for part in parts):
        raise ValueError("no dimensions")
    shape = tuple(int(part) for part in parts)
    if not is_shape(shape):
        raise ValueError("no shape")
    return shape


def is_shape(shape: tuple[Any, ...]) -> bool:
    """Whether these are dimensions of a tensor that could exist."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    return whole and len(shape) <= 64 and math.prod(max(n, 1) for n in shape) <= _MOST


def make_item(
    where: str,
    name: str,
    dtype: np.dtype[Any] | None,
    shape: Shape,
    read: Callable[[], Iterator[bytes]],
    encoding: str | None,
) -> Item:
    """What a stored tensor is, by its name, its dtype and what the file says; CheckpointError."""
    if dtype is not None and dtype.kind in "iu" and dtype.itemsize >= 2:
        if name.endswith(INDICES) and len(shape) == 1:
            return Item(name.removesuffix(INDICES), "indices", shape, dtype, read)
    elif dtype is not None and dtype.kind in "biu":
        byte = np.dtype(np.uint8)  # that they are 0 and 1 is seen when they are read
        if encoding == "packed":
            return Item(name, "packed", shape, byte, read)
        return Item(name, "flags", shape, byte, read)
    what = "no such type" if dtype is None else str(dtype)
    raise CheckpointError(
        f"{where}: {shown(name)} is not a mask: {what}",
        hint=f"masks are bool or uint8 of 0 and 1, or whole numbers called NAME{INDICES}",
    )


def items_of(item: Item) -> Iterator[npt.NDArray[Any]]:
    """The items of a tensor in pieces, every piece but the last with a multiple of 8.

    What is missing would become "unchanged", and what is too much would go to the next tensor:
    raises CheckpointError where there are fewer or more than the file declares.
    """
    size, unit = item.dtype.itemsize, item.dtype.itemsize * _UNIT
    left, rest = item.length * size, b""
    for data in item.read():
        left -= len(data)
        if left < 0:
            raise bad(item, f"goes on after its {item.length:,} items")
        if rest:
            data = rest + bytes(data)
        whole = len(data) // unit * unit
        if whole:
            yield np.frombuffer(data, item.dtype, whole // size)
        rest = bytes(data[whole:])
    if left:
        have = item.length - -(-left // size)
        raise bad(item, f"ends early: {have:,} items of {item.length:,} are there")
    if rest:
        yield np.frombuffer(rest, item.dtype)


def bad(item: Item, what: str) -> CheckpointError:
    """The error for what is wrong with one mask."""
    return CheckpointError(
        f"the mask of {shown(item.name)} {what}", hint="is the file whole? make it again"
    )


def shown(name: str) -> str:
    """A name of the file for a message: it may have a million characters."""
    return printable(name if len(name) <= 200 else name[:200] + "...")


def check_number(where: str, tensors: int) -> None:
    """Raise CheckpointError for more tensors than a mask file may have."""
    if tensors > MOST_TENSORS:
        raise CheckpointError(
            f"{where}: {tensors:,} tensors are more than the {MOST_TENSORS:,} that are read",
            hint="split it into several files",
        )


def read_exactly(file: OpenFile, offset: int, size: int) -> Iterator[bytes]:
    """``size`` bytes from ``offset``, in pieces; CheckpointError where the file ends before."""
    while size:
        data = pread(file, offset, min(size, STEP))
        if len(data) < min(size, STEP):
            file.check()  # says that it was cut
            raise CheckpointError(f"{printable(file.path)}: it ended while it was read")
        yield data
        offset += len(data)
        size -= len(data)


def pread(file: OpenFile, offset: int, size: int) -> bytes:
    """At most ``size`` bytes, fewer only at the end of the file; raises CheckpointError."""
    data = b""
    try:
        while more := os.pread(file.fd, size - len(data), offset + len(data)):
            data = data + more if data else more
    except OSError as error:
        raise CheckpointError(f"{printable(file.path)}: cannot be read: {error.strerror}") from None
    return data


def digest_of(file: OpenFile) -> str:
    """XXH3-128 of a file's bytes, as 32 hex digits; raises CheckpointError."""
    digest = xxhash.xxh3_128()
    for data in read_exactly(file, 0, file.size):
        digest.update(data)
    return digest.hexdigest()


def _nonsense(where: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: its metadata makes no sense: {key}", hint="was it written by ckdiff export?"
    )
