"""Vectors of eight 64-bit words: what counting over whole masks works with."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ckdiff.kernels.codegen.lanes import I32, I64, Value

WORDS = 8
BYTES = 8 * WORDS
VECTOR = ir.VectorType(I64, WORDS)


def load_vector(b: Any, address: Value) -> Value:
    """The 64 bytes at ``address``, any alignment."""
    return b.load(b.inttoptr(address, VECTOR.as_pointer()), align=1)


def constant(value: int) -> Any:
    """A vector with the same word in every lane; -1 has all bits set."""
    return ir.Constant(VECTOR, [value] * WORDS)


def add_up(b: Any, counts: Value) -> Value:
    """The sum of a vector's lanes."""
    total = I64(0)
    for i in range(WORDS):
        total = b.add(total, b.extract_element(counts, I32(i)))
    return total


def count_ones(b: Any, value: Value) -> Value:
    """The population count of each lane."""
    kind = ir.FunctionType(VECTOR, [VECTOR])
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.ctpop.v{WORDS}i64")
    return b.call(function, [value])


def listed_mask(b: Any, table: Value, index: Value, at: Value) -> Value:
    """64 bytes, ``at`` bytes into the mask whose address is entry ``index`` of ``table``."""
    entry = b.inttoptr(b.add(table, b.shl(index, I64(3))), I64.as_pointer())
    return load_vector(b, b.add(b.load(entry), at))


def add_ballots(b: Any, digits: list[Value], table: Value, masks: Value, at: Value) -> None:
    """Count, for every lane's bits, the ``masks`` masks of ``table`` that hold them.

    ``digits`` are slots of vectors, the lowest binary digit first; they are set to the counts.
    """
    for digit in digits:
        b.store(constant(0), digit)
    with cgutils.for_range(b, masks) as loop:
        carry = listed_mask(b, table, loop.index, at)
        for digit in digits:
            value = b.load(digit)
            b.store(b.xor(value, carry), digit)
            carry = b.and_(value, carry)
