"""Whole units of both sides, compared and hashed in one pass: of values that were made just now.

XXH3 of a unit takes 64 bytes at a time, a *stripe*, into eight sums. The library's is called for
what memory delivers (:mod:`ckdiff.kernels.codegen.hashing`); for what is in the first-level cache
two sides that take turns, and no calls, are nearly twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.hashing import weight
from ckdiff.kernels.codegen.lanes import I16, I32, I64, Value
from ckdiff.kernels.codegen.vectors import VECTOR, constant
from ckdiff.kernels.codegen.words import load_word, ones, store_word
from ckdiff.kernels.hashing import SECRET, START, UNIT, starts

_BYTES = 4 * UNIT
_STRIPE = 64  # bytes
_BLOCK = 16  # stripes, after which the sums are scrambled
_I128 = ir.IntType(128)


def _secret(first: int) -> Value:
    """Eight words of the secret."""
    words = [SECRET[first + 8 * i : first + 8 * i + 8] for i in range(8)]
    return ir.Constant(VECTOR, [int.from_bytes(word, "little") for word in words])


class _Side:
    """The sums of one side: of products, and of stripes as they are, whose words are exchanged in
    pairs only at the end.
    """

    def __init__(self, b: Any, address: Value) -> None:
        self._b, self._address = b, address
        self._products = ir.Constant(VECTOR, list(START))
        self._plain: Value = constant(0)

    def take(self, at: int, secret: Value) -> Value:
        """Add the stripe ``at`` some byte, and give it."""
        b = self._b
        place = b.inttoptr(b.add(self._address, I64(at)), VECTOR.as_pointer())
        stripe = b.load(place, align=1)
        mixed = b.xor(stripe, secret)
        low, high = b.and_(mixed, constant(0xFFFFFFFF)), b.lshr(mixed, constant(32))
        self._products = b.add(self._products, b.mul(low, high))
        self._plain = b.add(self._plain, stripe)
        return stripe

    def fold(self) -> Value:
        """The sums."""
        b = self._b
        exchange = ir.Constant(ir.VectorType(I32, 8), [i ^ 1 for i in range(8)])
        self._products = b.add(self._products, b.shuffle_vector(self._plain, self._plain, exchange))
        self._plain = constant(0)
        return self._products

    def scramble(self) -> None:
        """After a block."""
        b, sums = self._b, self.fold()
        mixed = b.xor(b.xor(sums, b.lshr(sums, constant(47))), _secret(len(SECRET) - _STRIPE))
        factor = constant(START[7])
        low = b.mul(b.and_(mixed, constant(0xFFFFFFFF)), factor)
        high = b.mul(b.lshr(mixed, constant(32)), factor)
        self._products = b.add(low, b.shl(high, constant(32)))

    def digest(self) -> list[Value]:
        """(low, high)."""
        sums = self.fold()
        places = 11, len(SECRET) - _STRIPE - 11
        return [self._half(sums, *half) for half in zip(places, starts(_BYTES), strict=True)]

    def _half(self, sums: Value, first: int, start: int) -> Value:
        b = self._b
        mixed, total = b.xor(sums, _secret(first)), I64(start)
        for i in range(0, 8, 2):
            pair = [b.zext(b.extract_element(mixed, I32(i + k)), _I128) for k in range(2)]
            product = b.mul(*pair)
            high = b.trunc(b.lshr(product, _I128(64)), I64)
            total = b.add(total, b.xor(b.trunc(product, I64), high))
        total = b.xor(total, b.lshr(total, I64(37)))
        total = b.mul(total, I64(0x165667919E3779F9))
        return b.xor(total, b.lshr(total, I64(32)))


@intrinsic  # type: ignore[untyped-decorator]
def _unit(typing: Any, base: Any, tuned: Any, mask: Any) -> Any:
    """Compare a unit, write its bits to ``mask``, and give both digests: low, high, low, high."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        sides = [_Side(b, address) for address in args[:2]]
        count = _BYTES // _STRIPE
        single = ir.VectorType(I32, 16)
        for i in range(count):
            # the last stripe of all has a place in the secret of its own
            first = 8 * (i % _BLOCK) if i < count - 1 else len(SECRET) - _STRIPE - 7
            x, y = (b.bitcast(side.take(_STRIPE * i, _secret(first)), single) for side in sides)
            bits = b.bitcast(b.icmp_unsigned("!=", x, y), I16)
            b.store(bits, b.inttoptr(b.add(args[2], I64(2 * i)), I16.as_pointer()), align=1)
            if i % _BLOCK == _BLOCK - 1 and i < count - 1:
                for side in sides:
                    side.scramble()
        return context.make_tuple(
            b, signature.return_type, [half for side in sides for half in side.digest()]
        )

    four = types.UniTuple(types.uint64, 4)  # type: ignore[attr-defined]
    return four(types.int64, types.int64, types.int64), generate


def units_kernel() -> Callable[..., int]:
    """Compares and hashes whole units of 32-bit elements; see the ABI."""

    def units(base: int, tuned: int, count: int, first: int, mask: int, sums: int) -> int:
        base_low, base_high = load_word(sums), load_word(sums + 8)
        tuned_low, tuned_high = load_word(sums + 16), load_word(sums + 24)
        for i in range(count):
            factor = weight(types.uint64(first + i))
            found = _unit(base + i * _BYTES, tuned + i * _BYTES, mask + i * (UNIT // 8))
            base_low += types.int64(found[0] * factor)
            base_high += types.int64(found[1] * factor)
            tuned_low += types.int64(found[2] * factor)
            tuned_high += types.int64(found[3] * factor)
        store_word(sums, base_low)
        store_word(sums + 8, base_high)
        store_word(sums + 16, tuned_low)
        store_word(sums + 24, tuned_high)
        changed = 0
        for i in range(count * (UNIT // LANES)):
            changed += ones(types.uint64(load_word(mask + 8 * i)))
        return changed

    return units
