"""XXH3 of whole units of both sides in registers, while they are compared.

XXH3 takes 64 bytes at a time, a *stripe*, into eight sums. The library's is called for what memory
delivers (:mod:`ckdiff.kernels.codegen.hashing`); for what is in the first-level cache two sides
that take turns, and no calls, are nearly twice as fast. What comes of a unit is left in memory:
to make digests of it takes long for one, and they can be made of some units at once.

Of a kind such as ``BF16>F32`` one side has the narrower floats: their stripes are taken as they are
stored, and what is compared with the other side is what they are widened to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES, DType
from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.casting import widened
from ckdiff.kernels.codegen.lanes import (
    F32,
    I8,
    I32,
    I64,
    Value,
    in_each,
    int_type,
    load_bits,
    spread,
)
from ckdiff.kernels.codegen.scaling import NUMBERS, WORD, four_bits, look_up, pairs_of, vector_at
from ckdiff.kernels.codegen.vectors import VECTOR, constant
from ckdiff.kernels.hashing import SECRET, START, UNIT, secret_words, starts

STRIPE = 64  #: bytes
LEFT = 4 * STRIPE  #: bytes that are left of a unit of both sides
WIDTHS = {"1": 1, "2": 2}  #: bytes of an element, by the kind, where they are not four
_SOME = STRIPE // 4  # float32 of a stripe
_BLOCK = 16  # stripes, after which the sums are scrambled
_LAST = 11, len(SECRET) - STRIPE - 11  # words of the secret for the halves of the digest
_I128 = ir.IntType(128)
#: addresses of elements and of scales, and what else there is
Place = tuple[int, int, int]
Pair = tuple[DType, DType]
Stripe = Callable[[int], list[Value]]  # of a side's units that are taken together


def pair_of(kind: str) -> Pair | None:
    """``BF16>F32`` -> (BF16, F32); None of a kind with elements of one width."""
    narrow, found, wide = kind.partition(">")
    return (DTYPES[narrow], DTYPES[wide]) if found else None


def widths_of(kind: str) -> tuple[int, int]:
    """Bytes of an element of both sides."""
    pair = pair_of(kind)
    if pair is None:
        return WIDTHS.get(kind, 4), WIDTHS.get(kind, 4)
    return pair[0].bits // 8, pair[1].bits // 8


def _secret(first: int) -> Value:
    """Eight words of the secret."""
    return ir.Constant(VECTOR, list(secret_words(first, 8)))


class _Side:
    """The sums of one side: of products, and of stripes as they are, whose words are exchanged in
    pairs only at the end of a block.
    """

    def __init__(self, b: Any) -> None:
        self._b = b
        self._products, self._plain = (cgutils.alloca_once(b, VECTOR) for _ in range(2))
        b.store(ir.Constant(VECTOR, list(START)), self._products)
        b.store(constant(0), self._plain)

    def take(self, stripe: Value, secret: Value) -> None:
        """Add a stripe."""
        b = self._b
        mixed = b.xor(stripe, secret)
        low, high = b.and_(mixed, constant(0xFFFFFFFF)), b.lshr(mixed, constant(32))
        b.store(b.add(b.load(self._products), b.mul(low, high)), self._products)
        b.store(b.add(b.load(self._plain), stripe), self._plain)

    def _fold(self) -> Value:
        """The sums."""
        b, plain = self._b, self._b.load(self._plain)
        exchange = ir.Constant(ir.VectorType(I32, 8), [i ^ 1 for i in range(8)])
        b.store(constant(0), self._plain)
        return b.add(b.load(self._products), b.shuffle_vector(plain, plain, exchange))

    def scramble(self) -> None:
        """After a block."""
        b, sums = self._b, self._fold()
        mixed = b.xor(b.xor(sums, b.lshr(sums, constant(47))), _secret(len(SECRET) - STRIPE))
        factor = constant(START[7])
        low = b.mul(b.and_(mixed, constant(0xFFFFFFFF)), factor)
        high = b.mul(b.lshr(mixed, constant(32)), factor)
        b.store(b.add(low, b.shl(high, constant(32))), self._products)

    def leave(self, room: Value) -> None:
        """Write what the digest is made of: the sums, with words of the secret for each half."""
        b, sums = self._b, self._fold()
        for i, first in enumerate(_LAST):
            where = vector_at(b, b.add(room, I64(STRIPE * i)), I64, 8)
            b.store(b.xor(sums, _secret(first)), where, align=1)


def _plain(b: Any, place: list[Value], word: Value, width: int = 4) -> Stripe:
    """Stripes that are there, of elements of so many bytes."""
    begin = b.add(place[0], b.mul(word, I64(width * LANES)))
    return lambda i: [b.load(vector_at(b, b.add(begin, I64(STRIPE * i)), I64, 8), align=1)]


def _groups(b: Any, place: list[Value], word: Value) -> Stripe:
    """Stripes of pairs of F4, with an E8M0 for each 32: their 16 numbers are multiplied by it."""
    powers = b.ptrtoint(_listed(b, "powers", I32, _POWERS), I64)
    numbers = ir.Constant(ir.VectorType(F32, _SOME), list(NUMBERS))
    pairs = b.add(place[0], b.mul(word, I64(LANES // 2)))
    scales = b.add(place[1], b.mul(word, I64(LANES // WORD)))
    found: list[Value] = []

    def stripe(i: int) -> list[Value]:
        if i % (WORD // _SOME) == 0:
            at = b.inttoptr(b.add(scales, I64(i * _SOME // WORD)), I8.as_pointer())
            entry = b.add(powers, b.shl(b.zext(b.load(at), I64), I64(2)))
            factor = spread(b, b.load(b.inttoptr(entry, F32.as_pointer())), _SOME)
            found.append(b.fmul(numbers, factor))
        bits = pairs_of(b, b.add(pairs, I64(_SOME // 2 * i)), _SOME)
        return [b.bitcast(look_up(b, found[-1], bits), VECTOR)]

    return stripe


def _halves_at(b: Any, place: list[Value], word: Value) -> tuple[Value, Value]:
    """Where the bytes and the powers of LANES of a row are."""
    return b.add(place[0], b.mul(word, I64(LANES))), b.add(place[1], b.mul(word, I64(4 * LANES)))


def _halves(b: Any, place: list[Value], word: Value) -> Stripe:
    """Stripes of F4 that are one half of as many bytes: from some bit on; a float32 for each."""
    source, scales = _halves_at(b, place, word)
    shifts = spread(b, b.trunc(place[2], I32), _SOME)

    def stripe(i: int) -> list[Value]:
        pairs = b.load(vector_at(b, b.add(source, I64(_SOME * i)), I8, _SOME), align=1)
        powers = b.load(vector_at(b, b.add(scales, I64(STRIPE * i)), F32, _SOME), align=1)
        numbers = four_bits(b, b.lshr(b.zext(pairs, ir.VectorType(I32, _SOME)), shifts))
        return [b.bitcast(b.fmul(numbers, powers), VECTOR)]

    return stripe


def _rows(b: Any, place: list[Value], word: Value) -> Stripe:
    """The same of two rows: both halves of the bytes."""
    source, scales = _halves_at(b, place, word)

    def stripe(i: int) -> list[Value]:
        pairs = b.load(vector_at(b, b.add(source, I64(_SOME * i)), I8, _SOME), align=1)
        powers = b.load(vector_at(b, b.add(scales, I64(STRIPE * i)), F32, _SOME), align=1)
        low = b.zext(pairs, ir.VectorType(I32, _SOME))
        both = low, b.lshr(low, in_each(low, I32, 4))
        return [b.bitcast(b.fmul(four_bits(b, bits), powers), VECTOR) for bits in both]

    return stripe


def _listed(b: Any, name: str, kind: Any, numbers: Sequence[int]) -> Value:
    """Where a list of numbers is, which begins where a line of the caches does."""
    if name in b.module.globals:
        return b.module.globals[name]
    array = ir.Constant(ir.ArrayType(kind, len(numbers)), list(numbers))
    found = cgutils.global_constant(b.module, name, array)
    found.align = STRIPE
    return found


#: E8M0 as the bits of float32: the lowest is subnormal, 255 is NaN
_POWERS = (1 << 22, *(e << 23 for e in range(1, 255)), 0x7FC00000)
_STRIPES: dict[str, Callable[[Any, list[Value], Value], Stripe]] = {
    "1": partial(_plain, width=1), "2": partial(_plain, width=2), "": _plain,
    "groups": _groups, "halves": _halves, "rows": _rows,
}  # fmt: skip


def _mixed(width: int) -> list[int]:
    """What each stripe of a unit is mixed with; the last of all has a place in the secret of its
    own.
    """
    firsts = [8 * (i % _BLOCK) for i in range(UNIT * width // STRIPE)]
    firsts[-1] = len(SECRET) - STRIPE - 7
    return [word for first in firsts for word in secret_words(first, 8)]


def _mixed_at(b: Any, word: Value, width: int) -> Value:
    """Where that is for a word of elements of so many bytes."""
    table = b.ptrtoint(_listed(b, f"mixed{width}", I64, _mixed(width)), I64)
    return b.add(table, b.mul(word, I64(STRIPE * width)))


def _cast_word(
    b: Any, sides: list[_Side], places: list[list[Value]], word: Value, pair: Pair
) -> Value:
    """Take LANES elements of both sides, the first one narrower; gives a bit for each that differs
    once it is widened.
    """
    bits = []
    for side, place, dtype in zip(sides, places, pair, strict=True):
        width = dtype.bits // 8
        mixed, stripe = _mixed_at(b, word, width), _plain(b, place, word, width)
        for i in range(width):
            secret = b.load(vector_at(b, b.add(mixed, I64(STRIPE * i)), I64, 8), align=STRIPE)
            side.take(stripe(i)[0], secret)
        bits.append(load_bits(b, dtype, b.add(place[0], b.mul(word, I64(width * LANES)))))
    return b.bitcast(b.icmp_unsigned("!=", widened(b, *pair, bits[0]), bits[1]), I64)


def _word(
    b: Any, units: list[list[_Side]], stripes: list[Stripe], word: Value, width: int
) -> list[Value]:
    """Take LANES elements of both sides of units; gives a bit of each for each that differs."""
    bits: list[list[Value]] = [[] for _ in units]
    mixed, some_of = _mixed_at(b, word, width), STRIPE // width
    elements = ir.VectorType(int_type(8 * width), some_of)
    for i in range(width):
        secret = b.load(vector_at(b, b.add(mixed, I64(STRIPE * i)), I64, 8), align=STRIPE)
        both = [stripe(i) for stripe in stripes]
        for sides, some, *pair in zip(units, bits, *both, strict=True):
            for side, each in zip(sides, pair, strict=True):
                side.take(each, secret)
            x, y = (b.bitcast(each, elements) for each in pair)
            some.append(b.icmp_unsigned("!=", x, y))
            while len(some) > 1 and some[-2].type == some[-1].type:
                last, size = some.pop(), some[-1].type.count
                order = ir.Constant(ir.VectorType(I32, 2 * size), [*range(2 * size)])
                some[-1] = b.shuffle_vector(some[-1], last, order)
    return [b.bitcast(some[0], I64) for some in bits]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def compare_units(typing: Any, kind: Any, base: Any, tuned: Any, masks: Any, left: Any) -> Any:
    """Compare a unit, or two of one kind, write their bits to ``masks``, and what their digests
    are made of to ``left``, two addresses of each; gives how many differ.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        places = [[b.extract_value(place, i) for i in range(3)] for place in args[1:3]]
        masks, left = ([b.extract_value(pair, i) for i in range(2)] for pair in args[3:5])
        name = kind.literal_value
        pair, widths = pair_of(name), widths_of(name)
        width = max(widths)
        units = [[_Side(b) for _ in places] for _ in range(2 if name == "rows" else 1)]
        changed = cgutils.alloca_once_value(b, I64(0))
        words = min(UNIT // LANES, _BLOCK // width)
        for block in range(UNIT // LANES // words):
            for sides in units if block else []:
                for side, own in zip(sides, widths, strict=True):
                    if block * words * own % _BLOCK == 0:
                        side.scramble()
            with cgutils.for_range(b, I64(words)) as loop:
                word = b.add(loop.index, I64(block * words))
                if pair is None:
                    stripes = [_STRIPES[name](b, place, word) for place in places]
                    found = _word(b, units, stripes, word, width)
                else:
                    found = [_cast_word(b, units[0], places, word, pair)]
                for mask, bits in zip(masks, found, strict=False):
                    at = b.inttoptr(b.add(mask, b.shl(word, I64(3))), I64.as_pointer())
                    b.store(bits, at, align=1)
                    count = cgutils.get_or_insert_function(
                        b.module, ir.FunctionType(I64, [I64]), "llvm.ctpop.i64"
                    )
                    b.store(b.add(b.load(changed), b.call(count, [bits])), changed)
        for sides, room in zip(units, left, strict=False):
            for at, side in enumerate(sides):
                side.leave(b.add(room, I64(2 * STRIPE * at)))
        return b.load(changed)

    place = types.UniTuple(types.int64, 3)  # type: ignore[attr-defined]
    pair = types.UniTuple(types.int64, 2)  # type: ignore[attr-defined]
    return types.int64(kind, place, place, pair, pair), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def digests_of(typing: Any, kind: Any, left: Any) -> Any:
    """Both digests of what was left of a unit: low, high, low, high."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Value:
        halves = []
        for i in range(4):
            width = widths_of(kind.literal_value)[i // 2]
            total: Value = I64(starts(UNIT * width)[i % 2])
            for k in range(0, 8, 2):
                pair = []
                for n in range(2):
                    at = b.add(args[1], I64(STRIPE * i + 8 * (k + n)))
                    word = b.load(b.inttoptr(at, I64.as_pointer()), align=8)
                    pair.append(b.zext(word, _I128))
                product = b.mul(*pair)
                high = b.trunc(b.lshr(product, _I128(64)), I64)
                total = b.add(total, b.xor(b.trunc(product, I64), high))
            total = b.xor(total, b.lshr(total, I64(37)))
            total = b.mul(total, I64(0x165667919E3779F9))
            halves.append(b.xor(total, b.lshr(total, I64(32))))
        return context.make_tuple(b, signature.return_type, halves)

    four = types.UniTuple(types.uint64, 4)  # type: ignore[attr-defined]
    return four(kind, types.int64), generate
