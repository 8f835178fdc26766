"""Bits that wait to become a store: in a nameless file beside the output, as small as they allow.

An archive can only be read in order, positions may come in any, and a mask may turn out to be false
at its very end. So all bits are gathered before the store is begun. They lie as zstd frames of the
stored size: what a file merely declares, such as a model of 70 billion elements with three ones,
costs nothing here, and neither do long runs of anything. Nothing is written through a mapping, so
that a full disk is an error and no signal.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from ckdiff.budget import format_size
from ckdiff.errors import BudgetError, StoreError, printable
from ckdiff.layout import Layout
from ckdiff.masks.importing.maskfile import Item, bad, items_of, shown
from ckdiff.outputs.checks import free_space
from ckdiff.outputs.writing import write_all
from ckdiff.stores.building import Bytes
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.objects import INNER, OBJECT
from ckdiff.stores.workdir import store_errors

_PART = 8 * OBJECT  # elements of which the positions are gathered at a time


class Staging:
    """The bits of all tensors at their addresses; written from low to high, then read at will."""

    def __init__(self, layout: Layout, out: Path, stack: ExitStack) -> None:
        self._out = out
        self._fd = _nameless(out, stack)
        blocks = -(-layout.total // (8 * INNER))
        # untouched pages of zeros cost no memory, and blocks without ones are never touched
        self._begins, self._sizes = np.zeros(blocks, np.int64), np.zeros(blocks, np.int32)
        self._end = 0
        self._encoder = MaskEncoder()
        self._block, self._number = np.zeros(INNER, np.uint8), 0

    # writing

    def add(self, item: Item, start: int, elements: int) -> None:
        """Take in a tensor of which the first bit has the address ``start``, the highest so far.

        Raises CheckpointError for a mask that is false or not whole, StoreError and BudgetError
        where the disk is full.
        """
        if item.kind == "indices":
            self._add_positions(item, start // 8, elements)
            return
        at, end = start // 8, start // 8 - (-elements // 8)
        for piece in items_of(item):
            at = self._put(at, _packed(item, piece))
        if at != end:
            raise bad(item, f"does not fill its {elements:,} elements")
        if item.kind == "packed" and elements % 8 and self._last(end) >> elements % 8:
            raise bad(item, "has padding bits that are set")

    def finish(self) -> None:
        """Write what is left; to be called once, after the last tensor."""
        self._flush()

    def _last(self, end: int) -> int:
        """The byte before ``end``, which was the last to be put."""
        return int(self._block[(end - 1) % INNER])

    def _put(self, at: int, data: Bytes) -> int:
        """Put mask bytes at an address in bytes; gives the next one."""
        done = 0
        while done < len(data):
            number, within = divmod(at + done, INNER)
            if number != self._number:
                self._flush()
                self._number = number
            count = min(INNER - within, len(data) - done)
            self._block[within : within + count] = data[done : done + count]
            done += count
        return at + done

    def _flush(self) -> None:
        if not self._block.any():
            return
        frame = self._encoder.encode(self._block)
        with store_errors(self._out):
            write_all(self._fd, frame)
        self._begins[self._number], self._sizes[self._number] = self._end, len(frame)
        self._end += len(frame)
        self._block.fill(0)

    # positions

    def _add_positions(self, item: Item, at: int, elements: int) -> None:
        """Parts of the tensor, one after the other, from positions in whatever order."""
        parts = -(-elements // _PART)
        with ExitStack() as stack:
            pieces = _checked(item, elements)
            if parts > 1:
                pieces = self._sorted(item, elements, parts, stack)
            part, bits, count = -1, np.empty(0, np.uint8), 0
            for positions in pieces:
                for number, some in _by_part(positions):
                    if number != part:
                        self._put_part(item, at + part * (_PART // 8), bits, count)
                        part, count = number, 0
                        size = min(_PART, elements - part * _PART)
                        bits = np.zeros(-(-size // 8), np.uint8)
                    places = some - part * _PART
                    np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
                    count += len(some)
            self._put_part(item, at + part * (_PART // 8), bits, count)

    def _put_part(self, item: Item, at: int, bits: Bytes, count: int) -> None:
        if int(np.bitwise_count(bits).sum(dtype=np.int64)) != count:
            raise bad(item, "names a position twice")
        if count:
            self._put(at, bits)

    def _sorted(
        self, item: Item, elements: int, parts: int, stack: ExitStack
    ) -> Iterator[npt.NDArray[np.int64]]:
        """The positions, those of lower parts first.

        Most files have them so. Others are put in order on the disk, which takes 8 bytes for each
        position that is there, whatever the tensor's size.
        """
        counts, last, ordered = np.zeros(parts, np.int64), 0, True
        for positions in _checked(item, elements):
            numbers = positions // _PART
            ordered = ordered and last <= numbers[0] and bool((np.diff(numbers) >= 0).all())
            last = int(numbers[-1])
            counts += np.bincount(numbers, minlength=parts)
        if ordered:
            return _checked(item, elements)
        size = 8 * item.length
        with store_errors(self._out):
            if free_space(self._out.parent) < size:
                raise BudgetError(
                    f"{format_size(size)} are needed at {printable(str(self._out.parent))} to put "
                    f"the positions of {shown(item.name)} in order",
                    hint="free some space or choose another place with -o",
                )
        fd = _nameless(self._out, stack)  # only until this tensor is done
        self._spill(item, elements, counts, fd)
        return _spilled(fd, size, self._out)

    def _spill(self, item: Item, elements: int, counts: npt.NDArray[np.int64], fd: int) -> None:
        cursors = np.cumsum(counts) - counts
        for positions in _checked(item, elements):
            order = np.argsort(positions // _PART, kind="stable")
            for number, some in _by_part(positions[order]):
                with store_errors(self._out):
                    os.lseek(fd, int(cursors[number]) * 8, os.SEEK_SET)
                    write_all(fd, some.tobytes())
                cursors[number] += len(some)

    # reading

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes to know where the blocks with ones lie."""
        return 12 * int(np.count_nonzero(self._sizes))

    def read(self, first: int, mask: Bytes) -> None:
        """Put the bits that begin at the address ``first``, of a block, into a zeroed ``mask``.

        May be called by several threads. Raises StoreError where the disk does not give them back.
        """
        decoder = zstandard.ZstdDecompressor()
        number = first // (8 * INNER)
        for at in range(0, len(mask), INNER):
            if number < len(self._sizes) and (size := int(self._sizes[number])):
                frame = _pread(self._fd, size, int(self._begins[number]), self._out)
                try:
                    data = decoder.decompress(frame, max_output_size=INNER)
                except zstandard.ZstdError as error:
                    raise _damaged(self._out, str(error)) from None
                part = mask[at : at + INNER]
                part[:] = np.frombuffer(data, np.uint8, len(part))
            number += 1


def _nameless(out: Path, stack: ExitStack) -> int:
    """A file beside the output that is gone when ``stack`` closes it, however we end."""
    with store_errors(out):
        file = tempfile.TemporaryFile(dir=out.parent, buffering=0)  # noqa: SIM115
    return stack.enter_context(file).fileno()


def _packed(item: Item, piece: npt.NDArray[Any]) -> Bytes:
    """The mask bytes of flags or of bits."""
    if item.kind == "packed":
        return piece
    if piece.max() > 1:
        raise bad(item, "has something else than 0 and 1")
    return np.packbits(piece, bitorder="little")


def _checked(item: Item, elements: int) -> Iterator[npt.NDArray[np.int64]]:
    """The positions of ones, all inside the tensor."""
    for piece in items_of(item):
        if piece.min() < 0 or piece.max() >= elements:
            raise bad(item, f"has a position outside its {elements:,} elements")
        yield piece.astype(np.int64)


def _by_part(
    positions: npt.NDArray[np.int64],
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Runs of positions that lie in the same part, with its number."""
    numbers = positions // _PART
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(positions)]
    for begin, end in pairwise(cuts):
        yield int(numbers[begin]), positions[begin:end]


def _spilled(fd: int, size: int, out: Path) -> Iterator[npt.NDArray[np.int64]]:
    step = 1 << 20
    for at in range(0, size, step):
        data = _pread(fd, min(step, size - at), at, out)
        yield np.frombuffer(data, np.int64)


def _pread(fd: int, size: int, offset: int, out: Path) -> bytes:
    with store_errors(out):
        data = os.pread(fd, size, offset)
        while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
            data += more
    if len(data) < size:
        raise _damaged(out, "it ends early")
    return data


def _damaged(out: Path, reason: str) -> StoreError:
    return StoreError(
        f"what was gathered beside {printable(str(out))} is damaged: {printable(reason)}",
        hint="is the disk in order? run it again",
    )
