"""Counting by cell: how many elements of each binade there are, and how many of them changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.binades import WAYS, bins
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.lanes import I1, I16, I64, Value, int_type, splat, vector
from ckdiff.kernels.codegen.words import copy_byte, load_word, lowest_one, store_word


def _binade(b: Any, dtype: DType, bits: Value) -> Value:
    """The bin of each lane, as 16-bit lanes: see :func:`ckdiff.kernels.binades.bins`."""
    lane = int_type(lanes.lane_bits(dtype))
    zero, one = splat(lane, 0), splat(lane, 1)
    if dtype.kind == "float":
        size = lanes.magnitude(b, dtype, bits)
        number = b.add(b.lshr(size, splat(lane, dtype.mantissa)), one)
        if dtype.special == "fnuz":  # its only NaN has the bits of a negative zero
            bad = lanes.nonfinite(b, dtype, bits)
            number = b.select(bad, splat(lane, 1 << dtype.exponent), number)
            size = b.select(bad, one, size)
        number = b.select(b.icmp_unsigned("==", size, zero), zero, number)
    elif dtype.kind in ("int", "uint"):
        size = bits
        if dtype.kind == "int":
            size = b.select(b.icmp_signed("<", bits, zero), b.sub(zero, bits), bits)
        name = f"llvm.ctlz.v{LANES}i{lane.width}"
        kind = ir.FunctionType(vector(lane), [vector(lane), I1])
        leading = b.call(cgutils.get_or_insert_function(b.module, kind, name), [size, I1(0)])
        number = b.sub(splat(lane, dtype.bits), leading)
    else:
        number = zero
    if lane.width > 16:
        return b.trunc(number, vector(I16))
    return b.zext(number, vector(I16)) if lane.width < 16 else number


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _store_bins(typing: Any, dtype_name: Any, address: Any, out: Any) -> Any:
    """The bins of the 64 elements at ``address``, as 64 uint16 at ``out``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype = DTYPES[dtype_name.literal_value]
        found = _binade(b, dtype, lanes.load_bits(b, dtype, args[1]))
        b.store(found, b.inttoptr(args[2], vector(I16).as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(dtype_name, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _load_bin(typing: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.zext(b.load(b.inttoptr(args[0], I16.as_pointer()), align=2), I64)

    return types.int64(types.int64), generate


def cells_kernel(dtype_name: str) -> Callable[..., None]:
    """Adds one span of a tensor to its cells; see the ABI."""
    dtype = DTYPES[dtype_name]
    stride, bits, width = lanes.word_bytes(dtype), dtype.bits, bins(dtype)

    def cells(base: int, elements: int, table: int, stores: int, out: int, scratch: int) -> None:
        # out: (stores + 1) x WAYS x width int64: first all elements, then each mask's
        places = scratch
        ragged = scratch + 2 * LANES
        words = (elements + LANES - 1) // LANES
        for i in range(words):
            source = base + i * stride
            lanes_here = elements - i * LANES
            if lanes_here < LANES:
                for at in range(lanes_here * bits // 8):
                    copy_byte(ragged + at, source + at)
                source = ragged
            else:
                lanes_here = LANES
            _store_bins(dtype_name, source, places)
            for lane in range(lanes_here):
                slot = out + 8 * ((lane & (WAYS - 1)) * width + _load_bin(places + 2 * lane))
                store_word(slot, load_word(slot) + 1)
            for k in range(stores):
                word = types.uint64(load_word(load_word(table + 8 * k) + 8 * i))
                mine = out + 8 * WAYS * width * (k + 1)
                while word:
                    lane = lowest_one(word)
                    word &= word - types.uint64(1)
                    slot = mine + 8 * ((lane & (WAYS - 1)) * width + _load_bin(places + 2 * lane))
                    store_word(slot, load_word(slot) + 1)

    return cells
