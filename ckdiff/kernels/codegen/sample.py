"""Random keys of elements, and comparing them: the kernels behind random masks.

Element i of a stream has a 64-bit key that depends on the stream and on i alone: half a block of
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
Elements i and i + 32 of a mask word share a block, so that its two halves are two vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.codegen.lanes import I64, Value, spread
from ckdiff.kernels.codegen.words import load_word, lowest_one, ones, store_word

_LANES = 16  # blocks worked on side by side: no result depends on it
_KEYS = ir.VectorType(I64, _LANES)
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = (1 << 32) - 1


def _constant(value: int) -> Any:
    return ir.Constant(_KEYS, [value] * _LANES)


def _halves(b: Any, word: Value) -> tuple[Value, Value]:
    return b.and_(word, I64(_LOW)), b.lshr(word, I64(32))


def _philox(b: Any, key: Value, high: Value, counter: Value) -> tuple[Value, Value]:
    """Both 64-bit halves of the blocks of a vector of counters.

    The 32-bit words of a block lie in 64-bit lanes, whose products are one instruction.
    """
    low = _constant(_LOW)
    words = [b.and_(counter, low), b.lshr(counter, _constant(32))]
    words += [spread(b, half, _LANES) for half in _halves(b, high)]
    keys = list(_halves(b, key))
    for _ in range(_ROUNDS):
        one = b.mul(words[0], _constant(_MULTIPLIERS[0]))
        other = b.mul(words[2], _constant(_MULTIPLIERS[1]))
        mixed = [
            b.xor(b.xor(b.lshr(product, _constant(32)), word), spread(b, half, _LANES))
            for product, word, half in zip((other, one), (words[1], words[3]), keys, strict=True)
        ]
        words = [mixed[0], b.and_(other, low), mixed[1], b.and_(one, low)]
        keys = [b.and_(b.add(k, I64(w)), I64(_LOW)) for k, w in zip(keys, _WEYL, strict=True)]
    first, second = (b.or_(words[i], b.shl(words[i + 1], _constant(32))) for i in (0, 2))
    return first, second


@intrinsic  # type: ignore[untyped-decorator]
def _store_keys(typing: Any, key: Any, high: Any, word: Any, out: Any) -> Any:
    """The keys of the 64 elements of mask word ``word``, as 64 uint64 at ``out``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        key, high, word, out = args
        for at in range(0, 32, _LANES):
            lanes = ir.Constant(_KEYS, [at + lane for lane in range(_LANES)])
            counter = b.add(spread(b, b.shl(word, I64(5)), _LANES), lanes)
            for half, keys in enumerate(_philox(b, key, high, counter)):
                to = b.add(out, I64(8 * (32 * half + at)))
                b.store(keys, b.inttoptr(to, _KEYS.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _at_most(typing: Any, keys: Any, limit: Any) -> Any:
    """One bit for each of the 64 keys at ``keys``: whether it is at most ``limit``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        keys, limit = args
        limits, found = spread(b, limit, _LANES), I64(0)
        for at in range(0, 64, _LANES):
            lanes = b.load(b.inttoptr(b.add(keys, I64(8 * at)), _KEYS.as_pointer()), align=8)
            bits = b.bitcast(b.icmp_unsigned("<=", lanes, limits), ir.IntType(_LANES))
            found = b.or_(found, b.shl(b.zext(bits, I64), I64(at)))
        return found

    return types.uint64(types.int64, types.uint64), generate


def draw_kernel() -> Callable[..., int]:
    """Sets the bits of the elements whose keys are at most a limit; see the ABI."""

    def draw(
        key: int, high: int, word: int, elements: int, limit: int, mask: int, scratch: int
    ) -> int:
        count = 0
        words = (elements + 63) >> 6
        for i in range(words):
            _store_keys(key, high, word + i, scratch)
            bits = _at_most(scratch, limit)
            left = elements - (i << 6)
            if left < 64:
                cut = types.uint64(64 - left)
                bits = (bits << cut) >> cut
            store_word(mask + (i << 3), bits)
            count += ones(bits)
        return count

    return draw


def near_kernel() -> Callable[..., int]:
    """Counts the keys at most ``low`` and collects those above it, up to ``limit``; see the ABI."""

    def near(
        key: int, high: int, word: int, elements: int, low: int, limit: int, out: int, room: int,
        scratch: int,
    ) -> int:  # fmt: skip
        below = 0
        found = 0
        words = (elements + 63) >> 6
        for i in range(words):
            _store_keys(key, high, word + i, scratch)
            under = _at_most(scratch, low)
            bits = _at_most(scratch, limit) & ~under
            left = elements - (i << 6)
            if left < 64:
                cut = types.uint64(64 - left)
                under = (under << cut) >> cut
                bits = (bits << cut) >> cut
            below += ones(under)
            while bits:
                lane = lowest_one(bits)
                bits &= bits - types.uint64(1)
                found += 1
                if found <= room:
                    store_word(out + (found << 3), load_word(scratch + (lane << 3)))
        store_word(out, below)
        return found

    return near
