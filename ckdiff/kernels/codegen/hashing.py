"""Content hashes in the driver's loop: calling the library's XXH3, and the weights of units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_jitable

from ckdiff.kernels.codegen.lanes import I64, Value
from ckdiff.kernels.codegen.words import load_word, store_word


@intrinsic  # type: ignore[untyped-decorator]
def call_xxh3(typing: Any, function: Any, address: Any, size: Any) -> Any:
    """(low, high) of XXH3_128bits over ``size`` bytes at ``address``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        # A struct of two 64-bit integers comes back in two registers on x86-64 and AArch64, which
        # is what LLVM does with the same literal struct.
        pair = ir.LiteralStructType([I64, I64])
        pointer = b.inttoptr(args[0], ir.FunctionType(pair, [I64, I64]).as_pointer())
        result = b.call(pointer, args[1:])
        halves = [b.extract_value(result, i) for i in range(2)]
        return context.make_tuple(b, signature.return_type, halves)

    pair_type = types.UniTuple(types.uint64, 2)  # type: ignore[attr-defined]
    return pair_type(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def weight(typing: Any, unit: Any) -> Any:
    """What :func:`ckdiff.kernels.hashing.weight` gives, on uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        x = b.add(args[0], I64(0x9E3779B97F4A7C15))
        x = b.mul(b.xor(x, b.lshr(x, I64(30))), I64(0xBF58476D1CE4E5B9))
        x = b.mul(b.xor(x, b.lshr(x, I64(27))), I64(0x94D049BB133111EB))
        return b.or_(b.xor(x, b.lshr(x, I64(31))), I64(1))

    return types.uint64(types.uint64), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator]
def add_units(data: int, size: int, first: int, unit_bytes: int, sums: int, xxh3: int) -> None:
    """Add the units of some bytes to a content hash."""
    low, high = load_word(sums), load_word(sums + 8)
    done = 0
    unit = first
    while done < size:
        step = size - done
        if step > unit_bytes:
            step = unit_bytes
        factor = weight(types.uint64(unit))
        digest = call_xxh3(xxh3, data + done, step)
        low += types.int64(digest[0] * factor)
        high += types.int64(digest[1] * factor)
        done += step
        unit += 1
    store_word(sums, low)
    store_word(sums + 8, high)


def hash_kernel() -> Callable[..., None]:
    """Adds the units of some bytes to a content hash; see the ABI."""

    def add(data: int, size: int, first: int, unit_bytes: int, sums: int, xxh3: int) -> None:
        add_units(data, size, first, unit_bytes, sums, xxh3)

    return add
