"""Gathering the marked bits or bytes of 64 to the front, and spreading them out again.

x86 has instructions for it (BMI2, AVX-512 VBMI2); LLVM has no general form of them, so everywhere
else, and on the AMD processors whose microcode takes a hundred cycles for one, loops do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.lanes import I1, I8, I64, Value
from ckdiff.kernels.numbaview import has, machine

_BYTES = ir.VectorType(I8, LANES)
_FLAGS = ir.VectorType(I1, LANES)
#: AMD's cores before Zen 3
_SLOW_BMI2 = ("bdver4", "znver1", "znver2")


class Moves(NamedTuple):
    """The four operations."""

    #: (bits, mask) -> the bits under the mask, moved to the low end; ``bits`` has no others
    gather_bits: Callable[..., Any]
    #: (bits, mask) -> the lowest bits, moved under the mask
    spread_bits: Callable[..., Any]
    #: (source, mask, target): the marked of 64 bytes, moved to the front; may write 64
    gather_bytes: Callable[..., Any]
    #: (source, mask, target): the next bytes of source, moved to the marked places; may read 64
    spread_bytes: Callable[..., Any]


def moves(*, portable: bool = False) -> Moves:
    """The operations as the machine does them best that is compiled for, or as every one can."""
    slow = portable or machine()[1] in _SLOW_BMI2
    bits = (_pext, _pdep)
    if slow or not has("bmi2"):
        bits = (_gather_bits, _spread_bits)
    whole = (_compress, _expand)
    if portable or not has("avx512vbmi2"):
        whole = (_gather_bytes, _spread_bytes)
    return Moves(*bits, *whole)


def _declared(b: Any, name: str, result: Any, *arguments: Any) -> Value:
    kind = ir.FunctionType(result, arguments)
    return cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}")


@intrinsic  # type: ignore[untyped-decorator]
def _pext(typing: Any, bits: Any, mask: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.call(_declared(b, "bmi.pext.64", I64, I64, I64), args)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pdep(typing: Any, bits: Any, mask: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return b.call(_declared(b, "bmi.pdep.64", I64, I64, I64), args)

    return types.uint64(types.uint64, types.uint64), generate


def _move_bytes(name: str) -> Any:
    def typed(typing: Any, source: Any, mask: Any, target: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
            # in registers: the forms that go to memory take twice as long
            source, mask, target = args
            value = b.load(b.inttoptr(source, _BYTES.as_pointer()), align=1)
            place = b.inttoptr(target, _BYTES.as_pointer())
            move = _declared(b, f"avx512.mask.{name}.v{LANES}i8", _BYTES, _BYTES, _BYTES, _FLAGS)
            kept = b.load(place, align=1) if name == "expand" else ir.Constant(_BYTES, None)
            b.store(b.call(move, [value, kept, b.bitcast(mask, _FLAGS)]), place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64, types.int64), generate

    return intrinsic(typed)


_compress = _move_bytes("compress")
_expand = _move_bytes("expand")


def _for_each_one(
    b: Any, word: Value, body: Callable[[Value], None], more: Callable[[], Value] | None = None
) -> None:
    """Call ``body`` with each set bit of an i64, as an i64 with that bit only, from the lowest.

    Stops before one for which ``more`` gives no true i1.
    """
    left = cgutils.alloca_once_value(b, word)
    head, inner, after = (b.append_basic_block(f"ones.{part}") for part in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    value = b.load(left)
    going = b.icmp_unsigned("!=", value, I64(0))
    b.cbranch(b.and_(going, more()) if more else going, inner, after)
    b.position_at_end(inner)
    body(b.and_(value, b.neg(value)))
    b.store(b.and_(value, b.sub(value, I64(1))), left)
    b.branch(head)
    b.position_at_end(after)


@intrinsic  # type: ignore[untyped-decorator]
def _gather_bits(typing: Any, bits: Any, mask: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        found = cgutils.alloca_once_value(b, I64(0))

        def add(one: Value) -> None:
            rank = b.ctpop(b.and_(args[1], b.sub(one, I64(1))))
            b.store(b.or_(b.load(found), b.shl(I64(1), rank)), found)

        _for_each_one(b, args[0], add)
        return b.load(found)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _spread_bits(typing: Any, bits: Any, mask: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        left = cgutils.alloca_once_value(b, args[0])
        found = cgutils.alloca_once_value(b, I64(0))

        def add(one: Value) -> None:
            bits = b.load(left)
            taken = b.and_(one, b.neg(b.and_(bits, I64(1))))
            b.store(b.or_(b.load(found), taken), found)
            b.store(b.lshr(bits, I64(1)), left)

        # most words have few ones, often none
        _for_each_one(b, args[1], add, lambda: b.icmp_unsigned("!=", b.load(left), I64(0)))
        return b.load(found)

    return types.uint64(types.uint64, types.uint64), generate


def _move_one_by_one(*, gathering: bool) -> Any:
    def typed(typing: Any, source: Any, mask: Any, target: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
            source, mask, target = args
            packed = cgutils.alloca_once_value(b, target if gathering else source)

            def move(one: Value) -> None:
                lane, place = b.cttz(one, I1(1)), b.load(packed)
                ends = (b.add(source, lane), place) if gathering else (place, b.add(target, lane))
                origin, to = (b.inttoptr(end, I8.as_pointer()) for end in ends)
                b.store(b.load(origin), to)
                b.store(b.add(place, I64(1)), packed)

            _for_each_one(b, mask, move)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64, types.int64), generate

    return intrinsic(typed)


_gather_bytes = _move_one_by_one(gathering=True)
_spread_bytes = _move_one_by_one(gathering=False)
