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
from ckdiff.kernels.codegen.words import load_word, quotient, store_word

_VECTOR = 16  # bytes of a row of what is turned in registers
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
        b.call(ask, [line, I32(0), I32(2), I32(1)])  # read, second-level cache, data
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _joined(b: Any, parts: list[Value]) -> Value:
    """Vectors of one size, as one."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        every = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        parts = [
            b.shuffle_vector(*pair, every) for pair in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _turned(b: Any, rows: list[Value]) -> list[Value]:
    """The columns of squares of vectors that lie beside each other in ``rows``: these are
    interleaved, square by square, as often as they can be halved.
    """
    count, lanes = len(rows), rows[0].type.count
    halves = [
        ir.Constant(
            ir.VectorType(I32, lanes),
            [
                square + first + i // 2 + i % 2 * lanes
                for square in range(0, lanes, count)
                for i in range(count)
            ],
        )
        for first in (0, count // 2)
    ]
    for _ in range(count.bit_length() - 1):
        pairs = zip(rows[: count // 2], rows[count // 2 :], strict=True)
        rows = [b.shuffle_vector(*pair, half) for pair in pairs for half in halves]
    return rows


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _turn(typing: Any, width: Any, to: Any, other: Any, step: Any, source: Any) -> Any:
    """Transpose the _VECTOR bytes at the beginning of all rows of a tile, which lie BOX_TILE bytes
    apart: each column is written as a whole line, in turn to ``to`` and to ``other``, ``step``
    bytes from the one before the last.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, to, other, step, source = args
        count, squares = _VECTOR // int(width.literal_value), BOX_TILE // _VECTOR
        kind = ir.VectorType(int_type(8 * int(width.literal_value)), count)
        rows = []
        for i in range(count):
            begins = [b.add(source, I64(BOX_TILE * (i + k * count))) for k in range(squares)]
            parts = [b.load(_pointer(b, begin, kind), align=1) for begin in begins]
            rows.append(_joined(b, parts))
        for row in _turned(b, rows):
            b.store(row, _pointer(b, to, row.type), align=1)
            to, other = other, b.add(to, step)
        return context.get_dummy_value()

    return types.void(width, *[types.int64] * 4), generate


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

    return gather  # type: ignore[no-any-return]


def _scatter(width: int) -> Callable[..., None]:
    """What writes the columns of a square tile: each as a whole line, see _turn."""
    some, squares = _VECTOR // width, BOX_TILE // _VECTOR

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def scatter(to: int, other: int, step: int, tile: int) -> None:
        for j in range(squares):
            far = j * (some // 2) * step
            _turn(width, to + far, other + far, step, tile + j * _VECTOR)

    return scatter  # type: ignore[no-any-return]


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _place(tile: int, side: int, lead: int, size: int) -> int:
    """The first element of a tile along a dimension of ``size``. Tiles lie at multiples of ``side``
    but for ``lead`` elements less; those that would reach out of it do some again.
    """
    first = tile * side - lead
    if first < 0:
        return 0
    if first > size - side:
        return size - side
    return first


def _band(width: int, every: int, *, woven: bool) -> Callable[..., None]:
    """What turns one tile after the other of rows of the source: while it does, it asks for the
    rows of the band that comes next, as they lie. Asked for line by line of each row, a tile ahead,
    memory would not keep up.
    """
    side = BOX_TILE // width
    gather, scatter = _gather(width, every), _scatter(width)

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def band(
        places: tuple[int, int, int], steps: tuple[int, int, int], tiles: tuple[int, int],
        size: tuple[int, int], aside: int,
    ) -> None:  # fmt: skip
        source, out, ahead = places
        step, out_step, twin = steps
        first, stop = tiles
        rows, lead = size
        asked = quotient(side + stop - first - 1, stop - first)  # rows, for each tile
        for tile in range(first, stop):
            row = _place(tile, side, lead, rows)
            gather(aside, source + row * every * width, step, row + side == rows)
            for _ in range(asked):
                for i in range((stop - first) * every):
                    _will_read(ahead + BOX_TILE * i)
                ahead += step
            if woven:
                to = out + (row >> 1) * out_step
                scatter(to, to + twin, out_step, aside)
            else:
                to = out + row * out_step
                scatter(to, to + out_step, 2 * out_step, aside)

    return band  # type: ignore[no-any-return]


def _tiles(width: int, every: int, *, woven: bool) -> Callable[[int, int, int, int], None]:
    side = BOX_TILE // width
    shift = side.bit_length() - 1
    band = _band(width, every, woven=woven)

    def tiles(source: int, out: int, box: int, scratch: int) -> None:
        rows, columns = load_word(box + 8 * BOX_ROWS), load_word(box + 8 * BOX_COLUMNS)
        step, out_step = load_word(box + 8 * BOX_COLUMN_SOURCE), load_word(box + 8 * BOX_ROW_OUT)
        steps = step, out_step, load_word(box + 8 * BOX_COLUMN_OUT)
        if woven:
            rows *= 2
        more = True
        while more:
            here, to = source + load_word(box + 8 * BOX_SOURCE), out + load_word(box + 8 * BOX_OUT)
            # tiles begin where lines of the cache do, where those of all rows begin alike
            lead, out_lead = here % BOX_TILE // (every * width), to % BOX_TILE // width
            if woven:
                lead &= -2  # tiles begin with a row of the first one
            down = (rows + lead + side - 1) >> shift
            for first in range(0, down, side):
                stop = first + side
                if stop > down:
                    stop = down
                begin = _place(first, side, lead, rows) * every * width
                for across in range((columns + out_lead + side - 1) >> shift):
                    column = _place(across, side, out_lead, columns)
                    after = _place(across + 1, side, out_lead, columns)
                    places = here + column * step, to + column * width, here + after * step + begin
                    band(places, steps, (first, stop), (rows, lead), scratch)
            more = _advance(box)

    return tiles


def strided_kernel(kind: str) -> Callable[[int, int, int, int], None]:
    """See the ABI. The kind is ``runs``, or ``lines``, ``tiles`` or ``woven`` with the bytes of an
    element and how many elements lie between one and the next (0: any number).
    """
    way, _, numbers = kind.partition(" ")
    if way == "runs":
        return _runs()
    width, every = map(int, numbers.split(","))
    return _lines(width, every) if way == "lines" else _tiles(width, every, woven=way == "woven")
