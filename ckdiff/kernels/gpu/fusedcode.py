"""The code of :mod:`ckdiff.kernels.gpu.fused`, in Triton: one pass over both sides under all rules,
and for content hashes, which finds in the caches what was compared.

An element's raw bits are an int32, or an int64 for 64 bits, with the sign carried on; of unsigned
integers uint32 and uint64. So are distances, for which there is room then. No operation divides or
is fused with another: each result is rounded once, and the bits are those of the CPU.

Everything in capitals is known when the code is compiled; each combination is compiled once and
kept by Triton.
"""

# Triton reads the annotations of parameters itself, and knows "tl.constexpr" among them by its text
from __future__ import annotations

import triton
import triton.language as tl

from ckdiff.kernels.gpu.hashcode import digests

__all__ = ["MOST_RULES", "RULE_COLUMNS", "compare"]

MOST_RULES = 32  #: the bits of what a table says of a pair
#: what RULES says of each rule, in a row as Triton takes no tuples of tuples: its name; then kind,
#: bits, bits of exponent and of mantissa, and bias of the elements as they are stored; then the
#: same of what they are rounded to, or of the same again
RULE_COLUMNS = tl.constexpr(11)


# nothing is compiled once more for a number of programs, or for where a table or results begin
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["programs", "width"],
    do_not_specialize_on_alignment=["rows", "owners", "masks", "counts", "sums"],
)
def compare(
    rows: tl.tensor,
    owners: tl.tensor,
    masks: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    table: tl.tensor,
    parameters: tl.tensor,
    words: tl.tensor,
    programs: tl.tensor,
    width: tl.tensor,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    RULES: tl.constexpr,
    LOOKUP: tl.constexpr,
    MASKS: tl.constexpr,
    HASHES: tl.constexpr,
    ALIGNED: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Counts, with MASKS masks, and with HASHES digests, of the rows of a table under all rules.

    ``rows``, ``owners``: see :mod:`ckdiff.kernels.gpu.tables`; ALIGNED where all addresses are
    multiples of 16. ELEMENT: an integer of the elements' width, or a byte for 4 and 6 bits.
    ``masks``: uint8 (rules, width), little-endian bit order. ``counts``: int32 (rules, programs).
    ``sums``: int64 (4, programs), of whole units, see ``digests``, which takes ``words``.
    ``table``: for each pair of 8-bit elements a bit for each rule, used with LOOKUP.
    ``parameters``: int64 (rules, 2).
    """
    program = tl.program_id(0)
    row = rows + tl.load(owners + program) * COLUMNS
    first = (program - tl.load(row + 4).to(tl.int32)) * N  # of the row's elements
    n = tl.load(row + 2).to(tl.int32)
    base = tl.load(row).to(tl.pointer_type(ELEMENT))
    tuned = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        base, tuned = tl.multiple_of(base, 16), tl.multiple_of(tuned, 16)
    x, y = _read(base, first, n, BITS, N), _read(tuned, first, n, BITS, N)
    inside = first + tl.arange(0, N) < n
    found = inside
    if LOOKUP:
        pair = (x.to(tl.int32) & 255) * 256 + (y.to(tl.int32) & 255)
        found = tl.load(table + pair, mask=inside, other=0).to(tl.int32)
    # a byte of mask and its number of ones come from one sum over 8 elements
    place = tl.arange(0, 8)
    weights = ((1 << place) + 256)[None, :]
    at_byte = tl.arange(0, N // 8)
    written = at_byte < (n - first + 511) // 512 * 64  # whole units
    out = masks + tl.load(row + 3) * 64 + first // 8
    for r in tl.static_range(len(RULES) // RULE_COLUMNS):
        flags = _changed(x, y, found, parameters + 2 * r, RULES, r)
        ones = tl.reshape(flags.to(tl.int32), (N // 8, 8)) * weights
        eights = tl.sum(ones, axis=1)
        if MASKS:
            tl.store(out + r * width + at_byte, (eights & 255).to(tl.uint8), mask=written)
        tl.store(counts + r * programs + program, tl.sum(eights >> 8, axis=0))
    if HASHES:
        digests(row, first // 512, sums + program, programs, words, BITS, N // 512)


@triton.jit  # type: ignore[untyped-decorator]
def _read(
    side: tl.tensor, first: tl.tensor, n: tl.tensor, BITS: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """N elements from one on, zeros from ``n`` on."""
    at = first + tl.arange(0, N)
    if BITS < 8:
        found = _part(side, at, n, at < n, BITS)
    elif first + N <= n:  # nothing is masked: the widest loads there are
        found = tl.load(side + at)
    else:
        found = tl.load(side + at, mask=at < n, other=0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _part(
    side: tl.tensor, at: tl.tensor, n: tl.tensor, inside: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Elements of 4 or 6 bits, packed from the lowest bit on; one may lie in two bytes."""
    first = at * BITS
    byte = first // 8
    found = tl.load(side + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 6:
        more = inside & (byte + 1 < n * BITS // 8)
        found |= tl.load(side + byte + 1, mask=more, other=0).to(tl.int32) << 8
    return (found >> first % 8) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _changed(
    x: tl.tensor,
    y: tl.tensor,
    found: tl.tensor,
    parameter: tl.tensor,
    RULES: tl.constexpr,
    R: tl.constexpr,
) -> tl.tensor:
    """Where elements changed under a rule. ``found`` is what the table says of all rules."""
    AT: tl.constexpr = R * RULE_COLUMNS
    NAME: tl.constexpr = RULES[AT]
    STORED: tl.constexpr = RULES[AT + 1]
    KIND: tl.constexpr = RULES[AT + 6]
    BITS: tl.constexpr = RULES[AT + 7]
    EXPONENT: tl.constexpr = RULES[AT + 8]
    MANTISSA: tl.constexpr = RULES[AT + 9]
    if NAME == "table":
        differ = ((found >> R) & 1) != 0
    elif STORED == "raw":
        differ = x != y
    else:
        p, q = _seen(x, RULES, AT), _seen(y, RULES, AT)
        differ = p != q
        if NAME == "ulp":
            limit = tl.load(parameter)
            if KIND == "float":
                differ &= _float_ulp(p, q, limit, BITS, EXPONENT, MANTISSA)
            else:
                differ &= _distance(p, q, BITS) > _unsigned(limit, BITS)
        elif NAME == "rtol" and KIND != "float":
            differ &= _integer_rtol(p, q, parameter, KIND, BITS)
        elif NAME != "exact":
            WIDE: tl.constexpr = max(BITS, 32)  # of the compute type, which T and R have
            kind: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
            limit = _value(tl.load(parameter).to(kind), WIDE, EXPONENT)
            v, w = _value(p, BITS, EXPONENT), _value(q, BITS, EXPONENT)
            delta = tl.abs(v - w)
            if NAME == "atol":
                differ &= (delta > limit) | (delta != delta)  # a NaN is further than any T
            else:
                largest = tl.maximum(tl.abs(v), tl.abs(w))
                # inf > R*inf is false, yet an infinity differs from everything but itself
                far = delta > largest * limit
                differ &= far | _nonfinite(p, q, BITS, EXPONENT, MANTISSA)
    return differ


@triton.jit  # type: ignore[untyped-decorator]
def _seen(stored: tl.tensor, RULES: tl.constexpr, AT: tl.constexpr) -> tl.tensor:
    """Raw bits of what is compared: as it is stored, or rounded."""
    BITS: tl.constexpr = RULES[AT + 2]
    EXPONENT: tl.constexpr = RULES[AT + 3]
    MANTISSA: tl.constexpr = RULES[AT + 4]
    BIAS: tl.constexpr = RULES[AT + 5]
    TO_BITS: tl.constexpr = RULES[AT + 7]
    TO_EXPONENT: tl.constexpr = RULES[AT + 8]
    TO_MANTISSA: tl.constexpr = RULES[AT + 9]
    TO_BIAS: tl.constexpr = RULES[AT + 10]
    x = stored if BITS >= 32 else stored.to(tl.int32)
    if TO_MANTISSA > MANTISSA or TO_EXPONENT > EXPONENT:
        # F16 and BF16 to each other: exact in F32 first, then one rounding
        exact = _value(x, BITS, EXPONENT).to(tl.int32, bitcast=True)
        x = _round(exact, 32, 8, 23, 127, TO_BITS, TO_EXPONENT, TO_MANTISSA, TO_BIAS)
    elif TO_MANTISSA < MANTISSA:
        x = _round(x, BITS, EXPONENT, MANTISSA, BIAS, TO_BITS, TO_EXPONENT, TO_MANTISSA, TO_BIAS)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _unsigned(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    return x.to(tl.uint64 if BITS == 64 else tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def _magnitude(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """A float's bits without the sign."""
    return x & ((1 << (BITS - 1)) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _nonfinite(
    x: tl.tensor, y: tl.tensor, BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr
) -> tl.tensor:
    """Where either is an infinity or NaN."""
    INFINITY: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
    return (_magnitude(x, BITS) >= INFINITY) | (_magnitude(y, BITS) >= INFINITY)


@triton.jit  # type: ignore[untyped-decorator]
def _distance(x: tl.tensor, y: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """|x - y| of integers, without sign."""
    p, q = _unsigned(x, BITS), _unsigned(y, BITS)
    return tl.where(x > y, p - q, q - p)


@triton.jit  # type: ignore[untyped-decorator]
def _float_ulp(
    x: tl.tensor,
    y: tl.tensor,
    limit: tl.tensor,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
) -> tl.tensor:
    """Where floats are more than so many representable values apart."""
    a, b = _magnitude(x, BITS), _magnitude(y, BITS)
    p, q = _unsigned(a, BITS), _unsigned(b, BITS)
    apart = tl.where((x ^ y) < 0, p + q, _distance(a, b, BITS))
    return (apart > _unsigned(limit, BITS)) | _nonfinite(x, y, BITS, EXPONENT, MANTISSA)


@triton.jit  # type: ignore[untyped-decorator]
def _integer_rtol(
    x: tl.tensor, y: tl.tensor, parameter: tl.tensor, KIND: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """|x - y| > m * max(|x|, |y|) * 2**-s, with the product's 128 bits; 52 <= s <= 127."""
    m = tl.load(parameter).to(tl.uint64)
    s = tl.load(parameter + 1).to(tl.uint64)
    if KIND == "int":  # of the smallest integer: itself, which is right without sign
        p = _unsigned(tl.where(x < 0, -x, x), BITS)
        q = _unsigned(tl.where(y < 0, -y, y), BITS)
    else:
        p, q = _unsigned(x, BITS), _unsigned(y, BITS)
    most = tl.where(p > q, p, q).to(tl.uint64)
    m += tl.zeros_like(most)
    low, high = most * m, tl.umulhi(most, m)
    near = tl.where(s < 64, s, 63)
    below = (low >> near) | (high << (64 - near))
    limit = tl.where(s < 64, below, high >> (tl.where(s < 64, 64, s) - 64))
    return _distance(x, y, BITS).to(tl.uint64) > limit


@triton.jit  # type: ignore[untyped-decorator]
def _value(x: tl.tensor, BITS: tl.constexpr, EXPONENT: tl.constexpr) -> tl.tensor:
    """A float's value in the compute type. Exact."""
    if BITS == 64:
        value = x.to(tl.float64, bitcast=True)
    elif BITS == 32:
        value = x.to(tl.float32, bitcast=True)
    elif EXPONENT == 5:
        value = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (x << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _round(
    x: tl.tensor,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    TO_BITS: tl.constexpr,
    TO_EXPONENT: tl.constexpr,
    TO_MANTISSA: tl.constexpr,
    TO_BIAS: tl.constexpr,
) -> tl.tensor:
    """Round: nearest-even in one step, overflow to inf, every NaN to one NaN."""
    INFINITY: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
    TO_INFINITY: tl.constexpr = ((1 << TO_EXPONENT) - 1) << TO_MANTISSA
    CUT: tl.constexpr = MANTISSA - TO_MANTISSA
    REBIAS: tl.constexpr = BIAS - TO_BIAS
    magnitude = _magnitude(x, BITS)
    # Of some NaNs the sum overflows, and what becomes negative is too small to be normal in the
    # target; both are replaced below.
    rounded = tl.minimum(_shifted(magnitude - (REBIAS << MANTISSA), CUT), TO_INFINITY)
    if REBIAS:
        # too small to be normal in the target: shift the whole significand, further the smaller
        exponent = magnitude >> MANTISSA
        IMPLICIT: tl.constexpr = 1 << MANTISSA  # not of subnormals, which round to zero either way
        significand = (magnitude & (IMPLICIT - 1)) | IMPLICIT
        # one bit above the significand: everything there rounds to zero
        by = tl.minimum(tl.maximum(CUT + REBIAS + 1 - exponent, 1), MANTISSA + 2)
        rounded = tl.where(exponent <= REBIAS, _shifted(significand, by), rounded)
    NAN: tl.constexpr = TO_INFINITY | (1 << (TO_MANTISSA - 1))
    negative = (x < 0).to(x.dtype) << (TO_BITS - 1)
    rounded = tl.where(magnitude > INFINITY, NAN, rounded | negative)
    if TO_BITS == 16:
        rounded = rounded.to(tl.int16)  # the sign is carried on from here
    return rounded.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _shifted(values: tl.tensor, by: tl.tensor) -> tl.tensor:
    """``values / 2**by`` to the nearest whole number, ties to even; ``by`` is at least 1."""
    odd = (values >> by) & 1
    half = (tl.full((), 1, values.dtype) << (by - 1)) - 1
    return (values + odd + half) >> by
