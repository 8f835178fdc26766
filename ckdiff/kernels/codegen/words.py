"""Reading and writing 64-bit words, and counting their bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.codegen.lanes import I1, I8, I32, I64, Value


@intrinsic  # type: ignore[untyped-decorator]
def load_word(typing: Any, address: Any) -> Any:
    """The int64 at ``address``, any alignment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.load(b.inttoptr(args[0], I64.as_pointer()), align=1)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_word(typing: Any, address: Any, value: Any) -> Any:
    """Write an int64 or uint64 to ``address``, any alignment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(args[1], b.inttoptr(args[0], I64.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def quotient(typing: Any, number: Any, by: Any) -> Any:
    """number // by, neither negative and ``by`` not zero: numba's own would raise, and a kernel
    that can raise refers to the interpreter.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.udiv(*args)

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def ones(typing: Any, word: Any) -> Any:
    """Population count of a uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def lowest_one(typing: Any, word: Any) -> Any:
    """Position of the lowest set bit of a non-zero uint64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.cttz(args[0], ir.Constant(I1, 1))

    return types.int64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_byte(typing: Any, target: Any, source: Any) -> Any:
    """Write the byte at ``source`` to ``target``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        to, origin = (b.inttoptr(value, I8.as_pointer()) for value in args)
        b.store(b.load(origin), to)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_byte(typing: Any, address: Any) -> Any:
    """The byte at ``address``, as an int64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.zext(b.load(b.inttoptr(args[0], I8.as_pointer())), I64)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store_byte(typing: Any, address: Any, value: Any) -> Any:
    """Write the lowest byte of an int64 or uint64 to ``address``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        b.store(b.trunc(args[1], I8), b.inttoptr(args[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_lines(typing: Any, address: Any, size: Any) -> Any:
    """Ask for the cache lines of [address, address + size); never faults."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pointer_type = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer_type, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        lines = b.lshr(b.add(args[1], I64(63)), I64(6))
        with cgutils.for_range(b, lines) as loop:
            line = b.inttoptr(b.add(args[0], b.shl(loop.index, I64(6))), pointer_type)
            b.call(prefetch, [line, I32(0), I32(2), I32(1)])  # read, second-level cache, data
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
