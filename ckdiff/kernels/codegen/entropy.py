"""Generating the native parts of the mask encoder (:mod:`ckdiff.stores.maskcodec`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.kernels.abi import STREAM
from ckdiff.kernels.codegen.lanes import I8, I32, I64, Value
from ckdiff.kernels.codegen.vectors import (
    BYTES,
    WORDS,
    add_up,
    constant,
    count_ones,
    load_vector,
)
from ckdiff.kernels.codegen.words import load_word, ones, store_word


@intrinsic  # type: ignore[untyped-decorator]
def zero_bytes(typing: Any, word: Any) -> Any:
    """How many of the 8 bytes of a uint64 are zero."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        lanes = ir.VectorType(I8, 8)
        value = b.bitcast(args[0], lanes)
        flags = b.icmp_unsigned("==", value, ir.Constant(lanes, [0] * 8))
        return b.zext(b.ctpop(b.bitcast(flags, I8)), I64)

    return types.int64(types.uint64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def load_entry(typing: Any, width: Any, table: Any, address: Any) -> Any:
    """The uint32 of ``table`` for the byte, or the ``width`` bytes, at ``address``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        _, table, address = args
        kind = ir.IntType(8 * width.literal_value)
        symbol = b.zext(b.load(b.inttoptr(address, kind.as_pointer()), align=1), I64)
        entry = b.inttoptr(b.add(table, b.shl(symbol, I64(2))), I32.as_pointer())
        return b.zext(b.load(entry), I64)

    return types.uint64(width, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _survey_vectors(typing: Any, data: Any, count: Any) -> Any:
    """(bits that are set, bytes that are zero) in ``count`` vectors."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        data, count = args
        bits = cgutils.alloca_once_value(b, constant(0))
        zeros = cgutils.alloca_once_value(b, I64(0))
        lanes = ir.VectorType(I8, BYTES)
        with cgutils.for_range(b, count) as loop:
            vector = load_vector(b, b.add(data, b.mul(loop.index, I64(BYTES))))
            b.store(b.add(b.load(bits), count_ones(b, vector)), bits)
            flags = b.icmp_unsigned("==", b.bitcast(vector, lanes), ir.Constant(lanes, [0] * BYTES))
            b.store(b.add(b.load(zeros), b.ctpop(b.bitcast(flags, I64))), zeros)
        found = [add_up(b, b.load(bits)), b.load(zeros)]
        return context.make_tuple(b, signature.return_type, found)

    pair = types.UniTuple(types.int64, 2)  # type: ignore[attr-defined]
    return pair(types.int64, types.int64), generate


def survey_kernel() -> Callable[[int, int, int], None]:
    def survey(data: int, words: int, out: int) -> None:
        vectors = words // WORDS
        bits, zeros = _survey_vectors(data, vectors)
        for i in range(WORDS * vectors, words):
            word = types.uint64(load_word(data + 8 * i))
            bits += ones(word)
            zeros += zero_bytes(word)
        store_word(out, bits)
        store_word(out + 8, zeros)

    return survey


def encode_kernel(kind: str) -> Callable[..., None]:
    """Huffman-codes a piece. Kinds: how many bytes an entry of the table is for, 1 or 2.

    Entries for two take half as many steps, from a table that fills a good part of a core's cache:
    where tables take turns, those for one byte are faster.
    """
    width = int(kind)

    def encode(data: Any, table: Any, out: Any, room: Any) -> None:
        # A table entry holds the codes of neighbouring bytes and, in its lowest 5 bits, their
        # length. Bits go in from the stream's last byte to its first, because a zstd decoder reads
        # backwards. The four streams are coded side by side: one alone would wait for its own
        # shifts.
        a0 = a1 = a2 = a3 = types.uint64(0)
        n0 = n1 = n2 = n3 = types.uint64(0)
        p0 = out + 32
        p1 = p0 + room
        p2 = p1 + room
        p3 = p2 + room
        q0, q1, q2, q3 = p0, p1, p2, p3
        low = types.uint64(31)
        five = types.uint64(5)
        seven = types.uint64(7)
        three = types.uint64(3)
        for group in range(STREAM // 4 - 1, -1, -1):
            for k in range(4 - width, -1, -width):
                at = data + 4 * group + k
                e = load_entry(width, table, at)
                a0 |= (e >> five) << n0
                n0 += e & low
                e = load_entry(width, table, at + STREAM)
                a1 |= (e >> five) << n1
                n1 += e & low
                e = load_entry(width, table, at + 2 * STREAM)
                a2 |= (e >> five) << n2
                n2 += e & low
                e = load_entry(width, table, at + 3 * STREAM)
                a3 |= (e >> five) << n3
                n3 += e & low
            # at most 7 bits left over and 4 codes of 11: below 64
            store_word(q0, a0)
            q0 += types.int64(n0 >> three)
            a0 >>= n0 & ~seven
            n0 &= seven
            store_word(q1, a1)
            q1 += types.int64(n1 >> three)
            a1 >>= n1 & ~seven
            n1 &= seven
            store_word(q2, a2)
            q2 += types.int64(n2 >> three)
            a2 >>= n2 & ~seven
            n2 &= seven
            store_word(q3, a3)
            q3 += types.int64(n3 >> three)
            a3 >>= n3 & ~seven
            n3 &= seven
        # a one behind the last bit tells the decoder where to begin
        one = types.uint64(1)
        store_word(q0, a0 | (one << n0))
        store_word(q1, a1 | (one << n1))
        store_word(q2, a2 | (one << n2))
        store_word(q3, a3 | (one << n3))
        store_word(out, q0 + 1 - p0)
        store_word(out + 8, q1 + 1 - p1)
        store_word(out + 16, q2 + 1 - p2)
        store_word(out + 24, q3 + 1 - p3)

    return encode
