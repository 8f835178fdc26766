"""The kernels against their slow twin: every dtype, every rule, and the bits where floats break."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, random_bits, run, some_elements, specials, tough_pairs
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import Results, hashing
from ckdiff.kernels.codegen import lanes

MAX32 = "3.4028234663852886e+38"
TIE32 = "3.4028235677973366e+38"  # half a step past it: rounds to infinity
BELOW32 = "3.4028235677973362e+38"
T = ["0", "5e-324", "7e-46", "7.1e-46", "1e-45", "1e-38", "1e-5", "0.001953125", "0.001", "0.1",
     "0.25", "0.999999999", "1", "1.5", "2", "127", "255", "448", "65504", "1e10", MAX32,
     BELOW32, TIE32, "1e39", "1.7976931348623157e+308"]  # fmt: skip
R = ["0", "1e-300", "1e-46", "1e-45", "1e-38", "1e-8", "1e-3", "0.0078125", "0.1", "0.3", "0.5",
     "1", "1.9999", "2", "2.5", "1e30", "1e39", "1e300"]  # fmt: skip
K = ["0", "1", "2", "3", "7", "8", "127", "128", "255", "256", "32767", "32768", "65534", "65535",
     "65536", "2147483647", "4294967295", "9223372036854775807", "18446744073709551614",
     "18446744073709551615"]  # fmt: skip
RULES = [
    "exact", *(f"atol={t}" for t in T), *(f"rtol={r}" for r in R), *(f"ulp={k}" for k in K),
]  # fmt: skip
#: dtype and target of every rounding
ROUNDINGS = [(source, t) for t, sources in naive.ROUNDED.items() for source in sources]


def agree_with_twin(
    dtype: str, rules: Sequence[str], x: naive.Bits, y: naive.Bits, *, sample: int = 60
) -> None:
    """Hold the kernels against the numpy twin, and that one, on a sample, against the pure one."""
    found = run(dtype, rules, x.tobytes(), y.tobytes(), offset=1)
    twin = naive.Pairs(dtype, x, y)
    noise = random.Random(dtype)
    for rule in rules:
        expected = twin.changed(rule)
        flags = found.flags(rule, len(x))
        wrong = np.flatnonzero(flags != expected)
        first = [(hex(x[i]), hex(y[i]), bool(expected[i])) for i in wrong[:3]]
        assert not wrong.size, f"{dtype} {rule}: {wrong.size} wrong, such as {first}"
        assert found.changed[rule] == int(expected.sum())
        for i in noise.choices(range(len(x)), k=sample):
            assert naive.changed(rule, dtype, int(x[i]), int(y[i])) == expected[i], (rule, x[i])


# -- the twin itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16"])
def test_the_twin_reads_floats_as_the_machine_does(dtype: str) -> None:
    kind: Any = {"F32": np.float32, "F64": np.float64, "F16": np.float16}[dtype]
    x = np.concatenate([tough_pairs(dtype, 300)[0][-2000:], random_bits(dtype, 200, 9)])
    with np.errstate(all="ignore"):
        numbers = x.view(kind).astype(float).tolist()
    for bits, number in zip(x.tolist(), numbers, strict=True):
        found = naive.value(dtype, bits)
        assert found == number or (found != found and number != number)


def test_the_twin_packs_bits() -> None:
    assert naive.packed([True] + [False] * 8 + [True]) == b"\x01\x02"
    assert naive.elements("F4", b"\x21\x43") == [1, 2, 3, 4]
    assert naive.elements("F6_E2M3", (1 | 2 << 6 | 3 << 12 | 4 << 18).to_bytes(3, "little")) == [
        1, 2, 3, 4,
    ]  # fmt: skip
    for dtype in naive.FORMATS:
        data = random.Random(dtype).randbytes(96)
        assert naive.as_bits(dtype, data).tolist() == naive.elements(dtype, data)


def test_the_tables_agree() -> None:
    assert set(DTYPES) == set(naive.FORMATS)
    for name, f in naive.FORMATS.items():
        assert DTYPES[name].bits == f.bits
        assert DTYPES[name].numeric == (f.family != "raw")


# -- masks and counts ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [d for d, f in naive.FORMATS.items() if f.bits == 8])
def test_every_pair_of_8_bit_elements(dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    rules = [*RULES, "exact@bf16", "atol=0.1@f16", "ulp=1@f32"]  # which these are not rounded to
    agree_with_twin(dtype, rules, np.repeat(every, 256), np.tile(every, 256), sample=100)


@pytest.mark.parametrize("dtype", [d for d, f in naive.FORMATS.items() if f.bits == 16])
def test_every_16_bit_element_with_many_others(dtype: str) -> None:
    x = np.arange(1 << 16, dtype=np.uint16)
    partners = [x, x ^ 0x8000, x + 1, x - 1, x + 2, x + 127, x ^ 1, x ^ 0x8001, x + 0x80]
    partners += [np.full_like(x, s) for s in specials(dtype)[::5]]
    partners += [np.random.default_rng(i).permutation(x) for i in range(2)]
    agree_with_twin(dtype, RULES, np.tile(x, len(partners)), np.concatenate(partners), sample=100)


@pytest.mark.parametrize(("dtype", "target"), [("F16", "bf16"), ("BF16", "f16")])
def test_16_bit_elements_rounded(dtype: str, target: str) -> None:
    x = np.arange(1 << 16, dtype=np.uint16)
    partners = [x, x ^ 0x8000, x + 1, x - 1, x + 3, x + 16, x * 0, x * 0 + 0x3C00]
    partners += [np.random.default_rng(i).permutation(x) for i in range(2)]
    rules = [f"{rule}@{target}" for rule in RULES]
    agree_with_twin(dtype, rules, np.tile(x, len(partners)), np.concatenate(partners), sample=100)


@pytest.mark.parametrize("dtype", ["F32", "F64", "U32", "I32", "U64", "I64", "C64"])
def test_wide_elements(dtype: str) -> None:
    x, y = tough_pairs(dtype, 300 if dtype in naive.INTEGERS else 3000)
    if dtype in naive.INTEGERS and len(x) > 12_000:
        keep = np.random.default_rng(0).permutation(len(x))[:12_000]
        x, y = x[keep], y[keep]
    agree_with_twin(dtype, RULES, x, y, sample=100)


@pytest.mark.parametrize(("dtype", "target"), [r for r in ROUNDINGS if r[0] in ("F32", "F64")])
def test_wide_elements_rounded(dtype: str, target: str) -> None:
    x, y = tough_pairs(dtype, 1000)
    if len(x) > 30_000:
        keep = np.random.default_rng(0).permutation(len(x))[:30_000]
        x, y = x[keep], y[keep]
    rules = [f"{rule}@{target}" for rule in RULES[::3]]
    agree_with_twin(dtype, rules, x, y, sample=100)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_sub_byte_elements(dtype: str) -> None:
    bits = naive.FORMATS[dtype].bits
    pairs = list(itertools.product(range(1 << bits), repeat=2))
    random.Random(0).shuffle(pairs)
    for shift in range(4):  # each pair at several places of a word
        turned = pairs[shift:] + pairs[:shift]
        x, y = (
            sum(p[side] << i * bits for i, p in enumerate(turned)).to_bytes(
                len(turned) * bits // 8, "little"
            )
            for side in range(2)
        )
        found = run(dtype, ["atol=100", "ulp=9@bf16"], x, y, offset=shift)
        for rule, mask in found.masks.items():
            assert mask.tobytes() == naive.packed([a != b for a, b in turned])
            assert found.changed[rule] == len(pairs) - (1 << bits)


def test_large_integers_are_exact() -> None:
    x = np.array([2**53, 2**53, 2**63 - 1, 2**63, 0, 2**64 - 1], np.uint64)
    y = np.array([2**53 + 1, 2**53, 2**63, 2**63 - 1, 2**64 - 1, 2**64 - 2], np.uint64)
    rules = ["atol=0", "atol=1", "ulp=1", "rtol=1e-17", "rtol=1.1102230246251565e-16", "rtol=1"]
    agree_with_twin("U64", rules, x, y)
    agree_with_twin("I64", rules, x, y)
    found = run("I64", ["ulp=18446744073709551614", "ulp=18446744073709551615"],
                np.int64(-(2**63)).tobytes(), np.int64(2**63 - 1).tobytes())  # fmt: skip
    assert list(found.changed.values()) == [1, 1, 0]


def test_one_step_of_bf16_is_what_the_probe_sees() -> None:
    """R = 1e-3 on finite bf16 equals ``exact`` but for the zeros."""
    x = np.arange(1 << 16, dtype=np.uint16)
    x = x[(x & 0x7F80) != 0x7F80]
    for y in (x ^ 1, x + 1, np.random.default_rng(0).permutation(x)):
        y = np.where((y & 0x7F80) == 0x7F80, x, y).astype(np.uint16)
        found = run("BF16", ["rtol=1e-3"], x.tobytes(), y.tobytes())
        zeros = (x & 0x7FFF == 0) & (y & 0x7FFF == 0)
        assert (found.flags("exact", len(x)) & ~zeros == found.flags("rtol=1e-3", len(x))).all()


# -- rounding --------------------------------------------------------------------------------------


@cache
def rounder(source: str, target: str) -> Any:
    """A compiled loop over ``lanes.round_to``."""

    @intrinsic
    def word(typing: Any, bits: Any, out: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            loaded = lanes.load_bits(b, DTYPES[source], args[0])
            value = lanes.round_to(b, DTYPES[source], DTYPES[target], loaded)
            lane = lanes.int_type(DTYPES[target].bits)
            pointer = b.inttoptr(args[1], lanes.vector(lane).as_pointer())
            b.store(value, pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    steps = DTYPES[source].bits * 8, DTYPES[target].bits * 8

    @njit
    def loop(bits: int, out: int, words: int) -> None:
        for i in range(words):
            word(bits + i * steps[0], out + i * steps[1])

    return loop


def rounded(source: str, target: str, x: naive.Bits) -> naive.Bits:
    count = -(-len(x) // 64) * 64
    padded = np.zeros(count, x.dtype)
    padded[: len(x)] = x
    out = np.zeros(count, f"<u{DTYPES[target].bits // 8}")
    rounder(source, target)(padded.ctypes.data, out.ctypes.data, count // 64)
    return out[: len(x)]


@pytest.mark.parametrize(("source", "target"), [("F16", "BF16"), ("BF16", "F16")])
def test_rounding_of_every_16_bit_float(source: str, target: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = [naive.round_bits(source, target, bits) for bits in range(1 << 16)]
    assert rounded(source, target, every).tolist() == expected


@pytest.mark.parametrize(
    ("source", "target"),
    [("F32", "BF16"), ("F32", "F16"), ("F64", "F32"), ("F64", "BF16"), ("F64", "F16")],
)
def test_rounding_of_wide_floats(source: str, target: str) -> None:
    f, g = naive.FORMATS[source], naive.FORMATS[target]
    # every finite number of a 16-bit target and every point halfway, and what lies beside them
    step = max(1, (1 << g.bits) // (1 << 12))
    grid: list[int] = []
    for bits in range(0, (1 << g.exponent) - 1 << g.mantissa, step | 1):
        low, high = (naive.value(target, b) for b in (bits, bits + 1))
        between = low if isinstance(high, float) else (low + high) / 2
        doubles = (int(np.float64(float(x)).view(np.uint64)) for x in (low, between))
        grid.extend(naive.round_bits("F64", source, d) if f.bits == 32 else d for d in doubles)
    exact = np.array(grid, f"<u{f.bits // 8}")
    sides = [exact, exact + 1, np.maximum(exact, 1) - 1]
    known = np.array(specials(source), exact.dtype)
    x = np.concatenate([*sides, exact | (1 << f.bits - 1), known, random_bits(source, 2000, 7)])
    # random mantissas at every exponent that matters to the target
    near = np.arange(f.bias - g.bias - g.mantissa - 3, f.bias + g.bias + 3).astype(exact.dtype)
    near = near[near < (1 << f.exponent) - 1]
    noise = random_bits(source, 8 * len(near), 8) & exact.dtype.type((1 << f.mantissa) - 1)
    x = np.concatenate([x, np.repeat(near, 8) << exact.dtype.type(f.mantissa) | noise])
    expected = [naive.round_bits(source, target, bits) for bits in x.tolist()]
    found = rounded(source, target, x)
    wrong = np.flatnonzero(found != np.array(expected, found.dtype))
    assert not wrong.size, [(hex(x[i]), hex(found[i]), hex(expected[i])) for i in wrong[:5]]
    # the quick twin is right too
    assert (naive.round_array(source, target, x) == found).all()


# -- lengths, addresses, several dtypes ------------------------------------------------------------


LENGTHS = [*range(1, 131), 511, 512, 513, 1023, 1025, 65535, 65536, 65537]


@pytest.mark.parametrize("dtype", naive.FORMATS)
def test_odd_lengths_and_addresses(dtype: str) -> None:
    rules = ["atol=1e-5", "rtol=1e-3", "ulp=2"]
    step = naive.per_byte(dtype)
    base, tuned = some_elements(dtype, 65540, 1)
    x, y = naive.as_bits(dtype, base), naive.as_bits(dtype, tuned)
    twin = naive.Pairs(dtype, x, y)
    expected = {rule: twin.changed(rule) for rule in ["exact", *rules]}
    for length in LENGTHS:
        count = -(-length // step) * step
        size = count * naive.FORMATS[dtype].bits // 8
        offset = length % 9
        found = run(dtype, rules, base[:size], tuned[:size], offset=offset)
        for rule, flags in expected.items():
            assert (found.flags(rule, count) == flags[:count]).all(), (rule, count)
            assert found.changed[rule] == int(flags[:count].sum())
        if length < 1100:
            hashes = [naive.content_hash(dtype, side[:size]) for side in (base, tuned)]
            assert found.hashes == hashes


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_windows_of_several_tensors(data: st.DataObject) -> None:
    """Tensors of all dtypes in one call, at their addresses, some of them in pieces."""
    rules = ("exact", "atol=0.001", "rtol=1e-3", "ulp=1", "exact@bf16", "atol=1e-5@f16")
    compared = kernels(tuple(DTYPES), rules, stats=True)
    names = data.draw(st.lists(st.sampled_from(list(DTYPES)), min_size=1, max_size=6))
    segments, keep, expected = [], [], []
    position = 0
    for row, dtype in enumerate(names):
        step = naive.per_byte(dtype)
        count = data.draw(st.integers(1, 1500)) * step
        base, tuned = some_elements(dtype, count, data.draw(st.integers(0, 999)))
        offset = data.draw(st.integers(0, 9))
        buffers = [np.frombuffer(b"\x77" * offset + d + b"\x99" * 64, np.uint8) for d in
                   (base, tuned)]  # fmt: skip
        keep.append(buffers)
        cut = data.draw(st.integers(0, count // 512)) * 512
        bits = DTYPES[dtype].bits
        for first, stop in ((cut, count), (0, cut)):  # the later piece first
            if stop > first:
                start = [b.ctypes.data + offset + first * bits // 8 for b in buffers]
                at = position + first
                segments.append(
                    [*start, stop - first, at, compared.slot_of[dtype], first // 512, row]
                )
        expected.append((position, count, dtype, base, tuned))
        position += -(-count // 512) * 512
    masks = [np.zeros(position // 8, np.uint8) for _ in rules]
    into = Results(len(names), len(rules), with_statistics=True)
    compared.run(np.array(segments, np.int64), masks, into)
    for row, (at, count, dtype, base, tuned) in enumerate(expected):
        twin = naive.Pairs(dtype, naive.as_bits(dtype, base), naive.as_bits(dtype, tuned))
        for i, rule in enumerate(rules):
            want = twin.changed(rule)
            flags = np.unpackbits(masks[i], bitorder="little")[at : at + -(-count // 512) * 512]
            assert (flags[:count] == want).all()
            assert not flags[count:].any()
            assert into.changed[row, i] == want.sum()
        low = into.hashes[row].tolist()
        assert hashing.finish(low[0], low[1], len(base)) == naive.content_hash(dtype, base)
        assert hashing.finish(low[2], low[3], len(tuned)) == naive.content_hash(dtype, tuned)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(naive.FLOATS),
    kind=st.sampled_from(["atol", "rtol"]),
    number=st.floats(0, allow_infinity=False, allow_nan=False),
    data=st.data(),
)
@example(dtype="F32", kind="rtol", number=0.0, data=None)
def test_any_tolerance_on_floats(
    dtype: str, kind: str, number: float, data: st.DataObject | None
) -> None:
    x, y = tough_pairs(dtype, 40)
    rule = f"{kind}={number!r}"
    agree_with_twin(dtype, [rule], x, y, sample=1)
    if data is None:
        return
    # the tolerance that is exactly the difference, and its neighbours
    width = naive.FORMATS[dtype].bits // 8
    both = data.draw(st.binary(min_size=2 * width, max_size=2 * width))
    a, b = naive.elements(dtype, both)
    u, v = naive.value(dtype, a), naive.value(dtype, b)
    if isinstance(u, float) or isinstance(v, float):
        return
    delta = naive.rounded(abs(u - v), "F64" if dtype == "F64" else "F32")
    for t in (
        float(delta),
        math.nextafter(float(delta), 0),
        math.nextafter(float(delta), math.inf),
    ):
        if math.isfinite(t):
            rule = f"atol={t!r}"
            found = run(dtype, [rule], both[:width], both[width:])
            assert bool(found.changed[rule]) == naive.changed(rule, dtype, a, b)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(naive.INTEGERS),
    number=st.one_of(
        st.floats(0, 2.5), st.floats(0, allow_infinity=False, allow_nan=False),
        st.builds(lambda p, q: p / q, st.integers(0, 2**64), st.integers(1, 2**64)),
    ),
    data=st.data(),
)  # fmt: skip
def test_any_tolerance_on_integers(dtype: str, number: float, data: st.DataObject) -> None:
    bits = naive.FORMATS[dtype].bits
    drawn = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=2, max_size=8))
    pairs = list(itertools.product([*drawn, 0, 2 ** (bits - 1), 2**bits - 1], repeat=2))
    x, y = (b"".join(p[side].to_bytes(bits // 8, "little") for p in pairs) for side in range(2))
    # also the ratio at which a pair lies on the edge, as closely as a float64 says it
    a, b = (abs(naive.value(dtype, v)) for v in drawn[:2])
    edge = float(abs(naive.value(dtype, drawn[0]) - naive.value(dtype, drawn[1])) / max(a, b, 1))
    rules = [f"rtol={number!r}", f"atol={number!r}", f"rtol={edge!r}",
             f"rtol={math.nextafter(edge, 0)!r}", f"rtol={math.nextafter(edge, 3)!r}"]  # fmt: skip
    rules = list(dict.fromkeys(rules))
    found = run(dtype, rules, x, y)
    for rule in rules:
        want = [naive.changed(rule, dtype, *p) for p in pairs]
        assert found.masks[rule].tobytes() == naive.packed(want), rule
        assert found.changed[rule] == sum(want)
