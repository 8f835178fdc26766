"""Copying many runs of bytes, by the C library's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import COPY_BYTES, COPY_COLUMNS, COPY_FROM, COPY_TO
from ckdiff.kernels.codegen.lanes import I64, Value, call_at
from ckdiff.kernels.codegen.words import load_word


@intrinsic  # type: ignore[untyped-decorator]
def _call_memmove(typing: Any, function: Any, to: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return call_at(b, I64, args[0], args[1:])

    return types.int64(*[types.int64] * 4), generate


def copy_kernel() -> Callable[[int, int, int], None]:
    """See the ABI."""

    def copy(runs: int, count: int, memmove: int) -> None:
        for i in range(count):
            at = runs + i * (8 * COPY_COLUMNS)
            to, source = load_word(at + 8 * COPY_TO), load_word(at + 8 * COPY_FROM)
            _call_memmove(memmove, to, source, load_word(at + 8 * COPY_BYTES))

    return copy
