"""Quantised elements times their scales: the float32 that each of them stands for.

The scales of a piece of elements are laid out first, one for each element. Then they are multiplied
64 at a time, wherever blocks and rows end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import (
    CAST_SCRATCH,
    LANES,
    SCALE_PIECE,
    WALK_BLOCK_COLUMNS,
    WALK_BLOCK_ROWS,
    WALK_COLUMN,
    WALK_FIRST,
    WALK_IN_COLUMN,
    WALK_IN_ROW,
    WALK_ROW,
    WALK_ROWS,
    WALK_SCALE,
    WALK_SCALES,
    WALK_WIDTH,
)
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.lanes import F32, I8, I32, Value, splat, vector
from ckdiff.kernels.codegen.words import copy_byte, load_word, quotient

_NAN = 0x7FC00000
_FILL = 16  # lanes written at a time


def _number(b: Any, dtype: DType, bits: Value) -> Value:
    """64 elements as float32 lanes."""
    if dtype.kind == "float":
        return lanes.to_float(b, dtype, bits)
    if dtype.kind == "int":
        return b.sitofp(bits, vector(F32))
    wide = b.zext(bits, vector(I32))
    # F4: one sign bit, two of exponent (bias 1), one of mantissa, and all of them are numbers
    size = b.and_(wide, splat(I32, 7))
    normal = b.add(b.shl(size, splat(I32, 22)), splat(I32, 126 << 23))
    half = b.select(b.icmp_unsigned("==", size, splat(I32, 1)), splat(I32, 126 << 23), normal)
    out = b.select(b.icmp_unsigned("==", size, splat(I32, 0)), splat(I32, 0), half)
    sign = b.shl(b.lshr(wide, splat(I32, 3)), splat(I32, 31))
    return b.bitcast(b.or_(out, sign), vector(F32))


def _store_product(b: Any, number: Value, scales: Value, out: Value) -> None:
    pointer = vector(F32).as_pointer()
    product = b.fmul(number, b.load(b.inttoptr(scales, pointer), align=1))
    nan = b.bitcast(splat(I32, _NAN), vector(F32))
    product = b.select(b.fcmp_unordered("uno", product, product), nan, product)
    b.store(product, b.inttoptr(out, pointer), align=1)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_word(typing: Any, name: Any, source: Any, scales: Any, out: Any) -> Any:
    """Multiply 64 elements by as many float32: one product each, and one NaN for all NaNs."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[name.literal_value]
        _store_product(b, _number(b, dtype, lanes.load_bits(b, dtype, args[1])), *args[2:])
        return context.get_dummy_value()

    return types.void(name, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_half(typing: Any, high: Any, source: Any, scales: Any, out: Any) -> Any:
    """The same of 64 F4 that are one half of 64 bytes, the high ones or the low ones."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        bits = b.load(b.inttoptr(args[1], vector(I8).as_pointer()), align=1)
        shifted = b.lshr(bits, splat(I8, 4 * int(high.literal_value)))
        number = _number(b, DTYPES["F4"], b.and_(shifted, splat(I8, 15)))
        _store_product(b, number, *args[2:])
        return context.get_dummy_value()

    return types.void(high, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _fill(typing: Any, to: Any, source: Any) -> Any:
    """Write the float32 at ``source`` _FILL times."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        kind = ir.VectorType(F32, _FILL)
        undefined = ir.Constant(kind, ir.Undefined)
        one = b.load(b.inttoptr(args[1], F32.as_pointer()), align=1)
        first = b.insert_element(undefined, one, I32(0))
        every = b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, _FILL), [0] * 16))
        b.store(every, b.inttoptr(args[0], kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy_scale(typing: Any, to: Any, source: Any) -> Any:
    """Copy one float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        value = b.load(b.inttoptr(args[1], I32.as_pointer()), align=1)
        b.store(value, b.inttoptr(args[0], I32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def scale_kernel(dtype_name: str) -> Callable[..., None]:
    """Multiplies elements by the scales of their blocks; see the ABI."""
    bits = DTYPES[dtype_name].bits

    def scale(source: int, out: int, elements: int, scales: int, walk: int, scratch: int) -> None:
        mode = enter_default_mode()
        width, rows = load_word(walk + 8 * WALK_WIDTH), load_word(walk + 8 * WALK_ROWS)
        block_rows = load_word(walk + 8 * WALK_BLOCK_ROWS)
        block_columns = load_word(walk + 8 * WALK_BLOCK_COLUMNS)
        row_scales = load_word(walk + 8 * WALK_SCALES)
        column, row = load_word(walk + 8 * WALK_COLUMN), load_word(walk + 8 * WALK_ROW)
        in_row = load_word(walk + 8 * WALK_IN_ROW)
        in_column = load_word(walk + 8 * WALK_IN_COLUMN)
        first, at = load_word(walk + 8 * WALK_FIRST), load_word(walk + 8 * WALK_SCALE)
        aside = scratch + 4 * (SCALE_PIECE + LANES)
        while elements > 0:
            piece = elements
            if piece > SCALE_PIECE:
                piece = SCALE_PIECE
            laid = 0
            while laid < piece:
                run = width - column
                if run > piece - laid:
                    run = piece - laid
                if block_columns == 1:  # a scale for each column: they lie as they are needed
                    for i in range(run):
                        _copy_scale(scratch + 4 * (laid + i), scales + 4 * (at + i))
                    at += run
                else:
                    if run > block_columns - in_column:
                        run = block_columns - in_column
                    for i in range(0, run, _FILL):
                        _fill(scratch + 4 * (laid + i), scales + 4 * at)
                    in_column += run
                    if in_column == block_columns:
                        in_column = 0
                        at += 1
                laid += run
                column += run
                if column == width:
                    column = 0
                    in_column = 0
                    row += 1
                    in_row += 1
                    if in_row == block_rows or row == rows:
                        in_row = 0
                        first += row_scales
                    if row == rows:
                        row = 0
                    at = first
            words = piece // LANES
            for i in range(words):
                _multiply_word(
                    dtype_name,
                    source + i * (LANES * bits // 8),
                    scratch + i * (4 * LANES),
                    out + i * (4 * LANES),
                )
            left = piece - words * LANES
            if left:  # only at the very end
                source += words * (LANES * bits // 8)
                out += words * (4 * LANES)
                for i in range((left * bits + 7) // 8):
                    copy_byte(aside + i, source + i)
                result = aside + CAST_SCRATCH // 2
                _multiply_word(dtype_name, aside, scratch + words * (4 * LANES), result)
                for i in range(4 * left):
                    copy_byte(out + i, result + i)
            source += piece * bits // 8
            out += 4 * piece
            elements -= piece
        leave_default_mode(mode)

    return scale


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def _multiply_row(high: int, source: int, scales: int, out: int, columns: int, aside: int) -> None:
    """One half of a row of pairs. Of the last word only what counts is written."""
    words = columns // LANES
    left = columns - words * LANES
    for i in range(words + (left > 0)):
        to = out + i * (4 * LANES)
        if i == words:
            to = aside
        if high:
            _multiply_half(1, source + i * LANES, scales + i * (4 * LANES), to)
        else:
            _multiply_half(0, source + i * LANES, scales + i * (4 * LANES), to)
    for i in range(4 * left):
        copy_byte(out + words * (4 * LANES) + i, aside + i)


def halves_kernel() -> Callable[..., None]:
    """Multiplies F4 whose rows are halves of rows of bytes; see the ABI."""

    def halves(
        source: int, step: int, scales: int, scale_step: int, group: int, out: int, out_step: int,
        first: int, rows: int, columns: int, scratch: int,
    ) -> None:  # fmt: skip
        mode = enter_default_mode()
        for row in range(first, first + rows):
            factors = scales + quotient(row, group) * scale_step
            _multiply_row(row & 1, source + (row >> 1) * step, factors, out, columns, scratch)
            out += out_step
        leave_default_mode(mode)

    return halves
