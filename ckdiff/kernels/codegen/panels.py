"""Comparing what is copied before, panel by panel: little of what is written leaves the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ckdiff.kernels.abi import (
    PANEL_BOX,
    PANEL_COLUMNS,
    PANEL_COPIER,
    PANEL_FIRST,
    PANEL_OUT,
    PANEL_SEGMENTS,
    PANEL_SOURCE,
    SEG_COLUMNS,
)
from ckdiff.kernels.codegen.lanes import VOID, Value, call_at
from ckdiff.kernels.codegen.words import load_word


@intrinsic  # type: ignore[untyped-decorator]
def _call_copier(
    typing: Any, function: Any, source: Any, out: Any, box: Any, scratch: Any
) -> Any:  # fmt: skip
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic  # type: ignore[untyped-decorator]
def _call_drive(
    typing: Any, function: Any, segments: Any, count: Any, slots: Any, columns: Any, rules: Any,
    masks: Any, counts: Any, hashes: Any, xxh3: Any, statistics: Any, scratch: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        call_at(b, VOID, args[0], args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), generate


def panels_kernel() -> Callable[..., None]:
    """See the ABI."""

    def panels(
        table: int, count: int, drive: int, copied: int, segments: int, slots: int,
        slot_columns: int, rules: int, masks: int, counts: int, hashes: int, xxh3: int,
        statistics: int, scratch: int,
    ) -> None:  # fmt: skip
        for i in range(count):
            at = table + i * (8 * PANEL_COLUMNS)
            copier = load_word(at + 8 * PANEL_COPIER)
            if copier != 0:
                _call_copier(
                    copier, load_word(at + 8 * PANEL_SOURCE), load_word(at + 8 * PANEL_OUT),
                    load_word(at + 8 * PANEL_BOX), copied,
                )  # fmt: skip
            some = load_word(at + 8 * PANEL_SEGMENTS)
            if some > 0:
                first = segments + load_word(at + 8 * PANEL_FIRST) * (8 * SEG_COLUMNS)
                _call_drive(
                    drive, first, some, slots, slot_columns, rules, masks, counts, hashes, xxh3,
                    statistics, scratch,
                )  # fmt: skip

    return panels
