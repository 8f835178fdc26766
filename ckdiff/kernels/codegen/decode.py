"""Decoding many zstd frames in one call: a loop around the library's C function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import DECODE_COLUMNS
from ckdiff.kernels.codegen.lanes import I64, Value, call_at
from ckdiff.kernels.codegen.words import load_word, store_word


@intrinsic  # type: ignore[untyped-decorator]
def _call_decompress(
    typing: Any, function: Any, context_: Any, to: Any, room: Any, data: Any, size: Any
) -> Any:
    """``ZSTD_decompressDCtx``: bytes written, or an error beyond any size."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        return call_at(b, I64, args[0], args[1:])

    return types.int64(*[types.int64] * 6), generate


def decode_kernel() -> Callable[..., int]:
    """The loop over frames; gives the position of the first that is wrong, or their number."""

    def decode(frames: int, count: int, size: int, function: int, state: int) -> int:
        for i in range(count):
            at = frames + 8 * DECODE_COLUMNS * i
            to, data, length = load_word(at), load_word(at + 8), load_word(at + 16)
            if length == 0:  # known to be zeros
                for word in range(size // 8):
                    store_word(to + 8 * word, 0)
            elif _call_decompress(function, state, to, size, data, length) != size:
                return i
        return count

    return decode
