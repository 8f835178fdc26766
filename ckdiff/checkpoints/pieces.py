"""What the files of a checkpoint hold: where each tensor's elements are, in one place or several.

A tensor that is packed in one place costs no copy. One that lies in several (the shards of some
ranks), or not in the order of its elements (a transposed view), is a list of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.folders import some
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, TensorTable
from ckdiff.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and where its elements are."""

    source: int  #: position of the file that holds it, or of the tensor of another checkpoint
    begin: int  #: byte of the source at which the box's first element is
    at: tuple[int, ...]  #: index, in the tensor, of the box's first element
    shape: tuple[int, ...]  #: of the box
    strides: tuple[int, ...]  #: elements from one to the next along each dimension, in the source

    @property
    def packed(self) -> bool:
        """Whether its elements lie one after the other, in their order."""
        return all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(
                self.shape, self.strides, packed_strides(self.shape), strict=True
            )
        )


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one to the next along each dimension of a packed tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


WARNING = "warning: "  #: what a note begins with that is more than a note
#: the hint where a key leads nowhere because there are none
NO_KEY = "its tensors are under no key: leave out --key"
UNUSED_KEY = f"{WARNING}--key "  #: what a note begins with of a key that there is no use for


def told(note: str) -> str:
    """A note of a checkpoint, as people are told it."""
    return note if note.startswith((WARNING, "note: ", "hint: ")) else f"note: {note}"


def notes_of(sides: Sequence[Checkpoint]) -> Iterator[str]:
    """The notes of checkpoints, as people are told them."""
    every = [note for side in sides for note in side.notes]
    unused = [note for note in every if note.startswith(UNUSED_KEY)]
    if len(unused) > 1:  # a key is for one of the sides, and the other may have no use for it
        said, colon, _ = unused[0].partition(" is not used: ")
        yield f"{said}{colon}neither side is a torch file"
    yield from (told(note) for note in every if note not in unused)


def lost(table: TensorTable, done: str) -> Iterator[str]:
    """The warning that tensors are not written, or whatever else is done with the others."""
    if table.absent:
        yield (
            f"{WARNING}tensors that no file has, or that cannot be read, are not {done}: "
            f"{some(table.absent)}"
        )


@dataclass(slots=True)
class Contents:
    """What the files of a checkpoint hold together, in columns."""

    table: TensorTable
    file_index: npt.NDArray[np.int32]  #: for each tensor the position of its file; -1: in pieces
    offset: IntArray  #: for each tensor its first byte counted from the start of its file, or -1
    #: for each file the first byte after its header, where the format has headers
    head_sizes: list[int] = field(default_factory=list)
    #: for each tensor that is not in one place its pieces, which cover it once
    pieces: Mapping[int, tuple[Piece, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  #: one line each, for people
    refused: CheckpointError | None = None  #: why they are no checkpoint, but something of ours
    stored: Contents | None = None  #: all that is in the files, where that is more than counts
    #: what has to be read to know that the files do not contradict each other, if anything: to be
    #: called before anything else is read. Raises CheckpointError, SourceChanged
    unchecked: Callable[[], None] | None = None

    def is_same(self, other: Contents) -> bool:
        """Whether both hold the same tensors, each at the same place."""
        mine, theirs = (
            (
                side.table.names, side.table.dtypes, side.table.shapes, side.head_sizes,
                dict(side.pieces),
                [c.tobytes() for c in (side.table.nbytes, side.file_index, side.offset)],
            )
            for side in (self, other)
        )  # fmt: skip
        return mine == theirs


def together(parts: Sequence[tuple[str, Contents]]) -> Contents:
    """Several contents as one, the names of each behind the prefix that is given with it."""
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    tables = [content.table for _, content in parts]
    firsts = np.cumsum([0, *map(len, tables)]).tolist()
    return Contents(
        TensorTable(
            [prefix + name for prefix, content in parts for name in content.table.names],
            [dtype for table in tables for dtype in table.dtypes],
            [shape for table in tables for shape in table.shapes],
            np.concatenate([table.nbytes for table in tables]),
            [prefix + name for prefix, content in parts for name in content.table.absent],
        ),
        np.concatenate([content.file_index for _, content in parts]),
        np.concatenate([content.offset for _, content in parts]),
        # that there are headers is only said where all have them
        [size for _, c in parts for size in c.head_sizes]
        if all(c.head_sizes for _, c in parts)
        else [],
        {
            first + at: p
            for first, (_, c) in zip(firsts, parts, strict=False)
            for at, p in c.pieces.items()
        },
        [note for _, content in parts for note in content.notes],
        next((content.refused for _, content in parts if content.refused), None),
        _stored_together(parts),
        _every_check([content.unchecked for _, content in parts if content.unchecked]),
    )


def _stored_together(parts: Sequence[tuple[str, Contents]]) -> Contents | None:
    """All that is in the files of several, where it is more than counts in some."""
    if all(content.stored is None for _, content in parts):
        return None
    return together([(prefix, content.stored or content) for prefix, content in parts])


def _every_check(checks: Sequence[Callable[[], None]]) -> Callable[[], None] | None:
    def check() -> None:
        for one in checks:
            one()

    return check if checks else None


def is_run(shape: tuple[int, ...], piece: Piece) -> bool:
    """Whether a piece's elements lie one after the other, and are so in the tensor as well."""
    first = next((i for i, size in enumerate(piece.shape) if size != 1), len(shape))
    return piece.packed and piece.shape[first + 1 :] == shape[first + 1 :]


def borders(shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> IntArray:
    """Elements of a tensor at which one run of addresses ends and another begins.

    Nothing where its pieces are not such runs: then all of it is gathered.
    """
    starts = []
    steps = packed_strides(shape)
    for piece in pieces:
        if not is_run(shape, piece):
            return np.zeros(0, np.int64)
        starts.append(sum(a * s for a, s in zip(piece.at, steps, strict=True)))
    return np.array(sorted(starts)[1:], np.int64)


def boxes(
    shape: tuple[int, ...], first: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [first, stop) of a tensor as boxes: (index of the first element, sizes)."""
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    row, column = divmod(first, inner)
    last, rest = divmod(stop, inner)
    if row == last:
        for at, extent in boxes(shape[1:], column, rest):
            yield (row, *at), (1, *extent)
        return
    if column:
        for at, extent in boxes(shape[1:], column, inner):
            yield (row, *at), (1, *extent)
        row += 1
    if last > row:
        yield (row, *(0,) * len(shape[1:])), (last - row, *shape[1:])
    if rest:
        for at, extent in boxes(shape[1:], 0, rest):
            yield (last, *at), (1, *extent)
