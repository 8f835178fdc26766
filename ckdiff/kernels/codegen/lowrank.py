"""Products of thin matrices, scaled, and added to another: each element by itself, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.floatmode import enter_default_mode, leave_default_mode
from ckdiff.kernels.codegen.lanes import F32, I32, I64, Value, splat, spread, vector

_ROWS = 3  # whose sums are in registers at a time


def _pointer(b: Any, address: Value, kind: Any) -> Value:
    return b.inttoptr(address, kind.as_pointer())


def _sums(b: Any, rows: list[Value], right: Value, step: Value, rank: Value) -> list[Value]:
    """64 elements of each row: fma after fma, from +0 on; from -0 for a rank of one, which is then
    the product itself.
    """
    kind = ir.FunctionType(vector(F32), [vector(F32)] * 3)
    fma = cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32")
    alone = b.icmp_signed("==", rank, I64(1))
    first = b.select(alone, splat(F32, -0.0), splat(F32, 0.0))
    totals = [cgutils.alloca_once(b, vector(F32)) for _ in rows]
    for total in totals:
        b.store(first, total)
    with cgutils.for_range(b, rank) as loop:
        at = _pointer(b, b.add(right, b.mul(loop.index, step)), vector(F32))
        column = b.load(at, align=1)
        for row, total in zip(rows, totals, strict=True):
            factor = b.load(_pointer(b, b.add(row, b.mul(loop.index, I64(4))), F32), align=1)
            b.store(b.call(fma, [spread(b, factor), column, b.load(total)]), total)
    return [b.load(total) for total in totals]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _elements(
    typing: Any,
    rows: Any,
    left: Any,
    right: Any,
    step: Any,
    rank: Any,
    scale: Any,
    added: Any,
    out: Any,
) -> Any:
    """Write 64 elements of each of some rows: the row times columns, times the scale, and what is
    added to it, if any.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, left, right, step, rank, scale, added, out = args
        factor = spread(b, b.bitcast(b.trunc(scale, I32), F32))
        some = range(int(rows.literal_value))
        wide = b.mul(rank, I64(4))
        begins = [b.add(left, b.mul(wide, I64(i))) for i in some]
        for i, total in enumerate(_sums(b, begins, right, step, rank)):
            found = b.fmul(total, factor)
            away = b.mul(step, I64(i))
            to = _pointer(b, b.add(out, away), vector(F32))
            with b.if_else(b.icmp_signed("==", added, I64(0))) as (nothing, something):
                with nothing:
                    b.store(found, to, align=1)
                with something:
                    more = b.load(_pointer(b, b.add(added, away), vector(F32)), align=1)
                    b.store(b.fadd(more, found), to, align=1)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 7), generate


def lowrank_kernel() -> Callable[..., None]:
    """See the ABI. A strip of 64 columns after the other: the right matrix's stays in the cache."""

    def lowrank(
        left: int, right: int, added: int, out: int, rows: int, columns: int, rank: int, scale: int
    ) -> None:
        mode = enter_default_mode()
        step = 4 * columns
        for strip in range(0, step, 4 * LANES):
            row = 0
            while row < rows:
                at = row * step + strip
                more = 0
                if added != 0:
                    more = added + at
                here, to = left + 4 * row * rank, out + at
                if row + _ROWS <= rows:
                    _elements(_ROWS, here, right + strip, step, rank, scale, more, to)
                    row += _ROWS
                else:
                    _elements(1, here, right + strip, step, rank, scale, more, to)
                    row += 1
        leave_default_mode(mode)

    return lowrank
