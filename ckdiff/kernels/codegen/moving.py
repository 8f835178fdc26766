"""Moving chosen elements of arrays: together into a compact array, and back to their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import JOB_COLUMNS, TILE_COLUMNS
from ckdiff.kernels.codegen.lanes import I8, I16, I32, I64, Value
from ckdiff.kernels.codegen.words import load_word, lowest_one

#: How many positions ahead memory is asked for. A core waits for few lines at a time, and for a
#: write it would ask only when the store leaves its buffer.
_AHEAD = 32


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _copy(typing: Any, width: Any, to: Any, source: Any) -> Any:
    """Copy the ``width`` bytes at ``source``, as one integer: no NaN is touched by that."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        kind = ir.IntType(8 * width.literal_value).as_pointer()
        value = b.load(b.inttoptr(args[2], kind), align=1)
        b.store(value, b.inttoptr(args[1], kind), align=1)
        return context.get_dummy_value()

    return types.void(width, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _clear(typing: Any, width: Any, to: Any) -> Any:
    """Set ``width`` bytes to zero."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        kind = ir.IntType(8 * width.literal_value)
        b.store(kind(0), b.inttoptr(args[1], kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(width, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _position(typing: Any, address: Any) -> Any:
    """The uint16 at ``address``, any alignment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.zext(b.load(b.inttoptr(args[0], I16.as_pointer()), align=1), I64)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _will_write(typing: Any, address: Any) -> Any:
    """Ask for the line at ``address``; the address may be anything."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(ask, [b.inttoptr(args[0], pointer), I32(1), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def gather_kernel(kind: str) -> Callable[[int, int], None]:
    """Takes the chosen elements of two arrays; the kind is the bytes of an element."""
    width = int(kind)

    def gather(jobs: int, count: int) -> None:
        for j in range(count):
            job = jobs + 8 * JOB_COLUMNS * j
            whole, other = load_word(job), load_word(job + 8)
            to, beside = load_word(job + 16), load_word(job + 24)
            # both compact arrays are filled in step: one offset serves them
            beside -= to
            other -= whole
            table, places = load_word(job + 32), load_word(job + 40)
            end = to
            for k in range(load_word(job + 48)):
                tile = table + 8 * TILE_COLUMNS * k
                source = whole + width * load_word(tile)
                end = to + width * load_word(tile + 8)
                chosen = places + load_word(tile + 16)
                amount = load_word(tile + 24)
                for i in range(amount):
                    at = source + width * _position(chosen + 2 * i)
                    _copy(width, end, at)
                    _copy(width, end + beside, at + other)
                    end += width
                for i in range(-amount):
                    word = types.uint64(load_word(chosen + 8 * i))
                    first = source + 64 * width * i
                    while word:
                        at = first + width * lowest_one(word)
                        word &= word - types.uint64(1)
                        _copy(width, end, at)
                        _copy(width, end + beside, at + other)
                        end += width
            for _ in range(load_word(job + 56)):
                _clear(width, end)
                _clear(width, end + beside)
                end += width

    return gather


def scatter_kernel(kind: str) -> Callable[[int, int], None]:
    """Puts elements back to their places; the kind is the bytes of an element."""
    width = int(kind)

    def scatter(jobs: int, count: int) -> None:
        for j in range(count):
            job = jobs + 8 * JOB_COLUMNS * j
            whole, source = load_word(job), load_word(job + 16)
            table, places = load_word(job + 32), load_word(job + 40)
            for k in range(load_word(job + 48)):
                tile = table + 8 * TILE_COLUMNS * k
                target = whole + width * load_word(tile)
                at = source + width * load_word(tile + 8)
                chosen = places + load_word(tile + 16)
                amount = load_word(tile + 24)
                for i in range(amount):
                    # past a tile's end stand other positions, and room is left after the last
                    _will_write(target + width * _position(chosen + 2 * (i + _AHEAD)))
                    _copy(width, target + width * _position(chosen + 2 * i), at)
                    at += width
                for i in range(-amount):
                    word = types.uint64(load_word(chosen + 8 * i))
                    first = target + 64 * width * i
                    while word:
                        _copy(width, first + width * lowest_one(word), at)
                        word &= word - types.uint64(1)
                        at += width

    return scatter
