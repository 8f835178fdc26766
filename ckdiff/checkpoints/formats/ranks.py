"""Files that the processes of a sharded run wrote, each its own: ``model_world_size_N_rank_R.pt``.

Each is a file of torch with a state dict. What is sharded says where in the whole its shard lies;
what is not, and what several processes have of one shard, must be the same in all files. That is
found out by reading it, before anything else is read: which file counts would otherwise be by
chance. Opening costs headers only, so it is done once the checkpoint is fetched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ckdiff.checkpoints.formats.covering import Box, Joining, Shape
from ckdiff.checkpoints.formats.pickledvalues import Word, shown
from ckdiff.checkpoints.formats.shards import Part, local_of
from ckdiff.checkpoints.formats.torcharchive import (
    TORCH_DTYPES,
    Placed,
    TorchFile,
    open_torch_zip,
    place,
)
from ckdiff.checkpoints.formats.torchzip import (
    check_repeated,
    chosen_weights,
    key_text,
    left_out,
    named_weights,
    nothing_named,
)
from ckdiff.checkpoints.pieces import Contents, Piece, packed_strides
from ckdiff.checkpoints.places.place import Files
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError

_HINT = "copy the files of all ranks of one run and one step"
_STEP = 1 << 20  # bytes that are read at a time
_MOST_LINES = 1 << 22  # of copies that are not alike, read one by one


def read_contents(files: Files) -> Contents:
    """What the files of all ranks hold together. Raises CheckpointError."""
    reading = _Reading(files)
    for i in range(len(files)):
        reading.add(i)
        files.check(i)
    return reading.contents()


class _Found:
    """What is known of one tensor."""

    def __init__(self, dtype: str, shape: Shape, file: int) -> None:
        self.dtype, self.shape, self.file = dtype, shape, file
        self.pieces: dict[Box, Piece] = {}
        self.copies: list[tuple[Piece, Piece]] = []  #: of pieces that other files have as well

    def add(self, piece: Piece) -> None:
        """A piece, or a copy of one."""
        first = self.pieces.setdefault((piece.at, piece.shape), piece)
        if first is not piece:
            self.copies.append((first, piece))


class _Reading:
    """Takes the files one by one."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._found: dict[str, _Found] = {}
        self._left: dict[str, str] = {}  # tensors that cannot be compared, with the reason
        self._paths: dict[str, int] = {}  # of the weights in the files, with the first that has it
        self._notes: list[str] = []

    def add(self, file: int) -> None:
        """The file of a rank."""
        files = self._files
        where = files.where(file)
        opened = open_torch_zip(partial(files.read, file), files.size(file), where)
        path, chosen, notes = chosen_weights(where, opened.content, files.key)
        text = key_text(path, files.key)
        self._paths.setdefault(text, file)
        if len(self._paths) > 1:
            (one, first), (other, _) = self._paths.items()
            raise CheckpointError(
                f"{where}: has its weights under {shown(other or '.')}, and {files.name(first)} "
                f"under {shown(one or '.')}",
                hint="choose with --key",
            )
        all_placed: list[Placed] = []
        for name, value in named_weights(chosen, path, where, text, notes):
            all_placed += self._add_tensor(file, opened, name, value)
        if not file:
            self._notes += notes
        check_repeated([one for one in all_placed if one.strides is not None], where)

    def _add_tensor(self, file: int, opened: TorchFile, name: str, value: Any) -> list[Placed]:
        where = f"{opened.archive.where}: {shown(name)}"
        try:
            local = local_of(value)
        except ValueError as error:
            raise CheckpointError(f"{where} {error}", hint=_HINT) from None
        if isinstance(local, str):
            self._left.setdefault(name, local)
            return []
        dtypes = {tensor.dtype for tensor, _ in local.tensors} or {_declared(value)}
        dtype = TORCH_DTYPES[dtypes.pop()]
        found = self._found.setdefault(name, _Found(dtype, local.shape, file))
        if (dtype, local.shape) != (found.dtype, found.shape) or dtypes:
            raise CheckpointError(
                f"{where} is {dtype} {list(local.shape)} here, and {found.dtype} "
                f"{list(found.shape)} in {self._files.name(found.file)}",
                hint=_HINT,
            )
        placed = []
        for tensor, parts in local.tensors:
            one = place(opened, tensor, name)
            placed.append(one)
            for part in parts:
                if math.prod(part.shape):
                    found.add(_piece(one, part, self._files.first + file))
        return placed

    def contents(self) -> Contents:
        """What all of them hold."""
        files, found = self._files, self._found
        for name in self._left:
            found.pop(name, None)
        if not found:
            raise nothing_named(files.described, next(iter(self._paths)), [*self._left.items()])
        if self._left:
            self._notes.append(left_out(files.described, [*self._left.items()]))
        joining = Joining(files.described, files.first)
        for name, tensor in found.items():
            joining.add(name, tensor.dtype, tensor.shape, list(tensor.pieces.values()))
        contents = joining.finish(self._notes, [*self._left])
        copies = [
            _Copy(name, *pair, DTYPES[tensor.dtype].bits // 8)
            for name, tensor in found.items()
            for pair in tensor.copies
        ]
        if copies:
            contents.unchecked = _Copies(files, copies).check
        return contents


class _Copy(NamedTuple):
    """A piece of a tensor, and the same piece in another file."""

    name: str
    one: Piece
    other: Piece
    width: int  #: bytes of an element


class _Copies:
    """Holds copies against each other."""

    def __init__(self, files: Files, copies: Sequence[_Copy]) -> None:
        self._files, self._copies = files, copies

    def check(self) -> None:
        """Raise CheckpointError where two are not the same, SourceChanged for other files."""
        for copy in self._copies:
            self._check_same(*copy)
        for i in range(len(self._files)):
            self._files.check(i)  # what was read is worth something if it is still the same

    def _check_same(self, name: str, one: Piece, other: Piece, width: int) -> None:
        """Hold the bytes of two copies of a piece against each other."""
        names = [self._files.name(piece.source - self._files.first) for piece in (one, other)]
        where = f"{self._files.described}: tensor {shown(name)}"
        runs = runs_of(one, other)
        if runs is None:
            raise CheckpointError(
                f"{where} lies in {names[0]} and {names[1]} in two orders, which takes too long to "
                "compare",
                hint="save tensor.contiguous() of it in all ranks",
            )
        for here, there, count in runs:
            done, size = 0, count * width
            while done < size:
                begins = one.begin + here * width + done, other.begin + there * width + done
                part = min(size - done, _STEP)
                if self._read(one, begins[0], part) != self._read(other, begins[1], part):
                    raise CheckpointError(
                        f"{where} is not the same in {names[0]} and {names[1]}, which both have "
                        f"{list(one.shape)} of it at {list(one.at)}",
                        hint=_HINT,
                    )
                done += part

    def _read(self, piece: Piece, begin: int, size: int) -> bytes:
        file = piece.source - self._files.first
        data = self._files.read(file, begin, size)
        if len(data) < size:
            raise CheckpointError(
                f"{self._files.where(file)}: ended while it was read", hint="run again"
            )
        return data


def runs_of(one: Piece, other: Piece) -> Iterable[tuple[int, int, int]] | None:
    """Elements of two pieces of one shape that lie one after the other in both: (elements from the
    first one of the one, of the other, how many). None where there would be too many of them.
    """
    elements = math.prod(one.shape)
    reach = sum((n - 1) * step for n, step in zip(one.shape, one.strides, strict=True)) + 1
    if (one.packed and other.packed) or (one.strides == other.strides and reach == elements):
        return [(0, 0, elements)]
    *outer, last = one.shape
    if not one.strides[-1] == other.strides[-1] == 1:
        outer, last = [*outer, last], 1
    return _lines(one, other, outer, last) if elements // last <= _MOST_LINES else None


def _lines(one: Piece, other: Piece, outer: list[int], last: int) -> Iterator[tuple[int, int, int]]:
    for index in itertools.product(*map(range, outer)):
        here, there = (
            sum(i * step for i, step in zip(index, piece.strides, strict=False))
            for piece in (one, other)
        )
        yield here, there, last


def _piece(placed: Placed, part: Part, source: int) -> Piece:
    strides = packed_strides(placed.shape) if placed.strides is None else placed.strides
    width = placed.nbytes // math.prod(placed.shape)
    begin = sum(i * step for i, step in zip(part.inner, strides, strict=True))
    return Piece(source, placed.begin + begin * width, part.at, part.shape, strides)


def _declared(value: Any) -> str:
    """The dtype that a tensor without a local shard says it has."""
    match value.args:
        case (_, Word() as dtype, *_) if dtype.qualname in TORCH_DTYPES:
            return dtype.qualname
    return "float32"
