"""Small symbols two to a byte, the large ones by themselves, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import LANES, LARGE_HALF
from ckdiff.kernels.codegen.lanes import I8, I16, I64, Value, splat, vector
from ckdiff.kernels.codegen.scatter import moves
from ckdiff.kernels.codegen.steps import clear_bytes
from ckdiff.kernels.codegen.words import load_byte, lowest_one, ones, store_byte

_PAIRS = LANES // 2  # bytes of 64 symbols
_HALVES = ir.VectorType(I16, _PAIRS)
_PACKED = ir.VectorType(I8, _PAIRS)


def _halves(value: int) -> Value:
    return ir.Constant(_HALVES, [value] * _PAIRS)


@intrinsic  # type: ignore[untyped-decorator]
def _pack(typing: Any, symbols: Any, out: Any) -> Any:
    """Write 64 symbols as 32 bytes; uint64: those that are too large for half a byte."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        found = b.load(b.inttoptr(args[0], vector(I8).as_pointer()), align=1)
        largest = splat(I8, LARGE_HALF)
        large = b.icmp_unsigned(">=", found, largest)
        both = b.bitcast(b.select(large, largest, found), _HALVES)
        both = b.or_(both, b.lshr(both, _halves(4)))
        b.store(b.trunc(both, _PACKED), b.inttoptr(args[1], _PACKED.as_pointer()), align=1)
        return b.bitcast(large, I64)

    return types.uint64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _unpack(typing: Any, pairs: Any, out: Any) -> Any:
    """Write the 64 halves of 32 bytes; uint64: those that stand for a large symbol."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        found = b.load(b.inttoptr(args[0], _PACKED.as_pointer()), align=1)
        both = b.zext(found, _HALVES)
        both = b.and_(b.or_(both, b.shl(both, _halves(4))), _halves(0x0F0F))
        symbols = b.bitcast(both, vector(I8))
        b.store(symbols, b.inttoptr(args[1], vector(I8).as_pointer()), align=1)
        return b.bitcast(b.icmp_unsigned("==", symbols, splat(I8, LARGE_HALF)), I64)

    return types.uint64(types.int64, types.int64), generate


def pair_kernel() -> Callable[..., int]:
    """Writes symbols as pairs and a rest; gives the size of the rest."""
    gather_bytes = moves().gather_bytes

    def pair(symbols: int, count: int, out: int, rest: int) -> int:
        clear_bytes(symbols + count)  # so that the last half of the last byte is always 0
        used = 0
        for i in range(0, count, LANES):
            large = _pack(symbols + i, out + (i >> 1))
            gather_bytes(symbols + i, large, rest + used)
            used += ones(large)
        return used

    return pair


def unpair_kernel() -> Callable[..., int]:
    """Makes the symbols again; how much of the rest that takes, or -1 where it is too short."""

    def unpair(pairs: int, count: int, rest: int, size: int, out: int) -> int:
        one = types.uint64(1)
        used = 0
        i = 0
        while i < count:
            large = types.uint64(0)
            if count - i >= LANES:
                large = _unpack(pairs + (i >> 1), out + i)
            else:  # nothing is read past the end of the pairs
                for k in range(count - i):
                    half = (load_byte(pairs + ((i + k) >> 1)) >> ((k & 1) << 2)) & LARGE_HALF
                    store_byte(out + i + k, half)
                    if half == LARGE_HALF:
                        large |= one << types.uint64(k)
            if used + ones(large) > size:
                return -1
            while large:
                store_byte(out + i + lowest_one(large), load_byte(rest + used))
                large &= large - one
                used += 1
            i += LANES
        return used

    return unpair
