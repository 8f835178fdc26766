"""Many checkpoints compared by their bits: each with the first and with the one before, at once.

What the comparing kernels do pair by pair loads each side four times from the cache. Here a word's
elements of the first side and of the one before stay in registers while the sides go by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import MARCH_SIDE, SWEEP_FIELDS
from ckdiff.kernels.binding import parse_kind
from ckdiff.kernels.codegen import lanes
from ckdiff.kernels.codegen.lanes import I64, Value


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def sweep_words(typing: Any, kind: Any, walk: Any) -> Any:
    """Compares whole words of all sides; ``walk`` is where the fields of a sweep are."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        dtype, _, _ = parse_kind(kind.literal_value)
        slot = I64.as_pointer()

        def load(base: Value, index: Value) -> Value:
            return b.load(b.inttoptr(b.add(base, b.mul(index, I64(8))), slot), align=8)

        table, offset, words, steps, masks, at, firsts, nexts = (
            load(args[1], I64(field)) for field in range(SWEEP_FIELDS)
        )
        before = cgutils.alloca_once(b, lanes.vector(lanes.int_type(dtype.bits)))

        def add(counts: Value, index: Value, word: Value) -> None:
            total = b.inttoptr(b.add(counts, b.mul(index, I64(8))), slot)
            b.store(b.add(b.load(total, align=8), b.ctpop(word)), total, align=8)

        def unlike(x: Value, y: Value) -> Value:
            return b.bitcast(b.icmp_unsigned("!=", x, y), I64)

        with cgutils.for_range(b, words) as loop:
            here = b.add(offset, b.mul(loop.index, I64(lanes.word_bytes(dtype))))
            place = b.add(at, b.mul(loop.index, I64(8)))
            first = lanes.load_bits(b, dtype, b.add(load(table, I64(0)), here))

            def compare(step: Value) -> Value:
                side = load(table, b.mul(b.add(step, I64(1)), I64(MARCH_SIDE)))
                now = lanes.load_bits(b, dtype, b.add(side, here))
                word = unlike(now, first)
                b.store(word, b.inttoptr(b.add(load(masks, step), place), slot), align=1)
                add(firsts, step, word)
                return now

            b.store(compare(I64(0)), before)
            with cgutils.for_range(b, b.sub(steps, I64(1))) as following:
                now = compare(b.add(following.index, I64(1)))
                add(nexts, following.index, unlike(now, b.load(before)))
                b.store(now, before)
        return context.get_dummy_value()

    return types.void(kind, types.int64), generate


def sweep_kernel(kind: str) -> Callable[[int], None]:
    """The exact comparison of all sides of one width; kinds as for ``compare``."""

    def sweep(walk: int) -> None:
        sweep_words(kind, walk)

    return sweep
