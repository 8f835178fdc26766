"""The statistics kernel: sums over one block, and a histogram of how far elements moved.

Sums are taken over 16 float64 lanes that are added up in a fixed order at the end of the block,
whatever the machine's vectors are, so that a result does not depend on where it was computed.
Elements that are infinite or NaN on either side are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.compare import changed_word
from ckdiff.kernels.codegen.lanes import F64, I64, Value, int_type, splat, vector
from ckdiff.kernels.codegen.words import load_word, lowest_one, store_word
from ckdiff.kernels.statistics import HISTOGRAM, MAX_ABS, NONFINITE, SIGN_FLIPS

_SUMS = 6
_SUB = 16


def _as_double(b: Any, dtype: DType, bits: Value) -> Value:
    if dtype.kind == "float":
        value = lanes.to_float(b, dtype, bits)
        return value if dtype.bits == 64 else b.fpext(value, vector(F64))
    convert = b.sitofp if dtype.kind == "int" else b.uitofp
    return convert(bits, vector(F64))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_block(typing: Any, dtype_name: Any, x: Any, y: Any, words: Any, row: Any) -> Any:
    """Add the sums and sign flips of ``words`` * 64 elements to the row at ``row``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[dtype_name.literal_value]
        _, base, tuned, count, out = args
        stride = I64(lanes.word_bytes(dtype))
        sub = ir.VectorType(F64, _SUB)
        sums = [cgutils.alloca_once_value(b, ir.Constant(sub, [0.0] * _SUB)) for _ in range(_SUMS)]
        flips = cgutils.alloca_once_value(b, I64(0))
        skipped = cgutils.alloca_once_value(b, I64(0))
        with cgutils.for_range(b, count) as loop:
            step = b.mul(loop.index, stride)
            left = lanes.load_bits(b, dtype, b.add(base, step))
            right = lanes.load_bits(b, dtype, b.add(tuned, step))
            if dtype.kind == "float":
                bad = b.or_(lanes.nonfinite(b, dtype, left), lanes.nonfinite(b, dtype, right))
                zero = splat(int_type(dtype.bits), 0)
                left, right = b.select(bad, zero, left), b.select(bad, zero, right)
                _count(b, skipped, bad)
            if dtype.kind != "uint":
                _count(b, flips, _sign_flips(b, dtype, left, right))
            va, vb = _as_double(b, dtype, left), _as_double(b, dtype, right)
            if dtype.kind == "float":
                delta = b.fsub(va, vb)
            else:  # the exact integer distance: 2**53 and 2**53 + 1 differ by one
                delta = b.uitofp(lanes.distance(b, dtype, left, right), vector(F64))
            wide = b.and_(b.bitcast(delta, vector(I64)), splat(I64, (1 << 63) - 1))
            delta = b.bitcast(wide, vector(F64))
            terms = [delta, b.fmul(delta, delta), delta, b.fmul(va, va), b.fmul(vb, vb),
                     b.fmul(va, vb)]  # fmt: skip
            for position, (total, term) in enumerate(zip(sums, terms, strict=True)):
                value = b.load(total)
                for part in _parts(b, term):
                    if position == MAX_ABS:
                        value = b.select(b.fcmp_ordered(">", part, value), part, value)
                    else:
                        value = b.fadd(value, part)
                b.store(value, total)
        for position, total in enumerate(sums):
            value = b.load(total)
            scalar = b.extract_element(value, lanes.I32(0))
            for i in range(1, _SUB):
                part = b.extract_element(value, lanes.I32(i))
                scalar = _join(b, position, scalar, part)
            slot = b.inttoptr(b.add(out, I64(8 * position)), F64.as_pointer())
            b.store(_join(b, position, b.load(slot), scalar), slot)
        for position, counter in ((SIGN_FLIPS, flips), (NONFINITE, skipped)):
            slot = b.inttoptr(b.add(out, I64(8 * position)), I64.as_pointer())
            b.store(b.add(b.load(slot), b.load(counter)), slot)
        return context.get_dummy_value()

    sig = types.void(dtype_name, types.int64, types.int64, types.int64, types.int64)
    return sig, generate


def _count(b: Any, counter: Value, flags: Value) -> None:
    b.store(b.add(b.load(counter), b.ctpop(b.bitcast(flags, I64))), counter)


def _sign_flips(b: Any, dtype: DType, x: Value, y: Value) -> Value:
    zero = splat(int_type(dtype.bits), 0)
    flipped = b.icmp_signed("<", b.xor(x, y), zero)
    if dtype.kind == "float":
        x, y = lanes.magnitude(b, dtype, x), lanes.magnitude(b, dtype, y)
    nonzero = b.and_(b.icmp_unsigned("!=", x, zero), b.icmp_unsigned("!=", y, zero))
    return b.and_(flipped, nonzero)


def _parts(b: Any, value: Value) -> list[Value]:
    undefined = ir.Constant(vector(F64), ir.Undefined)
    return [
        b.shuffle_vector(
            value, undefined, ir.Constant(ir.VectorType(lanes.I32, _SUB), list(range(i, i + _SUB)))
        )
        for i in range(0, LANES, _SUB)
    ]


def _join(b: Any, position: int, left: Value, right: Value) -> Value:
    if position == MAX_ABS:
        return b.select(b.fcmp_ordered(">", right, left), right, left)
    return b.fadd(left, right)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def element_bucket(typing: Any, dtype_name: Any, x: Any, y: Any) -> Any:
    """Histogram bucket of the single elements at ``x`` and ``y``; -1 where one is not finite."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[dtype_name.literal_value]
        lane = int_type(dtype.bits)
        left, right = (
            b.load(b.inttoptr(address, lane.as_pointer()), align=1) for address in args[1:]
        )
        # one lane's worth of the vector code; LLVM drops the other 63
        one = [b.insert_element(splat(lane, 0), value, lanes.I32(0)) for value in (left, right)]
        apart = b.extract_element(lanes.distance(b, dtype, *one), lanes.I32(0))
        apart = b.zext(apart, I64) if dtype.bits < 64 else apart
        bucket = b.sub(I64(64), b.ctlz(apart, ir.Constant(lanes.I1, 0)))
        if dtype.kind == "float":
            bad = b.or_(*(lanes.nonfinite(b, dtype, value) for value in one))
            bucket = b.select(b.extract_element(bad, lanes.I32(0)), I64(-1), bucket)
        return bucket

    return types.int64(dtype_name, types.int64, types.int64), generate


def statistics_kernel(dtype_name: str) -> Callable[..., None]:
    """Adds one block to a statistics row; compiled by :mod:`ckdiff.kernels.codegen`."""
    dtype = DTYPES[dtype_name]
    stride, width = lanes.word_bytes(dtype), dtype.bits // 8
    exact = f"W{dtype.bits}:exact"

    def statistics(base: int, tuned: int, words: int, row: int) -> None:
        add_block(dtype_name, base, tuned, words, row)
        for i in range(words):
            x, y = base + i * stride, tuned + i * stride
            word = changed_word(exact, x, y, 0)
            while word:
                lane = lowest_one(word) * width
                word &= word - types.uint64(1)
                bucket = element_bucket(dtype_name, x + lane, y + lane)
                if bucket >= 0:
                    slot = row + 8 * (HISTOGRAM + bucket)
                    store_word(slot, load_word(slot) + 1)

    return statistics
