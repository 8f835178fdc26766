"""What ckdiff computes, again: slow, obvious, and sharing no code with the package.

Everything starts from raw bytes. Numbers are exact rationals (:class:`fractions.Fraction`) that
are rounded where the rule table says so and nowhere else. ``masks`` and its kin at the end do the
same with numpy for the cases where every pair of values is tried; a test holds the two against
each other.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash


class Format(NamedTuple):
    """One dtype; ``family`` says what a float's highest bit patterns mean."""

    bits: int
    family: str  # raw, int, uint, ieee, fn (only all ones is NaN), fnuz (only -0 is NaN)
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0


FORMATS = {
    "BOOL": Format(8, "raw"),
    "F4": Format(4, "raw"),
    "F6_E2M3": Format(6, "raw"),
    "F6_E3M2": Format(6, "raw"),
    "F8_E8M0": Format(8, "raw"),
    "C64": Format(64, "raw"),
    "U8": Format(8, "uint"),
    "U16": Format(16, "uint"),
    "U32": Format(32, "uint"),
    "U64": Format(64, "uint"),
    "I8": Format(8, "int"),
    "I16": Format(16, "int"),
    "I32": Format(32, "int"),
    "I64": Format(64, "int"),
    "F8_E5M2": Format(8, "ieee", 5, 2, 15),
    "F8_E4M3": Format(8, "fn", 4, 3, 7),
    "F8_E5M2FNUZ": Format(8, "fnuz", 5, 2, 16),
    "F8_E4M3FNUZ": Format(8, "fnuz", 4, 3, 8),
    "F16": Format(16, "ieee", 5, 10, 15),
    "BF16": Format(16, "ieee", 8, 7, 127),
    "F32": Format(32, "ieee", 8, 23, 127),
    "F64": Format(64, "ieee", 11, 52, 1023),
}
FLOATS = [name for name, f in FORMATS.items() if f.family in ("ieee", "fn", "fnuz")]
INTEGERS = [name for name, f in FORMATS.items() if f.family in ("int", "uint")]
RAW = [name for name, f in FORMATS.items() if f.family == "raw"]
#: which dtypes ``@target`` rounds
ROUNDED = {"bf16": ("F64", "F32", "F16"), "f16": ("F64", "F32", "BF16"), "f32": ("F64",)}

Number = Fraction | float  # the float is an infinity or a NaN


class Question(NamedTuple):
    """A rule, read without the package's help."""

    kind: str
    number: Fraction
    target: str | None


@cache
def question(rule: str) -> Question:
    text, _, target = rule.partition("@")
    kind, _, number = text.partition("=")
    exact = int(number) if kind == "ulp" else float(number or 0)
    return Question(kind, Fraction(exact), target or None)


def per_byte(dtype: str) -> int:
    """Element counts of a dtype are multiples of this: only whole bytes are stored."""
    return {4: 2, 6: 4}.get(FORMATS[dtype].bits, 1)


def elements(dtype: str, data: bytes) -> list[int]:
    """The bit pattern of each element, bits taken little-endian."""
    bits = FORMATS[dtype].bits
    whole = int.from_bytes(data, "little")
    if bits >= 8:
        size = bits // 8
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return [whole >> i & (1 << bits) - 1 for i in range(0, 8 * len(data) - bits + 1, bits)]


@cache
def value(dtype: str, bits: int) -> Number:
    """The number that a bit pattern stands for."""
    f = FORMATS[dtype]
    if f.family == "uint":
        return Fraction(bits)
    top = 1 << f.bits - 1
    if f.family == "int":
        return Fraction(bits - 2 * top if bits & top else bits)
    sign, rest = (-1 if bits & top else 1), bits & top - 1
    exponent, mantissa = rest >> f.mantissa, rest & (1 << f.mantissa) - 1
    if f.family == "ieee" and exponent == (1 << f.exponent) - 1:
        return math.nan if mantissa else sign * math.inf
    if f.family == "fn" and rest == top - 1:
        return math.nan
    if f.family == "fnuz" and bits == top:
        return math.nan
    significand = Fraction(mantissa, 1 << f.mantissa)
    if exponent:
        return sign * (1 + significand) * two(exponent - f.bias)
    return sign * significand * two(1 - f.bias)


@cache
def two(power: int) -> Fraction:
    return Fraction(2) ** power


def floor_log2(x: Fraction) -> int:
    power = x.numerator.bit_length() - x.denominator.bit_length()
    return power - (two(power) > x)


def rounded(x: Number, dtype: str) -> Number:
    """The value of an IEEE format that is nearest to ``x``, ties to even, too large to infinity."""
    if isinstance(x, float) or x == 0:
        return x
    f = FORMATS[dtype]
    step = two(max(floor_log2(abs(x)), 1 - f.bias) - f.mantissa)
    found = round(x / step) * step  # Python rounds a Fraction to the nearest even integer
    if abs(found) >= two(f.bias + 1):
        return math.inf if x > 0 else -math.inf
    return found


def round_bits(source: str, target: str, bits: int) -> int:
    """The bits of ``target`` that a float of ``source`` is rounded to; one NaN for all NaNs."""
    f = FORMATS[target]
    top = 1 << FORMATS[source].bits - 1
    infinity = (1 << f.exponent) - 1 << f.mantissa
    x = value(source, bits & top - 1)
    if x != x:
        return infinity | 1 << f.mantissa - 1
    x = rounded(x, target)
    if isinstance(x, float):
        found = infinity
    elif x < two(1 - f.bias):
        found = int(x / two(1 - f.bias - f.mantissa))  # so many of the smallest subnormal
    else:
        power = floor_log2(x)
        steps = int(x / two(power - f.mantissa)) - (1 << f.mantissa)
        found = (power + f.bias << f.mantissa) + steps
    return found | (1 << f.bits - 1 if bits & top else 0)


@cache
def ranks(dtype: str) -> dict[Number, int]:
    """Position of each finite value of a small format among all of them."""
    every = {value(dtype, bits) for bits in range(1 << FORMATS[dtype].bits)}
    finite = sorted(x for x in every if isinstance(x, Fraction))
    return {x: i for i, x in enumerate(finite)}


def distance(dtype: str, x: int, y: int) -> int:
    """How many representable values apart two elements are; |x - y| for integers."""
    a, b = value(dtype, x), value(dtype, y)
    if dtype in INTEGERS:
        assert isinstance(a, Fraction)
        assert isinstance(b, Fraction)
        return int(abs(a - b))
    if FORMATS[dtype].bits <= 16:
        place = ranks(dtype)
        return abs(place[a] - place[b])
    top = 1 << FORMATS[dtype].bits - 1
    line = [-(bits & top - 1) if bits & top else bits for bits in (x, y)]
    return abs(line[0] - line[1])


def changed(rule: str, dtype: str, x: int, y: int) -> bool:
    """The rule table of the design, read aloud, for one element given as bits."""
    kind, number, target = question(rule)
    if target is not None and dtype in ROUNDED[target]:
        seen = target.upper()
        x, y = round_bits(dtype, seen, x), round_bits(dtype, seen, y)
        dtype = seen
    if x == y or kind == "exact" or dtype in RAW:
        return x != y
    a, b = value(dtype, x), value(dtype, y)
    if isinstance(a, float) or isinstance(b, float):
        return True  # an infinity or NaN whose bits differ
    if kind == "ulp":
        return distance(dtype, x, y) > number
    if dtype in INTEGERS:
        return abs(a - b) > (number if kind == "atol" else number * max(abs(a), abs(b)))
    compute = "F64" if dtype == "F64" else "F32"
    number = rounded(number, compute)
    delta = rounded(abs(a - b), compute)
    if kind == "atol":
        return delta > number
    largest = max(abs(a), abs(b))
    if number == math.inf:
        return False  # an infinite bound, or 0 * inf, which nothing exceeds
    return delta > rounded(number * largest, compute)


def mask(rule: str, dtype: str, base: bytes, tuned: bytes) -> list[bool]:
    """One bool for each element."""
    pairs = zip(elements(dtype, base), elements(dtype, tuned), strict=True)
    return [changed(rule, dtype, x, y) for x, y in pairs]


def packed(flags: Sequence[bool] | npt.NDArray[np.bool_]) -> bytes:
    """A mask as stored: element 0 in the lowest bit of byte 0, padding bits zero."""
    out = bytearray(-(-len(flags) // 8))
    for i, flag in enumerate(flags):
        out[i // 8] |= int(flag) << i % 8
    return bytes(out)


def statistics(dtype: str, base: bytes, tuned: bytes) -> dict[str, Any]:
    """Statistics of a tensor, over the elements that are finite on both sides.

    Products are rounded to float64 once and then added exactly.
    """
    delta, squares, base_squares, tuned_squares, dots = [], [], [], [], []
    flips = nonfinite = 0
    histogram: list[int] = []
    for x, y in zip(elements(dtype, base), elements(dtype, tuned), strict=True):
        a, b = value(dtype, x), value(dtype, y)
        if isinstance(a, float) or isinstance(b, float):
            nonfinite += 1
            continue
        flips += a * b < 0
        delta.append(float(abs(a - b)))
        squares.append(delta[-1] * delta[-1])
        base_squares.append(float(a) * float(a))
        tuned_squares.append(float(b) * float(b))
        dots.append(float(a) * float(b))
        if x != y:
            bucket = distance(dtype, x, y).bit_length()
            histogram += [0] * (bucket + 1 - len(histogram))
            histogram[bucket] += 1
    return {
        "sum_abs_delta": math.fsum(delta),
        "l2_delta": math.sqrt(math.fsum(squares)),
        "max_abs_delta": max(delta, default=0.0),
        "l2_base": math.sqrt(math.fsum(base_squares)),
        "l2_tuned": math.sqrt(math.fsum(tuned_squares)),
        "dot": math.fsum(dots),
        "sign_flips": flips,
        "nonfinite": nonfinite,
        "ulp_histogram": histogram,
    }


def content_hash(dtype: str, data: bytes) -> str:
    """The content hash of a tensor, from its definition."""
    unit = 512 * FORMATS[dtype].bits // 8
    low = high = 0
    for u in range(-(-len(data) // unit)):
        x = (u + 0x9E3779B97F4A7C15) % 2**64  # splitmix64's finaliser, made odd
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        weight = (x ^ x >> 31) | 1
        digest = int(xxhash.xxh3_128_hexdigest(data[u * unit : (u + 1) * unit]), 16)
        low += weight * (digest % 2**64)
        high += weight * (digest // 2**64)
    total = struct.pack("<QQQ", low % 2**64, high % 2**64, len(data))
    return xxhash.xxh3_128_hexdigest(total)


# -- the same with numpy, for very many elements ---------------------------------------------------

Bits = npt.NDArray[Any]  # unsigned integers as wide as an element, at least 8 bits


def as_bits(dtype: str, data: bytes) -> Bits:
    """``elements`` as an array."""
    bits = FORMATS[dtype].bits
    if bits >= 8:
        return np.frombuffer(data, f"<u{bits // 8}")
    single = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    whole = single[: len(single) // bits * bits].reshape(-1, bits)
    return (whole << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)


@cache
def _values(dtype: str) -> npt.NDArray[np.float32]:
    every = [float(value(dtype, bits)) for bits in range(1 << FORMATS[dtype].bits)]
    return np.array(every, np.float32)  # each of them is a float32


@cache
def _round_table(source: str, target: str) -> npt.NDArray[np.uint16]:
    return np.array([round_bits(source, target, bits) for bits in range(1 << 16)], np.uint16)


def round_array(source: str, target: str, x: Bits) -> Bits:
    """``round_bits`` of many elements."""
    if FORMATS[source].bits == 16:
        return _round_table(source, target)[x]
    if (source, target) == ("F64", "BF16"):  # nothing at hand does this in one step
        distinct, where = np.unique(x, return_inverse=True)
        table = [round_bits(source, target, bits) for bits in distinct.tolist()]
        return np.array(table, np.uint16)[where]
    kinds = {"F16": np.float16, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    wide = x.view(np.float64 if source == "F64" else np.float32)
    with np.errstate(all="ignore"):
        out = wide.astype(kinds[target]).view(f"<u{FORMATS[target].bits // 8}")
    out[np.isnan(wide)] = round_bits("F32", target, 0x7FC00000)
    return out


class Pairs:
    """Many pairs of elements; ``changed(rule)`` asks one rule about all of them."""

    def __init__(self, dtype: str, x: Bits, y: Bits) -> None:
        self._dtype, self._x, self._y = dtype, x, y
        self._differ = x != y
        self._rounded: dict[str, Pairs] = {}

    def changed(self, rule: str) -> npt.NDArray[np.bool_]:
        kind, number, target = question(rule)
        if target is not None and self._dtype in ROUNDED[target]:
            if target not in self._rounded:
                sides = (round_array(self._dtype, target.upper(), v) for v in (self._x, self._y))
                self._rounded[target] = Pairs(target.upper(), *sides)
            return self._rounded[target].changed(rule.partition("@")[0])
        if kind == "exact" or self._dtype in RAW:
            return self._differ
        if self._dtype in INTEGERS:
            return self._differ & self._integers_apart(kind, number)
        if kind == "ulp":
            return self._differ & ((self._ulps > int(number)) | self._nonfinite)
        compute = self._delta.dtype.type
        with np.errstate(all="ignore"):
            bound = compute(float(number))
            far = self._delta > (bound if kind == "atol" else bound * self._largest)
        return self._differ & (far | self._nonfinite)

    @cached_property
    def _floats(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        bits = FORMATS[self._dtype].bits
        if bits <= 16:
            return _values(self._dtype)[self._x], _values(self._dtype)[self._y]
        return self._x.view(f"<f{bits // 8}"), self._y.view(f"<f{bits // 8}")

    @cached_property
    def _nonfinite(self) -> npt.NDArray[np.bool_]:
        a, b = self._floats
        return ~(np.isfinite(a) & np.isfinite(b))

    @cached_property
    def _delta(self) -> npt.NDArray[Any]:
        a, b = self._floats
        with np.errstate(all="ignore"):
            return np.asarray(abs(a - b))

    @cached_property
    def _largest(self) -> npt.NDArray[Any]:
        a, b = self._floats
        with np.errstate(all="ignore"):
            return np.maximum(abs(a), abs(b))

    @cached_property
    def _ulps(self) -> npt.NDArray[np.uint64]:
        top = 1 << FORMATS[self._dtype].bits - 1
        mx, my = (np.uint64(top - 1) & v.astype(np.uint64) for v in (self._x, self._y))
        same_sign = (self._x >= top) == (self._y >= top)
        return np.where(same_sign, np.maximum(mx, my) - np.minimum(mx, my), mx + my)

    @cached_property
    def _integers(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """|x - y| and max(|x|, |y|); 64-bit numbers as Python integers."""
        x, y = self._x, self._y
        if FORMATS[self._dtype].family == "int":
            x, y = (v.view(f"<i{v.itemsize}") for v in (x, y))
        exact = np.int64 if x.itemsize < 8 else object
        a, b = x.astype(exact), y.astype(exact)
        return abs(a - b), np.maximum(abs(a), abs(b))

    def _integers_apart(self, kind: str, number: Fraction) -> npt.NDArray[np.bool_]:
        delta, largest = self._integers
        if kind != "rtol":
            return np.asarray(delta > math.floor(number), bool)
        n, d = number.numerator, number.denominator  # whole numbers: the bound can be floored
        if self._x.itemsize > 2:
            limits = np.array([n * int(m) // d for m in largest], object)
            return np.asarray(delta > limits, bool)
        every = range((1 << FORMATS[self._dtype].bits) + 1)
        return delta > np.array([min(n * m // d, 1 << 40) for m in every])[largest]


def masks(rule: str, dtype: str, x: Bits, y: Bits) -> npt.NDArray[np.bool_]:
    """``changed`` of many elements."""
    return Pairs(dtype, x, y).changed(rule)
