"""Floats of one dtype as floats of another, against numpy, ml_dtypes and sorted numbers."""

from __future__ import annotations

import itertools

import naive
import naive_values as twin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import random_bits, specials

from ckdiff.dtypes import DTYPES, common
from ckdiff.kernels.casting import narrow, widen

FLOATS = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64"]
SMALL = FLOATS[:6]
WIDENINGS = [
    (source, target)
    for source, target in itertools.permutations(FLOATS, 2)
    if target in ("F16", "BF16", "F32", "F64") and DTYPES[target].holds(DTYPES[source])
]
ROUNDINGS = [
    (source, target)
    for source, target in itertools.permutations(FLOATS, 2)
    if source in ("F16", "BF16", "F32", "F64") and not DTYPES[target].holds(DTYPES[source])
]


def every(dtype: str, count: int = 1 << 17) -> naive.Bits:
    """All patterns of a small dtype; the tough ones of a large one, and random ones."""
    bits = naive.FORMATS[dtype].bits
    if bits <= 16:
        return np.arange(1 << bits, dtype=f"u{bits // 8}")
    kind = f"u{bits // 8}"
    known = np.array(specials(dtype), kind)
    noise = random_bits(dtype, count, 5)
    # halfway between two numbers of the target, or beside it, at exponents at which it has any
    ragged = random_bits(dtype, count, 6).astype(np.uint64)
    f = naive.FORMATS[dtype]
    low = np.random.default_rng(7).integers(f.mantissa - 26 if bits == 64 else 0, f.mantissa, count)
    cut = ragged >> low.astype(np.uint64) << low.astype(np.uint64)
    exponent = np.random.default_rng(8).integers(f.bias - 160, f.bias + 140, count)
    exponent = np.clip(exponent, 0, (1 << f.exponent) - 1).astype(np.uint64)
    keep = np.uint64((1 << f.mantissa) - 1 | 1 << bits - 1)
    near = (cut & keep) | exponent << np.uint64(f.mantissa)
    beside = near + np.random.default_rng(9).integers(-1, 2, count).astype(np.uint64)
    infinity = np.uint64((1 << f.exponent) - 1 << f.mantissa)
    nans = (ragged >> np.uint64(12)) | infinity | (ragged & np.uint64(1 << bits - 1))
    return np.concatenate([known, noise, *(part.astype(kind) for part in (near, beside, nans))])


def cast(name: str, source: str, target: str, bits: naive.Bits) -> tuple[naive.Bits, int]:
    """Run a kernel between odd addresses, with guards around what it writes."""
    data, wide = bits.tobytes(), naive.FORMATS[target].bits // 8
    held = np.full(len(data) + 1, 0x55, np.uint8)
    held[1:] = np.frombuffer(data, np.uint8)
    out = np.full(len(bits) * wide + 65, 0xEE, np.uint8)
    found = (widen if name == "widen" else narrow)(held[1:], source, target, out[1:-64])
    assert out[0] == 0xEE
    assert (out[-64:] == 0xEE).all()
    return np.frombuffer(out[1:-64].tobytes(), f"u{wide}"), found or 0


def same(found: naive.Bits, expected: naive.Bits, bits: naive.Bits) -> None:
    wrong = np.flatnonzero(found != expected)
    first = [(hex(bits[i]), hex(found[i]), hex(expected[i])) for i in wrong[:3]]
    assert not wrong.size, f"{wrong.size} wrong, such as {first}"


# -- which dtypes hold which -----------------------------------------------------------------------


def test_what_holds_a_small_float_holds_every_number_of_it() -> None:
    for wide, small in itertools.product(FLOATS, SMALL):
        if naive.FORMATS[wide].family == "ieee":
            assert DTYPES[wide].holds(DTYPES[small]) == twin.holds(wide, small), (wide, small)
        else:
            assert not DTYPES[wide].holds(DTYPES[small])
    assert not DTYPES["F32"].holds(DTYPES["F64"])
    assert DTYPES["F64"].holds(DTYPES["F32"])


def test_the_smallest_dtype_that_holds_both() -> None:
    for one, other in itertools.product(SMALL, repeat=2):
        wide = [w for w in ("F16", "BF16", "F32") if twin.holds(w, one) and twin.holds(w, other)]
        assert common(one, other) == wide[0]
    for name in FLOATS:
        assert common("F64", name) == common(name, "F64") == "F64"
    assert common("BF16", "F16") == common("F32", "F8_E4M3") == "F32"
    assert common("F8_E4M3", "F8_E5M2") == "F16"
    assert common("F8_E5M2", "BF16") == "BF16"


@pytest.mark.parametrize(
    "name", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "BOOL", "C64", "I8", "U8", "I32", "U64", "X"]
)
def test_no_dtype_holds_what_has_no_value_here(name: str) -> None:
    for other in (*FLOATS, name):
        assert common(name, other) is common(other, name) is None


# -- widening --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), WIDENINGS)
def test_every_element_is_widened(source: str, target: str) -> None:
    bits = every(source)
    found, _ = cast("widen", source, target, bits)
    same(found, twin.wider(source, target, bits), bits)
    back, rounded = cast("narrow", target, source, found)
    assert rounded == 0, "nothing that was widened is rounded on the way back"
    assert np.array_equal(back, bits)


def test_nans_keep_sign_and_payload() -> None:
    for source, target, before, after in [
        ("BF16", "F32", 0x7F81, 0x7F810000),  # signals, and still does
        ("F16", "F32", 0xFC01, 0xFF802000),
        ("F32", "F64", 0xFF800001, 0xFFF0000020000000),
        ("F8_E5M2", "F16", 0x7D, 0x7D00),
        ("F8_E5M2", "BF16", 0xFE, 0xFFC0),
        ("F8_E4M3", "F16", 0x7F, 0x7F80),
        ("F8_E4M3", "F32", 0xFF, 0xFFF00000),
        ("F8_E4M3FNUZ", "F32", 0x80, 0xFFC00000),
        ("F8_E5M2FNUZ", "F16", 0x80, 0xFE00),
    ]:
        kind = f"u{DTYPES[source].bits // 8}"
        found, _ = cast("widen", source, target, np.array([before], kind))
        assert hex(found[0]) == hex(after), (source, target)


# -- rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), ROUNDINGS)
def test_every_element_is_rounded_to_the_nearest(source: str, target: str) -> None:
    bits = every(source)
    found, rounded = cast("narrow", source, target, bits)
    expected = twin.single(bits) if target == "F32" else twin.nearest(source, target, bits)
    same(found, expected, bits)
    wide = bits if source == "F64" else twin.wider(source, "F64", bits)
    back = twin.wider(target, "F64", expected)
    assert rounded == int((back != wide).sum())


def test_rounded_numbers_by_hand() -> None:
    for source, target, before, after in [
        ("F32", "BF16", 0x7F7FFFFF, 0x7F80),  # the largest one: infinity
        ("F32", "BF16", 0x7F800001, 0x7F81),  # a NaN whose payload would be lost
        ("F32", "BF16", 0x3F808000, 0x3F80),  # a tie, to even
        ("F32", "BF16", 0x3F818000, 0x3F82),
        ("F64", "BF16", 0x3FF0100000000001, 0x3F81),  # just above: through F32 it would be a tie
        ("F32", "F8_E4M3", 0x43E00000, 0x7E),  # 448
        ("F32", "F8_E4M3", 0xC3E80001, 0xFE),  # beyond -464
        ("F32", "F8_E4M3", 0x7F800000, 0x7E),
        ("F32", "F8_E5M2", 0x47800000, 0x7C),
        ("F32", "F8_E4M3FNUZ", 0x80000000, 0x00),
        ("F32", "F8_E4M3FNUZ", 0xFF800000, 0x80),
    ]:
        kind = f"u{DTYPES[source].bits // 8}"
        found, _ = cast("narrow", source, target, np.array([before], kind))
        assert hex(found[0]) == hex(after), (source, target, hex(before))


@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
def test_as_torch_rounds(source: str) -> None:
    """Numbers, infinities too; torch makes other NaNs."""
    torch = pytest.importorskip("torch")
    bits = every(source, 1 << 12)
    there = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    there |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    x = torch.from_numpy(bits.copy()).view(there[source])
    numbers = ~torch.isnan(x).numpy()
    for target in set(there) - {source}:
        if (source, target) in ROUNDINGS:
            expected = x.to(there[target]).view(torch.uint8).numpy()
            expected = expected.view(f"u{DTYPES[target].bits // 8}")[numbers]
            found, _ = cast("narrow", source, target, bits)
            same(found[numbers], expected, bits[numbers])


# -- any size and place ----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    pair=st.sampled_from(WIDENINGS + ROUNDINGS),
    elements=st.integers(0, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_number_of_elements(pair: tuple[str, str], elements: int, seed: int) -> None:
    source, target = pair
    known = np.array(specials(source), random_bits(source, 1, 0).dtype)
    noise = random_bits(source, elements, seed)
    rng = np.random.default_rng(seed)
    bits = np.where(rng.random(elements) < 0.4, rng.choice(known, elements), noise)
    if pair in WIDENINGS:
        found, _ = cast("widen", source, target, bits)
        same(found, twin.wider(source, target, bits), bits)
    else:
        found, rounded = cast("narrow", source, target, bits)
        expected = twin.single(bits) if target == "F32" else twin.nearest(source, target, bits)
        same(found, expected, bits)
        wide = bits if source == "F64" else twin.wider(source, "F64", bits)
        assert rounded == int((twin.wider(target, "F64", expected) != wide).sum())


def test_the_same_dtype_is_copied() -> None:
    data = np.arange(10, dtype=np.uint8)
    out = np.zeros(12, np.uint8)
    assert narrow(data, "BF16", "BF16", out) == 0
    assert out.tolist() == [*range(10), 0, 0]


@pytest.mark.parametrize(
    ("name", "source", "target", "size", "room"),
    [
        ("widen", "F16", "BF16", 4, 8),
        ("widen", "BF16", "F16", 4, 8),
        ("widen", "F32", "BF16", 4, 8),
        ("widen", "I8", "F32", 4, 16),
        ("widen", "F4", "F16", 4, 16),
        ("widen", "BF16", "F32", 3, 16),
        ("widen", "BF16", "F32", 4, 7),
        ("widen", "BF16", "BF16", 4, 3),
        ("narrow", "F8_E4M3", "F8_E5M2", 4, 4),
        ("narrow", "F32", "I8", 4, 4),
        ("narrow", "F8_E8M0", "F32", 4, 16),
        ("narrow", "F32", "BF16", 8, 3),
    ],
)
def test_what_cannot_be_cast(name: str, source: str, target: str, size: int, room: int) -> None:
    function = widen if name == "widen" else narrow
    with pytest.raises(ValueError, match=r"\w"):
        function(np.zeros(size, np.uint8), source, target, np.zeros(room, np.uint8))
