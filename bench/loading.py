"""What only loads bytes: it adds them up as 64-byte vectors. For the floors of other figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from ckdiff.kernels.codegen.lanes import I64
from ckdiff.kernels.codegen.vectors import BYTES, add_up, constant, load_vector

STEP = 8 * BYTES  # bytes that it takes at a time: their number is a multiple of it


@intrinsic  # type: ignore[untyped-decorator]
def _add_vectors(typing: Any, address: Any, size: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        sums = [cgutils.alloca_once_value(b, constant(0)) for _ in range(8)]
        with cgutils.for_range(b, b.udiv(args[1], I64(STEP))) as loop:
            at = b.add(args[0], b.mul(loop.index, I64(STEP)))
            for i, slot in enumerate(sums):
                b.store(b.add(b.load(slot), load_vector(b, b.add(at, I64(BYTES * i)))), slot)
        total = b.load(sums[0])
        for slot in sums[1:]:
            total = b.add(total, b.load(slot))
        return add_up(b, total)

    return types.int64(types.int64, types.int64), generate


def loading() -> Callable[[int, int], int]:
    """A C function of an address and bytes; releases the GIL where ctypes calls it."""

    def total(address: int, size: int) -> int:
        return _add_vectors(address, size)  # type: ignore[no-any-return]

    found: Callable[[int, int], int] = cfunc(types.int64(types.int64, types.int64))(total).ctypes
    return found
