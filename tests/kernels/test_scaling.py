"""Quantised elements by value, against one product at a time."""

from __future__ import annotations

import itertools
import math

import naive
import naive_values as twin
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.kernels import abi, codegen
from ckdiff.kernels.codegen import scaling as generated
from ckdiff.kernels.compiled import Function
from ckdiff.kernels.scaling import QUANTISED, Scaling, powers_of_two, scale, scaled, turned

SCALES = ["F32", "BF16", "F16", "F8_E8M0"]


def as_float32(dtype: str, scales: bytes) -> npt.NDArray[np.float32]:
    """Scales as numbers, by a library, and powers of two by hand."""
    if dtype == "F8_E8M0":
        powers = [math.nan if e == 255 else 2.0 ** (e - 127) for e in scales]
        return np.array(powers, np.float32)
    with np.errstate(all="ignore"):
        return np.frombuffer(scales, twin.LIBRARY[dtype]).astype(np.float32)


def run(
    scaling: Scaling, start: int, stop: int, data: bytes, scales: bytes, spare: tuple[int, int]
) -> bytes:
    """The values of a range of a whole tensor, made of just what it needs.

    ``spare`` says how many more scales are given before and after those.
    """
    bits = naive.FORMATS[scaling.dtype].bits
    width = naive.FORMATS[scaling.scale_dtype].bits // 8
    low, high = scaling.needed(start, stop)
    low, high = max(0, low - spare[0]), min(scaling.scales, high + spare[1])
    held = np.full(1 + -(-(stop - start) * bits // 8), 0x55, np.uint8)
    first = start * bits // 8
    held[1:] = np.frombuffer(data, np.uint8)[first : first + len(held) - 1]
    given = np.full(1 + (high - low) * width, 0x55, np.uint8)
    given[1:] = np.frombuffer(scales, np.uint8)[low * width : high * width]
    out = np.full(4 * (stop - start) + 65, 0xEE, np.uint8)
    scale(held[1:], scaling, start, given[1:], low, out[1:-64])
    assert out[0] == 0xEE
    assert (out[-64:] == 0xEE).all()
    return out[1:-64].tobytes()


def expected(scaling: Scaling, start: int, stop: int, data: bytes, scales: bytes) -> bytes:
    shape = scaling.matrices, scaling.rows, scaling.columns
    which = [twin.scale_position(at, shape, scaling.block) for at in range(start, stop)]
    bits = naive.FORMATS[scaling.dtype].bits
    part = data[start * bits // 8 : -(-stop * bits // 8)]
    return twin.values(scaling.dtype, part, as_float32(scaling.scale_dtype, scales), which)


def agree(found: bytes, wanted: bytes) -> None:
    wrong = np.flatnonzero(np.frombuffer(found, "<u4") != np.frombuffer(wanted, "<u4"))
    assert not wrong.size, f"{wrong.size} wrong, the first at {wrong[0]}"


def some_scales(scaling: Scaling, rng: np.random.Generator) -> bytes:
    """Plausible ones and any bits."""
    count = scaling.scales
    noise = rng.bytes(count * naive.FORMATS[scaling.scale_dtype].bits // 8)
    if scaling.scale_dtype == "F8_E8M0" or rng.random() < 0.5:
        return noise
    usual = rng.standard_normal(count).astype(np.float32) * np.float32(1e-3)
    return usual.astype(twin.LIBRARY[scaling.scale_dtype]).tobytes()


@pytest.mark.parametrize(("dtype", "of"), list(itertools.product(QUANTISED, SCALES)))
def test_every_element_with_many_scales(dtype: str, of: str) -> None:
    """All patterns of an element in a row, and a row for each scale."""
    columns = 16 if dtype == "F4" else 256
    known = {"F32": [0, 1, 0x80000000, 0x7F800000, 0xFFC00001, 0x7F800001, 0x3F800000, 0x007FFFFF,
                     0x3B800001, 0x7F7FFFFF, 0x00800000],
             "BF16": [0, 0x8001, 0x7F80, 0x7F81, 0x3F80, 0x7F7F], "F8_E8M0": [*range(256)],
             "F16": [0, 1, 0x8000, 0x7C00, 0x7C01, 0x3C00, 0x7BFF, 0x03FF]}[of]  # fmt: skip
    width = naive.FORMATS[of].bits // 8
    noise = np.random.default_rng(1).bytes(300 * width)
    scales = np.array(known, f"u{width}").tobytes() + noise
    rows = len(scales) // width
    every = bytes(range(256)) if columns == 256 else bytes(2 * i | 2 * i + 1 << 4 for i in range(8))
    scaling = Scaling(dtype, of, rows, columns, (1, columns))
    data = every * rows
    which = [row for row in range(rows) for _ in range(columns)]
    wanted = twin.values(dtype, data, as_float32(of, scales), which)
    agree(run(scaling, 0, rows * columns, data, scales, (0, 0)), wanted)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_range_of_any_blocks(data: st.DataObject) -> None:
    dtype, of = data.draw(st.sampled_from(QUANTISED)), data.draw(st.sampled_from(SCALES))
    rows, matrices = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    columns = data.draw(st.one_of(st.integers(1, 40), st.integers(1, 300)))
    block = (
        data.draw(st.sampled_from([1, 2, 3, 4, rows, 128])),
        data.draw(st.sampled_from([1, 2, 7, 16, 32, 128, columns])),
    )
    if dtype == "F4":  # bytes are not divided
        columns += columns % 2
        block = block[0], block[1] if block[1] == 1 else block[1] + block[1] % 2
    scaling = Scaling(dtype, of, rows, columns, block, matrices)
    start = data.draw(st.integers(0, scaling.elements))
    start -= start % 2 if dtype == "F4" else 0
    stop = data.draw(st.integers(start, scaling.elements))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    elements = rng.bytes(-(-scaling.elements * naive.FORMATS[dtype].bits // 8))
    scales = some_scales(scaling, rng)
    spare = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    found = run(scaling, start, stop, elements, scales, spare)
    agree(found, expected(scaling, start, stop, elements, scales))


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling("F8_E4M3", "F32", 300, 200, (128, 128)),
        Scaling("F8_E4M3", "F32", 150, 130, (128, 128), 3),
        Scaling("F8_E5M2", "BF16", 40, 1000, (40, 1000)),
        Scaling("I8", "F16", 40, 1000, (1, 1000)),
        Scaling("I8", "F32", 40, 1000, (40, 1)),
        Scaling("F4", "F8_E8M0", 30, 2880, (1, 32)),
        Scaling("F8_E4M3", "F8_E8M0", 90, 1000, (1, 32)),
    ],
    ids=str,
)
def test_long_ranges(scaling: Scaling) -> None:
    rng = np.random.default_rng(3)
    elements = rng.bytes(-(-scaling.elements * naive.FORMATS[scaling.dtype].bits // 8))
    scales = some_scales(scaling, rng)
    wanted = expected(scaling, 0, scaling.elements, elements, scales)
    for start, stop in [(0, scaling.elements), (2, scaling.elements - 5), (5000, 20010)]:
        found = run(scaling, start, stop, elements, scales, (0, 0))
        agree(found, wanted[4 * start : 4 * stop])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_just_the_scales_of_a_range_are_needed(data: st.DataObject) -> None:
    number = st.integers(1, 12)
    shape = data.draw(st.tuples(st.integers(1, 3), number, number))
    block = data.draw(st.tuples(number, number))
    scaling = Scaling("I8", "F32", *shape[1:], block, shape[0])
    start = data.draw(st.integers(0, scaling.elements - 1))
    stop = data.draw(st.integers(start + 1, scaling.elements))
    which = [twin.scale_position(at, shape, block) for at in range(start, stop)]
    assert scaling.needed(start, stop) == (min(which), max(which) + 1)
    assert scaling.needed(start, start) == (0, 0)
    last = twin.scale_position(scaling.elements - 1, shape, block)
    assert scaling.scales == last + 1


def test_a_huge_matrix_needs_what_a_range_of_it_needs() -> None:
    scaling = Scaling("F4", "F8_E8M0", 1 << 20, 1 << 30, (1, 32), 4)
    start = (1 << 50) + (1 << 29)
    low, high = scaling.needed(start, start + 1000)
    assert (low, high) == (start // 32, start // 32 + 32)
    out = np.empty(4000, np.uint8)
    scale(np.full(500, 0x22, np.uint8), scaling, start, np.full(32, 128, np.uint8), low, out)
    assert (out.view(np.float32) == 2).all()


def test_values_by_hand() -> None:
    """What the formats' own descriptions say of a few bytes."""
    for dtype, byte, of, factor, value in [
        ("F8_E4M3", 0x7E, "F32", np.float32(0.5).tobytes(), 224.0),
        ("F8_E4M3", 0x01, "F8_E8M0", b"\x7f", 2.0**-9),
        ("F8_E5M2", 0x7B, "BF16", b"\x80\x3f", 57344.0),
        ("I8", 0x80, "F16", b"\x00\x3c", -128.0),
        ("F8_E4M3", 0x38, "F8_E8M0", b"\x00", 2.0**-127),
        ("F8_E5M2", 0xBC, "F8_E8M0", b"\xfe", -(2.0**127)),
        ("F8_E4M3", 0x7E, "F8_E8M0", b"\xfe", math.inf),
    ]:
        out = np.zeros(4, np.uint8)
        scaling = Scaling(dtype, of, 1, 1, (1, 1))
        scale(np.array([byte], np.uint8), scaling, 0, np.frombuffer(factor, np.uint8), 0, out)
        assert out.view(np.float32)[0] == value
    out = np.zeros(8, np.uint8)
    two = Scaling("F4", "F8_E8M0", 1, 2, (1, 32))
    scale(np.array([0xF1], np.uint8), two, 0, np.array([128], np.uint8), 0, out)
    assert out.view(np.float32).tolist() == [1.0, -12.0], "the low half is first"
    scale(np.array([0xF1], np.uint8), two, 0, np.array([255], np.uint8), 0, out)
    assert out.view(np.uint32).tolist() == [0x7FC00000] * 2, "255 is no number"


@pytest.mark.parametrize(
    "wrong",
    [
        ("BF16", "F32", 2, 2, (1, 1)),
        ("U8", "F32", 2, 2, (1, 1)),
        ("I8", "F64", 2, 2, (1, 1)),
        ("I8", "U8", 2, 2, (1, 1)),
        ("I8", "F32", 0, 2, (1, 1)),
        ("I8", "F32", 2, 2, (0, 1)),
        ("I8", "F32", 2, 2, (1, -1)),
        ("I8", "F32", 1 << 31, 1 << 31, (1, 1)),
        ("F4", "F32", 2, 3, (1, 1)),
        ("F4", "F32", 2, 8, (1, 3)),
    ],
)
def test_descriptions_of_nothing(wrong: tuple[str, str, int, int, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Scaling(*wrong)


def test_elements_of_half_a_byte_begin_with_a_byte() -> None:
    scaling = Scaling("F4", "F32", 2, 4, (1, 1))
    with pytest.raises(ValueError, match="byte"):
        scale(np.zeros(4, np.uint8), scaling, 1, np.zeros(32, np.uint8), 0, np.zeros(8, np.uint8))


def factors_of(powers: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    found = np.empty(len(powers), np.float32)
    powers_of_two(powers, found)
    return found


def test_all_powers_of_two() -> None:
    every = np.arange(256, dtype=np.uint8)
    for some in every, every[1:-1]:
        wanted = as_float32("F8_E8M0", some.tobytes())
        assert factors_of(some)[:-1].tobytes() == wanted[:-1].tobytes()
    assert factors_of(every).view(np.uint32)[-1] == 0x7FC00000


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_rows_of_turned_pairs(data: st.DataObject) -> None:
    """Rows of values are halves of rows of bytes; the last may be a part of one."""
    columns, row = data.draw(st.integers(1, 200)), data.draw(st.integers(0, 70))
    column, count = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(1, 70 * columns))
    last = row + (column + count - 1) // columns
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pairs, powers = (
        rng.integers(0, 256, (last // some - row // some + 1) * columns + abi.LANES, np.uint8)
        for some in (2, 32)
    )
    found = np.full(count + 1, 1.5, np.float32).view(np.uint8)
    factors = factors_of(powers)
    turned(pairs, factors, (row, column), columns, count).make(found)
    assert found[-4:].view(np.float32)[0] == 1.5
    places = np.arange(column, column + count)
    rows = row + places // columns
    at = (rows // 2 - row // 2) * columns + places % columns
    halves = pairs[at] >> (rows % 2 * 4).astype(np.uint8) & 15
    packed = halves[::2] | np.append(halves[1::2], np.zeros(count % 2, np.uint8)) << 4
    of = powers[(rows // 32 - row // 32) * columns + places % columns]
    scales = as_float32("F8_E8M0", of.tobytes())
    wanted = twin.values("F4", packed.astype(np.uint8).tobytes(), scales, list(range(count)))
    agree(found[:-4].tobytes(), wanted)


def test_turned_pairs_that_do_not_fit() -> None:
    def u8(size: int) -> npt.NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    pairs, powers = u8(16 * 60 + abi.LANES), np.zeros(60 + abi.LANES, np.float32)
    out = u8(4 * 32 * 60)
    turned(pairs, powers, (64, 0), 60, 32 * 60).make(out)
    for at, columns, count in [
        ((64, 0), 60, 32 * 60 + 1),
        ((64, 1), 60, 32 * 60),
        ((65, 0), 60, 32 * 60),
        ((0, 0), 0, 1),
        ((0, 60), 60, 1),
        ((-1, 0), 60, 1),
        ((0, 0), 60, 0),
    ]:
        with pytest.raises(ValueError, match=r"kernel|rows"):
            turned(pairs, powers, at, columns, count)
    for at, count in ((0, 0), 32 * 60), ((1, 5), 31 * 60 - 5):
        recipe = turned(pairs, powers, at, 60, count)
        with pytest.raises(ValueError, match="kernel"):
            recipe.make(out[: 4 * recipe.values - 1])
    with pytest.raises(ValueError, match="kernel"):
        turned(pairs, powers[:-1], (0, 0), 60, 32 * 60)
    with pytest.raises(TypeError):
        turned(pairs.view(np.int8), powers, (0, 0), 60, 1)
    with pytest.raises(TypeError):
        turned(pairs, powers.view(np.uint32), (0, 0), 60, 1)


def test_numbers_that_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What machines do that have no vectors of 16 numbers."""
    monkeypatch.setattr(generated, "_looks_up", lambda: False)
    kernel = codegen.compile_kernel("scale", "F4", abi.SIGNATURES["scale"])
    every = np.array([2 * i | 2 * i + 1 << 4 for i in range(8)] * 512, np.uint8)
    scales = np.arange(256, dtype=np.uint8)
    recipe = scaled(every, Scaling("F4", "F8_E8M0", 256, 32, (1, 32)), 0, 8192, scales, 0)
    found, wanted = np.zeros(4 * 8192, np.uint8), np.zeros(4 * 8192, np.uint8)
    recipe._replace(kernel=Function("scale", kernel.address, kernel)).make(found)
    recipe.make(wanted)
    agree(found.tobytes(), wanted.tobytes())
