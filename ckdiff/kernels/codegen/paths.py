"""How far values went, and whether onward or back: sums over blocks of three checkpoints of a run.

Sums are taken over 16 float64 lanes that are added up in a fixed order at the end of a block,
whatever the machine's vectors are; blocks lie at fixed addresses. So a result does not depend on
where it was computed, nor on how much was looked at at a time. Elements that are infinite or NaN in
one of the three are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import (
    LANES,
    PATHS_BLOCK,
    PATHS_COLUMNS,
    PATHS_ELEMENTS,
    PATHS_OUT,
    PATHS_POSITION,
    PATHS_SIDES,
)
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.lanes import F64, I64, Value, int_type, splat, vector
from ckdiff.kernels.codegen.words import copy_byte, load_word, store_byte, store_word

_SUB = 16
_LENGTHS, _COUNTS = 2, 3  # slots of a row: see PATHS_STEP in the ABI


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_paths(typing: Any, dtype_name: Any, sides: Any, words: Any, row: Any) -> Any:
    """Add to the row at ``row`` what ``words`` * 64 elements of three sides add up to.

    At ``sides`` are their addresses.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[dtype_name.literal_value]
        _, table, count, out = args
        sides = [b.load(b.inttoptr(b.add(table, I64(8 * i)), I64.as_pointer())) for i in range(3)]
        stride = I64(lanes.word_bytes(dtype))
        zeros = ir.Constant(ir.VectorType(F64, _SUB), [0.0] * _SUB)
        sums = [cgutils.alloca_once_value(b, zeros) for _ in range(_LENGTHS)]
        counts = [cgutils.alloca_once_value(b, I64(0)) for _ in range(_COUNTS)]
        with cgutils.for_range(b, count) as loop:
            step = b.mul(loop.index, stride)
            bits = [lanes.load_bits(b, dtype, b.add(side, step)) for side in sides]
            live = b.or_(b.icmp_unsigned("!=", bits[2], bits[1]),
                         b.icmp_unsigned("!=", bits[2], bits[0]))  # fmt: skip
            if dtype.kind == "float":
                bad = [lanes.nonfinite(b, dtype, side) for side in bits]
                bad[0] = b.or_(b.or_(bad[0], bad[1]), bad[2])
                _count(b, counts[2], bad[0])
                live = b.and_(live, b.not_(bad[0]))
            # what stays, and is where it began, adds nothing: mostly whole words of it
            with b.if_then(b.icmp_unsigned("!=", b.bitcast(live, I64), I64(0))):
                _add_word(b, dtype, bits, live, sums, counts)
        for position, total in enumerate(sums):
            _add_up(b, b.inttoptr(b.add(out, I64(8 * position)), F64.as_pointer()), b.load(total))
        for position, counter in enumerate(counts, _LENGTHS):
            slot = b.inttoptr(b.add(out, I64(8 * position)), I64.as_pointer())
            b.store(b.add(b.load(slot), b.load(counter)), slot)
        return context.get_dummy_value()

    return types.void(dtype_name, *[types.int64] * 3), generate


def _add_word(
    b: Any, dtype: DType, bits: list[Value], live: Value, sums: list[Value], counts: list[Value]
) -> None:
    """One word of elements, of which those that are not ``live`` are left out."""
    zero = splat(int_type(dtype.bits), 0)
    bits = [b.select(live, side, zero) for side in bits]
    if dtype.kind == "float":
        values = [lanes.to_float(b, dtype, side) for side in bits]

        def above(x: int, y: int) -> Value:
            return b.fcmp_ordered(">", values[x], values[y])

        wide = [v if dtype.bits == 64 else b.fpext(v, vector(F64)) for v in values]
        lengths = [b.fsub(wide[2], wide[1]), b.fsub(wide[2], wide[0])]
    else:
        compare = b.icmp_signed if dtype.kind == "int" else b.icmp_unsigned

        def above(x: int, y: int) -> Value:
            return compare(">", bits[x], bits[y])

        # the exact distance: 2**53 and 2**53 + 1 differ by one
        lengths = [b.uitofp(lanes.distance(b, dtype, bits[2], bits[side]), vector(F64))
                   for side in (1, 0)]  # fmt: skip
    for total, length in zip(sums, lengths, strict=True):
        size = b.and_(b.bitcast(length, vector(I64)), splat(I64, (1 << 63) - 1))
        value = b.load(total)
        for part in _parts(b, b.bitcast(size, vector(F64))):
            value = b.fadd(value, part)
        b.store(value, total)
    up, down, was_up, was_down = above(2, 1), above(1, 2), above(1, 0), above(0, 1)
    _count(b, counts[0], b.or_(b.and_(up, was_up), b.and_(down, was_down)))
    _count(b, counts[1], b.or_(b.and_(up, was_down), b.and_(down, was_up)))


def _count(b: Any, counter: Value, flags: Value) -> None:
    b.store(b.add(b.load(counter), b.ctpop(b.bitcast(flags, I64))), counter)


def _parts(b: Any, value: Value) -> list[Value]:
    undefined = ir.Constant(vector(F64), ir.Undefined)
    kind = ir.VectorType(lanes.I32, _SUB)
    return [
        b.shuffle_vector(value, undefined, ir.Constant(kind, list(range(i, i + _SUB))))
        for i in range(0, LANES, _SUB)
    ]


def _add_up(b: Any, slot: Value, value: Value) -> None:
    """Add the lanes of a sum, from the first on, to what a slot holds."""
    total = b.extract_element(value, lanes.I32(0))
    for i in range(1, _SUB):
        total = b.fadd(total, b.extract_element(value, lanes.I32(i)))
    b.store(b.fadd(b.load(slot), total), slot)


def paths_kernel(dtype_name: str) -> Callable[..., None]:
    """Adds what three sides add up to, job by job; see the ABI."""
    dtype = DTYPES[dtype_name]
    stride, width = lanes.word_bytes(dtype), dtype.bits // 8
    room = LANES * 8

    def paths(jobs: int, count: int, scratch: int) -> None:
        mode = enter_default_mode()
        sides, ends = scratch + 3 * room, scratch + 3 * room + 24
        for i in range(3):
            store_word(ends + 8 * i, scratch + i * room)
        for j in range(count):
            job = jobs + j * (8 * PATHS_COLUMNS)
            for i in range(3):
                store_word(sides + 8 * i, load_word(job + 8 * (PATHS_SIDES + i)))
            left = load_word(job + 8 * PATHS_ELEMENTS)
            position = load_word(job + 8 * PATHS_POSITION)
            out = load_word(job + 8 * PATHS_OUT)
            while left > 0:
                elements = PATHS_BLOCK - position % PATHS_BLOCK
                if elements > left:
                    elements = left
                words = elements // LANES
                add_paths(dtype_name, sides, words, out)
                whole = words * stride
                ragged = elements * width - whole
                if ragged:  # the last word of a tensor; what follows it in scratch stays zero
                    for i in range(3):
                        source = load_word(sides + 8 * i) + whole
                        for k in range(ragged):
                            copy_byte(scratch + i * room + k, source + k)
                    add_paths(dtype_name, ends, 1, out)
                    for i in range(3):
                        for k in range(ragged):
                            store_byte(scratch + i * room + k, 0)
                for i in range(3):
                    store_word(sides + 8 * i, load_word(sides + 8 * i) + elements * width)
                position += elements
                left -= elements
        leave_default_mode(mode)

    return paths
