"""Taking elements from one array where a mask has ones, and from another where it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.lanes import I1, I64, Value, int_type, vector
from ckdiff.kernels.codegen.words import load_byte, load_word, ones, store_word


def _blended(b: Any, lane: Any, chosen: Value, addresses: list[Value]) -> Value:
    """Write the chosen lanes; gives, as i1 lanes, which of them differ from the base."""
    base_at, tuned_at, out_at = (b.inttoptr(address, lane.as_pointer()) for address in addresses)
    base, tuned = b.load(base_at, align=1), b.load(tuned_at, align=1)
    b.store(b.select(chosen, tuned, base), out_at, align=1)
    return b.and_(chosen, b.icmp_unsigned("!=", base, tuned))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _blend_word(typing: Any, bits: Any, base: Any, tuned: Any, out: Any, word: Any) -> Any:
    """Blend 64 elements by a mask word; gives the bits of those that differ from the base."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        lane = vector(int_type(int(bits.literal_value)))
        chosen = b.bitcast(args[4], vector(I1))
        return b.bitcast(_blended(b, lane, chosen, args[1:4]), I64)

    return types.uint64(bits, types.int64, types.int64, types.int64, types.uint64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _blend_one(typing: Any, bits: Any, base: Any, tuned: Any, out: Any, bit: Any) -> Any:
    """Blend one element by the lowest bit of ``bit``; gives 1 where it differs from the base."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        lane = int_type(int(bits.literal_value))
        chosen = b.trunc(args[4], I1)
        return b.zext(_blended(b, lane, chosen, args[1:4]), I64)

    return types.int64(bits, types.int64, types.int64, types.int64, types.int64), generate


def blend_kernel(bits: str) -> Callable[..., None]:
    """For elements of that many bits: 8, 16, 32 or 64."""
    size = int(bits) // 8

    def blend(base: int, tuned: int, mask: int, out: int, elements: int, counts: int) -> None:
        taken = differing = 0
        words = elements // LANES
        for i in range(words):
            at = i * LANES * size
            word = types.uint64(load_word(mask + 8 * i))
            found = _blend_word(bits, base + at, tuned + at, out + at, word)
            taken += ones(word)
            differing += ones(found)
        # a mask ends with the byte of its last element, and an array with that element
        for i in range(words * LANES, elements):
            at = i * size
            bit = load_byte(mask + i // 8) >> (i % 8) & 1
            differing += _blend_one(bits, base + at, tuned + at, out + at, bit)
            taken += bit
        store_word(counts, load_word(counts) + taken)
        store_word(counts + 8, load_word(counts + 8) + differing)

    return blend
