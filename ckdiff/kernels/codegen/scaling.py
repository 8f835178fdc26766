"""Quantised elements times their scales: the float32 that each of them stands for.

Both kernels follow a recipe, see the ABI: they begin where it is, and move it on. 32 elements are
multiplied at a time. The last ones of a run are done with what comes behind them, whose values are
written over afterwards; only at the very end they are taken aside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import (
    RECIPE_BYTES,
    RECIPE_DTYPE,
    RECIPE_SCALES,
    RECIPE_SOURCE,
    SCALE_DTYPES,
    WALK_ACROSS,
    WALK_BLOCK_COLUMNS,
    WALK_BLOCK_ROWS,
    WALK_COLUMN,
    WALK_FIRST,
    WALK_IN_COLUMN,
    WALK_IN_ROW,
    WALK_ROW,
    WALK_ROWS,
    WALK_SCALE,
    WALK_WIDTH,
)
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.lanes import (
    F32,
    I8,
    I32,
    I64,
    Value,
    as_many,
    in_each,
    int_type,
    spread,
)
from ckdiff.kernels.codegen.words import copy_byte, fetch_lines, load_word, store_word
from ckdiff.kernels.numbaview import has

WORD = 32  # elements
_NAN = 0x7FC00000
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (*_SIZES, *(-size for size in _SIZES))  #: of F4
_TABLE = len(NUMBERS)
_ASIDE = 9 * WORD  # bytes: elements, values and scales of a word
_POWERS = SCALE_DTYPES.index("F8_E8M0")


def vector_at(b: Any, address: Value, element: Any, count: int = WORD) -> Value:
    """Where a vector is."""
    return b.inttoptr(address, ir.VectorType(element, count).as_pointer())


def _looks_up() -> bool:
    """Whether the machine takes 16 numbers at a time out of a table of 16."""
    return has("avx512f")


def _picks_bits() -> bool:
    """Whether the machine takes bytes out of words that begin with any bit."""
    return has("avx512vbmi")


def pairs_of(b: Any, address: Value, count: int) -> Value:
    """So many F4, as int32 lanes: each is the lowest four bits of its lane."""
    if count == _TABLE and _looks_up() and _picks_bits():
        kind = ir.VectorType(I8, 64)
        word = b.load(vector_at(b, address, I64, 1), align=1)
        every = b.shuffle_vector(word, word, ir.Constant(ir.VectorType(I32, 8), [0] * 8))
        begins = ir.Constant(kind, [8 * (i // 8) + i // 4 % 2 * 4 for i in range(64)])
        pick = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(kind, [kind] * 2), "llvm.x86.avx512.pmultishift.qb.512"
        )
        picked = b.call(pick, [begins, b.bitcast(every, kind)])
        return b.bitcast(picked, ir.VectorType(I32, count))
    pairs = b.load(vector_at(b, address, I8, count // 2), align=1)
    wide = b.zext(pairs, as_many(pairs, I64))
    both = b.or_(wide, b.shl(wide, in_each(wide, I64, 28)))
    return b.bitcast(both, ir.VectorType(I32, count))


def look_up(b: Any, numbers: Value, bits: Value) -> Value:
    """Those of a vector of NUMBERS, each times the same factor, that the lowest four bits of as
    many int32 lanes say.
    """
    if _looks_up():
        kind = ir.FunctionType(numbers.type, [numbers.type, bits.type])
        name = "llvm.x86.avx512.permvar.sf.512"
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [numbers, bits])
    one = b.extract_element(numbers, I32(NUMBERS.index(1)))
    return b.fmul(four_bits(b, bits), spread(b, one, _TABLE))


def four_bits(b: Any, bits: Value) -> Value:
    """The lowest four bits of int32 lanes, an F4, as float32 lanes."""
    const = partial(in_each, bits, I32)
    if _looks_up():
        numbers = ir.Constant(ir.VectorType(F32, _TABLE), list(NUMBERS))
        if bits.type.count == _TABLE:
            return look_up(b, numbers, bits)
        parts = [
            look_up(b, numbers, b.shuffle_vector(bits, bits, ir.Constant(of, [*range(k, k + 16)])))
            for of in [ir.VectorType(I32, _TABLE)]
            for k in range(0, bits.type.count, _TABLE)
        ]
        return b.shuffle_vector(*parts, ir.Constant(bits.type, list(range(2 * _TABLE))))
    # one sign bit, two of exponent (bias 1), one of mantissa, and all of them are numbers
    size = b.and_(bits, const(7))
    whole = b.add(b.shl(size, const(22)), const(126 << 23))
    whole = b.select(b.icmp_unsigned("==", size, const(1)), const(126 << 23), whole)
    whole = b.select(b.icmp_unsigned("==", size, const(0)), const(0), whole)
    sign = b.shl(b.and_(bits, const(8)), const(28))
    return b.bitcast(b.or_(whole, sign), as_many(bits, F32))


def _numbers(b: Any, dtype: DType, address: Value) -> Value:
    """A word as float32 lanes."""
    if dtype.bits < 8:
        return four_bits(b, pairs_of(b, address, WORD))
    bits = b.load(vector_at(b, address, I8), align=1)
    if dtype.kind == "int":
        return b.sitofp(bits, as_many(bits, F32))
    return lanes.to_float(b, dtype, bits)


def powers_of_two(b: Any, bits: Value) -> Value:
    """E8M0 as float32 lanes: 2**(e - 127), the lowest of which is subnormal; 255 is NaN."""
    whole = b.shl(b.zext(bits, as_many(bits, I32)), in_each(bits, I32, 23))
    extreme = b.icmp_unsigned("<=", b.add(bits, in_each(bits, I8, 1)), in_each(bits, I8, 1))
    other = b.or_(whole, in_each(bits, I32, 1 << 22))
    return b.bitcast(b.select(extreme, other, whole), as_many(bits, F32))


def store_product(b: Any, numbers: Value, factors: Value, out: Value, exact: bool = False) -> None:
    """One product each, and one NaN for all NaNs. ``exact``: the only NaN is that one of scales."""
    product = b.fmul(numbers, factors)
    if not exact:
        nan = b.bitcast(in_each(product, I32, _NAN), product.type)
        product = b.select(b.fcmp_unordered("uno", product, product), nan, product)
    b.store(product, vector_at(b, out, F32), align=1)


@intrinsic  # type: ignore[untyped-decorator]
def _factor(typing: Any, number: Any, address: Any) -> Any:
    """The float32 of one scale, of the dtype with that number."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        found = cgutils.alloca_once(b, F32)
        done = b.append_basic_block("known")
        switch = b.switch(args[0], done)
        for i, name in enumerate(SCALE_DTYPES):
            block = b.append_basic_block(name)
            switch.add_case(I64(i), block)
            b.position_at_end(block)
            dtype = DTYPES[name]
            bits = b.load(vector_at(b, args[1], int_type(dtype.bits), 1), align=1)
            factor = (
                powers_of_two(b, bits) if dtype.kind == "raw" else lanes.to_float(b, dtype, bits)
            )
            b.store(b.extract_element(factor, I32(0)), found)
            b.branch(done)
        b.position_at_end(done)
        return b.load(found)

    return types.float32(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_all(typing: Any, name: Any, source: Any, factor: Any, out: Any) -> Any:
    """Multiply a word by one number."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        numbers = _numbers(b, DTYPES[name.literal_value], args[1])
        store_product(b, numbers, spread(b, args[2], WORD), args[3])
        return context.get_dummy_value()

    return types.void(name, types.int64, types.float32, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_group(typing: Any, name: Any, source: Any, scale: Any, out: Any) -> Any:
    """Multiply a word by one E8M0."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[name.literal_value]
        factor = powers_of_two(b, b.load(vector_at(b, args[2], I8, 1), align=1))
        every = spread(b, b.extract_element(factor, I32(0)), WORD)
        store_product(b, _numbers(b, dtype, args[1]), every, args[3], dtype.kind != "float")
        return context.get_dummy_value()

    return types.void(name, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_each(typing: Any, name: Any, source: Any, factors: Any, out: Any) -> Any:
    """Multiply a word by as many float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        factors = b.load(vector_at(b, args[2], F32), align=1)
        store_product(b, _numbers(b, DTYPES[name.literal_value], args[1]), factors, args[3])
        return context.get_dummy_value()

    return types.void(name, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _store_factor(typing: Any, address: Any, factor: Any) -> Any:
    """Write a float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(args[1], b.inttoptr(args[0], F32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def room_aside(typing: Any) -> Any:
    """The address of _ASIDE bytes, which are this call's own."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(I8, _ASIDE)), I64)

    return types.int64(), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def copy_bytes(to: int, source: int, size: int) -> None:
    for i in range(size):
        copy_byte(to + i, source + i)


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def whole_words(count: int, left: int) -> int:
    """How many words a run is done in where so many elements are left: it may take some of them."""
    words = (count + WORD - 1) // WORD
    if words * WORD > left:
        words -= 1
    return words


def scale_kernel(name: str) -> Callable[[int, int, int], None]:
    """Multiplies elements of a dtype by the scales of their blocks; see the ABI."""
    bits = DTYPES[name].bits
    stride = WORD * bits // 8

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def by_one(source: int, factor: float, out: int, count: int, left: int, aside: int) -> None:
        words = whole_words(count, left)
        for i in range(words):
            _multiply_all(name, source + i * stride, factor, out + i * (4 * WORD))
        rest = count - words * WORD
        if rest > 0:
            copy_bytes(aside, source + words * stride, (rest * bits + 7) // 8)
            _multiply_all(name, aside, factor, aside + WORD)
            copy_bytes(out + words * (4 * WORD), aside + WORD, 4 * rest)

    @register_jitable(inline="always")  # type: ignore[untyped-decorator]
    def by_each(
        source: int, scales: int, kind: tuple[int, int], out: int, count: int, aside: int
    ) -> None:
        number, width = kind
        begin = 0
        if number == 0:  # float32
            for _ in range(count // WORD):
                here, to = source + begin * bits // 8, out + 4 * begin
                _multiply_each(name, here, scales + 4 * begin, to)
                begin += WORD
        while begin < count:
            some = count - begin
            if some > WORD:
                some = WORD
            for i in range(some):
                factor = _factor(number, scales + (begin + i) * width)
                _store_factor(aside + 5 * WORD + 4 * i, factor)
            copy_bytes(aside, source + begin * bits // 8, (some * bits + 7) // 8)
            _multiply_each(name, aside, aside + 5 * WORD, aside + WORD)
            copy_bytes(out + 4 * begin, aside + WORD, 4 * some)
            begin += some

    def scale(recipe: int, out: int, elements: int) -> None:
        mode, aside = enter_default_mode(), room_aside()
        source = load_word(recipe + 8 * RECIPE_SOURCE)
        scales = load_word(recipe + 8 * RECIPE_SCALES)
        number, width = load_word(recipe + 8 * RECIPE_DTYPE), load_word(recipe + 8 * RECIPE_BYTES)
        columns, rows = load_word(recipe + 8 * WALK_WIDTH), load_word(recipe + 8 * WALK_ROWS)
        block_rows = load_word(recipe + 8 * WALK_BLOCK_ROWS)
        block_columns = load_word(recipe + 8 * WALK_BLOCK_COLUMNS)
        across = load_word(recipe + 8 * WALK_ACROSS)
        column, row = load_word(recipe + 8 * WALK_COLUMN), load_word(recipe + 8 * WALK_ROW)
        in_row = load_word(recipe + 8 * WALK_IN_ROW)
        in_column = load_word(recipe + 8 * WALK_IN_COLUMN)
        first, at = load_word(recipe + 8 * WALK_FIRST), load_word(recipe + 8 * WALK_SCALE)
        store_word(recipe + 8 * RECIPE_SOURCE, source + elements * bits // 8)
        fetch_lines(source + elements * bits // 8, elements * bits // 8)
        if block_columns < 128:
            fetch_lines(scales + at * width + 64, 64)
        while elements > 0:
            run = columns - column
            if run > elements:
                run = elements
            column += run
            if block_columns == 1:  # a scale for each column: they lie as they are needed
                by_each(source, scales + at * width, (number, width), out, run, aside)
                at += run
                source += run * bits // 8
                out += 4 * run
                elements -= run
                run = 0
            if block_columns == WORD and in_column == 0 and number == _POWERS:
                words = run // WORD
                for i in range(words):
                    to = out + i * (4 * WORD)
                    _multiply_group(name, source + i * stride, scales + at + i, to)
                at += words
                source += words * stride
                out += words * (4 * WORD)
                elements -= words * WORD
                run -= words * WORD
            while run > 0:
                some = block_columns - in_column
                if some > run:
                    some = run
                factor = _factor(number, scales + at * width)
                by_one(source, factor, out, some, elements, aside)
                in_column += some
                if in_column == block_columns:
                    in_column = 0
                    at += 1
                source += some * bits // 8
                out += 4 * some
                elements -= some
                run -= some
            if column == columns:
                column, in_column = 0, 0
                row += 1
                in_row += 1
                if in_row == block_rows or row == rows:
                    in_row = 0
                    first += across
                if row == rows:
                    row = 0
                at = first
        store_word(recipe + 8 * WALK_COLUMN, column)
        store_word(recipe + 8 * WALK_ROW, row)
        store_word(recipe + 8 * WALK_IN_ROW, in_row)
        store_word(recipe + 8 * WALK_IN_COLUMN, in_column)
        store_word(recipe + 8 * WALK_FIRST, first)
        store_word(recipe + 8 * WALK_SCALE, at)
        leave_default_mode(mode)

    return scale
