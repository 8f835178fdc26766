"""Copying boxes of elements between two orders: runs, lines, and tiles that are transposed.

All steps are in bytes. Rows and columns are the two innermost dimensions; those outside of them are
walked by their counters in the table, see the ABI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.abi import (
    BOX_COLUMN_OUT,
    BOX_COLUMN_SOURCE,
    BOX_COLUMNS,
    BOX_DIMENSION,
    BOX_DIMENSIONS,
    BOX_HEAD,
    BOX_OUT,
    BOX_ROW_OUT,
    BOX_ROW_SOURCE,
    BOX_ROWS,
    BOX_SOURCE,
    BOX_TILE,
)
from ckdiff.kernels.codegen.lanes import I8, I32, I64, Value, int_type
from ckdiff.kernels.codegen.words import load_word, store_word

_VECTOR = 16  # bytes of a row of what is turned in registers
_AHEAD = 2  # tiles: how far ahead is asked for what will be read
_PICKED = 32  # bytes that are picked out of a line at a time


def _pointer(b: Any, address: Value, kind: Any) -> Value:
    return b.inttoptr(address, kind.as_pointer())


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _move(typing: Any, size: Any, to: Any, source: Any) -> Any:
    """Copy so many bytes, a power of two, by one load and one store."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        count = int(size.literal_value)
        kind = int_type(8 * count) if count <= 8 else ir.VectorType(I64, count // 8)
        value = b.load(_pointer(b, args[2], kind), align=1)
        b.store(value, _pointer(b, args[1], kind), align=1)
        return context.get_dummy_value()

    return types.void(size, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _pick(typing: Any, width: Any, every: Any, to: Any, source: Any) -> Any:
    """Copy every so manyth element, the first of them at ``source``: _PICKED bytes of them."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        word, step = int_type(8 * int(width.literal_value)), int(every.literal_value)
        count = _PICKED // int(width.literal_value)
        wide, narrow = ir.VectorType(word, count * step), ir.VectorType(word, count)
        value = b.load(_pointer(b, args[3], wide), align=1)
        wanted = ir.Constant(ir.VectorType(I32, count), [i * step for i in range(count)])
        picked = b.shuffle_vector(value, ir.Constant(wide, ir.Undefined), wanted)
        b.store(picked, _pointer(b, args[2], narrow), align=1)
        return context.get_dummy_value()

    return types.void(width, every, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _will_read(typing: Any, address: Any) -> Any:
    """Ask for the line at an address, which need not exist."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        line = _pointer(b, args[0], I8)
        kind = ir.FunctionType(ir.VoidType(), [line.type, I32, I32, I32])
        ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(ask, [line, I32(0), I32(3), I32(1)])  # read, nearest cache, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _turned(b: Any, rows: list[Value]) -> list[Value]:
    """The columns of a square of vectors: rows are interleaved, as often as they can be halved."""
    count = len(rows)
    halves = [
        ir.Constant(
            ir.VectorType(I32, count),
            [first + i // 2 + i % 2 * count for i in range(count)],
        )
        for first in (0, count // 2)
    ]
    for _ in range(count.bit_length() - 1):
        pairs = zip(rows[: count // 2], rows[count // 2 :], strict=True)
        rows = [b.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    return rows


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _turn(typing: Any, width: Any, to: Any, source: Any) -> Any:
    """Transpose a square of elements whose rows have _VECTOR bytes, and lie BOX_TILE bytes apart;
    its columns are written ``step`` bytes apart.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, to, source = args
        count = _VECTOR // int(width.literal_value)
        # the widest elements fill a row, which is then all of the square
        kind = ir.VectorType(*((int_type(128 // count), count) if count > 1 else (I64, 2)))
        begins = [b.add(source, I64(BOX_TILE * i)) for i in range(count)]
        rows = [b.load(_pointer(b, begin, kind), align=1) for begin in begins]
        for i, row in enumerate(_turned(b, rows)):
            b.store(row, _pointer(b, b.add(to, I64(BOX_TILE * i)), kind), align=1)
        return context.get_dummy_value()

    return types.void(width, types.int64, types.int64), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _advance(box: int) -> bool:
    """Step to the next place of the outer dimensions; False after the last one."""
    source, out = load_word(box + 8 * BOX_SOURCE), load_word(box + 8 * BOX_OUT)
    for i in range(load_word(box + 8 * BOX_DIMENSIONS)):  # the innermost first
        place = box + 8 * (BOX_HEAD + BOX_DIMENSION * i)
        size, count = load_word(place), load_word(place + 24) + 1
        source += load_word(place + 8)
        out += load_word(place + 16)
        if count < size:
            store_word(place + 24, count)
            store_word(box + 8 * BOX_SOURCE, source)
            store_word(box + 8 * BOX_OUT, out)
            return True
        store_word(place + 24, 0)
        source -= size * load_word(place + 8)
        out -= size * load_word(place + 16)
    return False


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _run(to: int, source: int, size: int) -> None:
    """Copy bytes; the last move may do some of them again."""
    if size >= 64:
        for at in range(0, size - 63, 64):
            _move(64, to + at, source + at)
        _move(64, to + size - 64, source + size - 64)
    elif size >= 32:
        _move(32, to, source)
        _move(32, to + size - 32, source + size - 32)
    elif size >= 16:
        _move(16, to, source)
        _move(16, to + size - 16, source + size - 16)
    elif size >= 8:
        _move(8, to, source)
        _move(8, to + size - 8, source + size - 8)
    else:
        for at in range(size):
            _move(1, to + at, source + at)


def _runs() -> Callable[[int, int, int, int], None]:
    def runs(source: int, out: int, box: int, scratch: int) -> None:
        rows, size = load_word(box + 8 * BOX_ROWS), load_word(box + 8 * BOX_COLUMNS)
        row_source, row_out = load_word(box + 8 * BOX_ROW_SOURCE), load_word(box + 8 * BOX_ROW_OUT)
        more = True
        while more:
            here, to = source + load_word(box + 8 * BOX_SOURCE), out + load_word(box + 8 * BOX_OUT)
            for _ in range(rows):
                _run(to, here, size)
                here += row_source
                to += row_out
            more = _advance(box)

    return runs


def _line(width: int, every: int) -> Callable[..., None]:
    """What copies elements one by one, or many at a time where they lie ``every`` elements apart
    and are written one after the other. ``reach``: of how many elements, and of what lies between
    them, the source may be read up to the next one.
    """
    many = _PICKED // width

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def line(to: int, source: int, size: int, reach: int, out_step: int, step: int) -> None:
        i = 0
        if every > 1:
            while i + many <= reach:
                _pick(width, every, to + i * width, source + i * width * every)
                i += many
        while i < size:
            _move(width, to + i * out_step, source + i * step)
            i += 1

    return line  # type: ignore[no-any-return]


def _lines(width: int, every: int) -> Callable[[int, int, int, int], None]:
    line = _line(width, every)

    def lines(source: int, out: int, box: int, scratch: int) -> None:
        rows, columns = load_word(box + 8 * BOX_ROWS), load_word(box + 8 * BOX_COLUMNS)
        row_source, row_out = load_word(box + 8 * BOX_ROW_SOURCE), load_word(box + 8 * BOX_ROW_OUT)
        step = load_word(box + 8 * BOX_COLUMN_SOURCE)
        out_step = load_word(box + 8 * BOX_COLUMN_OUT)
        more = True
        while more:
            here, to = source + load_word(box + 8 * BOX_SOURCE), out + load_word(box + 8 * BOX_OUT)
            for _ in range(rows):
                line(to, here, columns, columns - 1, out_step, step)
                here += row_source
                to += row_out
            more = _advance(box)

    return lines


def _gather(width: int, every: int) -> Callable[..., None]:
    """What takes the lines of a square tile aside, packed: each is read once, and as a whole.
    ``last``: whether nothing may be read behind their last elements.
    """
    side = BOX_TILE // width
    line = _line(width, every)

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def gather(aside: int, source: int, step: int, last: int) -> None:
        for i in range(side):
            here = source + i * step
            if every > 1:
                line(aside + BOX_TILE * i, here, side, side - last, width, every * width)
            else:
                _move(BOX_TILE, aside + BOX_TILE * i, here)
            for k in range(every):
                _will_read(here + BOX_TILE * (_AHEAD * every + k))

    return gather  # type: ignore[no-any-return]


def _scatter(width: int) -> Callable[..., None]:
    """What writes the columns of a square tile: each as a whole line."""
    some, squares = _VECTOR // width, BOX_TILE // _VECTOR

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def scatter(to: int, step: int, tile: int, aside: int) -> None:
        for j in range(squares):
            for i in range(squares):
                square = tile + i * some * BOX_TILE + j * _VECTOR
                _turn(width, aside + i * _VECTOR, square)
            for i in range(some):
                # as it was written, piece by piece: a longer load would wait for all of them
                for k in range(squares):
                    place = to + (j * some + i) * step + k * _VECTOR
                    _move(_VECTOR, place, aside + i * BOX_TILE + k * _VECTOR)

    return scatter  # type: ignore[no-any-return]


def _tiles(width: int, every: int) -> Callable[[int, int, int, int], None]:
    side = BOX_TILE // width
    shift = side.bit_length() - 1
    gather, scatter = _gather(width, every), _scatter(width)

    def tiles(source: int, out: int, box: int, scratch: int) -> None:
        rows, columns = load_word(box + 8 * BOX_ROWS), load_word(box + 8 * BOX_COLUMNS)
        step, out_step = load_word(box + 8 * BOX_COLUMN_SOURCE), load_word(box + 8 * BOX_ROW_OUT)
        aside = scratch + BOX_TILE * side
        more = True
        while more:
            here, to = source + load_word(box + 8 * BOX_SOURCE), out + load_word(box + 8 * BOX_OUT)
            for across in range((columns + side - 1) >> shift):
                column = across << shift
                if column > columns - side:  # the last one does some again
                    column = columns - side
                for down in range((rows + side - 1) >> shift):
                    row = down << shift
                    if row > rows - side:
                        row = rows - side
                    begin = here + column * step + row * every * width
                    gather(scratch, begin, step, row + side == rows)
                    scatter(to + row * out_step + column * width, out_step, scratch, aside)
            more = _advance(box)

    return tiles


def strided_kernel(kind: str) -> Callable[[int, int, int, int], None]:
    """See the ABI. The kind is ``runs``, or ``lines`` or ``tiles`` with the bytes of an element and
    how many elements lie between one and the next (0: any number).
    """
    way, _, numbers = kind.partition(" ")
    if way == "runs":
        return _runs()
    width, every = map(int, numbers.split(","))
    return _lines(width, every) if way == "lines" else _tiles(width, every)
