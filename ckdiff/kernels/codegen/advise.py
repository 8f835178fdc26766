"""Advising the system about several ranges of memory in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.codegen.lanes import I32, I64, Value, call_at
from ckdiff.kernels.codegen.words import load_word


@intrinsic  # type: ignore[untyped-decorator]
def _call_madvise(typing: Any, function: Any, address: Any, size: Any, advice: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        function, address, size, advice = args
        found = call_at(b, I32, function, [address, size, b.trunc(advice, I32)])
        return b.sext(found, I64)

    return types.int64(*[types.int64] * 4), generate


def advise_kernel() -> Callable[[int, int, int, int], int]:
    """See the ABI."""

    def advise(ranges: int, count: int, advice: int, madvise: int) -> int:
        for i in range(count):
            at = ranges + 16 * i
            if _call_madvise(madvise, load_word(at), load_word(at + 8), advice) != 0:
                return i
        return count

    return advise
