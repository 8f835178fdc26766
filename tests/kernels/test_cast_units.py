"""Pairs of two float dtypes, widened while they are compared, against loops over elements."""

from __future__ import annotations

import itertools

import naive
import naive_values as twin
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, random_bits, run, specials

from ckdiff.dtypes import DTYPES, common
from ckdiff.kernels import Results, abi, hashing
from ckdiff.kernels.casting import FUSED, Rooms, head
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U64, place, room

UNIT = hashing.UNIT
FLOATS = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64"]
PAIRS = [pair for pair in itertools.permutations(FLOATS, 2) if common(*pair)]
Bits = npt.NDArray[np.unsignedinteger]


def sides(dtypes: tuple[str, str], count: int, seed: int) -> tuple[list[Bits], list[Bits]]:
    """Bits of both, half of which are the same number, and the same as their common dtype.

    All patterns at which something changes are among them: NaNs, subnormals, zeros, infinities.
    """
    values = str(common(*dtypes))
    rng = np.random.default_rng(seed)
    stored = [_bits(dtype, count, seed + i) for i, dtype in enumerate(dtypes)]
    wide = [_wider(d, values, bits) for d, bits in zip(dtypes, stored, strict=True)]
    for i, dtype in enumerate(dtypes):
        if dtype == values:  # it can be what the other one is widened to
            alike = rng.random(count) < 0.5
            stored[i] = np.where(alike, wide[1 - i], stored[i]).astype(stored[i].dtype)
            wide[i] = stored[i]
    return stored, wide


def _bits(dtype: str, count: int, seed: int) -> Bits:
    rng = np.random.default_rng(seed)
    known = np.array(specials(dtype), f"u{naive.FORMATS[dtype].bits // 8}")
    noise = random_bits(dtype, count, seed)
    return np.where(rng.random(count) < 0.5, rng.choice(known, count), noise)


def _wider(dtype: str, values: str, bits: Bits) -> Bits:
    return bits if dtype == values else twin.wider(dtype, values, bits)


def hashes(stored: list[Bits], unit: int) -> list[int]:
    return [
        half
        for bits in stored
        for half in hashing.add_units(memoryview(bits.tobytes()), unit, UNIT * bits.itemsize)
    ]


def at_odd(data: Bits, by: int) -> npt.NDArray[np.uint8]:
    """The bytes somewhere in memory."""
    held = np.full(data.nbytes + by + 64, 0x5A, np.uint8)
    held[by : by + data.nbytes] = data.view(np.uint8)
    return held


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_units_of_pairs(data: st.DataObject) -> None:
    dtypes = tuple(data.draw(st.sampled_from(FUSED)).split(">"))
    count, first = data.draw(st.integers(0, 19)), data.draw(st.integers(0, 1 << 40))
    if data.draw(st.booleans()):
        dtypes = dtypes[::-1]
    pair = dtypes[0], dtypes[1]
    values = str(common(*pair))
    stored, wide = sides(pair, count * UNIT, data.draw(st.integers(0, 1 << 30)))
    offset = data.draw(st.integers(0, 7))
    held, rooms, heads = [at_odd(bits, offset) for bits in stored], Rooms(), head(pair, values)
    recipes = [
        rooms.recipes(
            side,
            np.array(heads[side : side + 1]),
            np.array([count * UNIT]),
            np.array([held[side].ctypes.data + offset]),
            DTYPES[values].bits,
        )
        for side in range(2)
    ]
    mask, sums = np.full(count * UNIT // 8 + 1, 0x5A, np.uint8), np.zeros(4, np.uint64)
    before = np.random.default_rng(first).integers(0, 1 << 63, 4)
    sums += before.astype(np.uint64)
    kind = next(kind for kind in FUSED if {*kind.split(">")} == {*pair})
    changed = c_function("units", kind).ctypes(
        *(place(recipe, I64) for recipe in recipes), count, first,
        room(mask, np.dtype(np.uint8)), room(sums, U64),
    )  # fmt: skip
    differ = wide[0] != wide[1]
    assert changed == differ.sum()
    assert mask[:-1].tobytes() == np.packbits(differ, bitorder="little").tobytes()
    assert mask[-1] == 0x5A
    wanted = zip(before.tolist(), hashes(stored, first), strict=True)
    assert sums.tolist() == [(old + new) % (1 << 64) for old, new in wanted]
    for side, recipe in enumerate(recipes):
        went = recipe[0, abi.RECIPE_SOURCE] - held[side].ctypes.data - offset
        assert went == stored[side].nbytes


def test_patterns_of_sixteen_bits_are_what_they_are_widened_to() -> None:
    """All of them: a unit that differs nowhere, and one that differs by the lowest bit."""
    for kind in FUSED:
        narrow, wide = kind.split(">")
        every = np.arange(1 << 16, dtype=np.uint16)
        widened = twin.wider(narrow, wide, every)
        for flip in (0, 1):
            found = walked(
                (narrow, wide), [every, (widened ^ flip).astype(np.uint32)], [0, 1 << 16]
            )
            assert found.changed.tolist() == [[flip << 16]]


def walked(
    dtypes: tuple[str, str],
    stored: list[Bits],
    edges: list[int],
    rules: tuple[str, ...] = ("exact",),
    masks: list[npt.NDArray[np.uint8]] | None = None,
    offset: int = 0,
    first: int = 0,
    stats: bool = False,
) -> Results:
    """What the driver finds in segments between edges, of which recipes say how they are made."""
    values = str(common(*dtypes))
    held, rooms, heads = [at_odd(bits, offset) for bits in stored], Rooms(), head(dtypes, values)
    cuts = np.array(edges, np.int64)
    table = np.zeros((len(edges) - 1, abi.SEG_COLUMNS), np.int64)
    table[:, abi.SEG_ELEMENTS] = np.diff(cuts)
    table[:, abi.SEG_POSITION] = first + cuts[:-1]
    table[:, abi.SEG_UNIT] = cuts[:-1] // UNIT
    kept = []
    for side, column in enumerate((abi.SEG_BASE, abi.SEG_TUNED)):
        sources = held[side].ctypes.data + offset + cuts[:-1] * stored[side].itemsize
        several = np.array([heads[side]] * len(table))
        kept.append(rooms.recipes(side, several, np.diff(cuts), sources, DTYPES[values].bits))
        table[:, column] = -(place(kept[-1], I64) + kept[-1].strides[0] * np.arange(len(table)))
    if masks is None:
        masks = [np.zeros((first + len(stored[0])) // 8 + 9, np.uint8) for _ in rules]
    results = Results(1, len(rules), with_statistics=stats)
    kernels((values,), rules, stats).run(table, masks, results)
    return results


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_the_driver_makes_of_pairs(data: st.DataObject) -> None:
    """Counts and bits of several rules, statistics and both hashes, whole units or ragged."""
    dtypes = data.draw(st.sampled_from(PAIRS))
    values = str(common(*dtypes))
    count = data.draw(st.one_of(st.integers(1, 9000), st.sampled_from([2048, 4096, 65536 + 1024])))
    rules = ("exact", "atol=0.5", "ulp=3")[: data.draw(st.integers(1, 3))]
    stats = data.draw(st.booleans())
    stored, wide = sides(dtypes, count, data.draw(st.integers(0, 1 << 30)))
    cuts = {UNIT * at for at in data.draw(st.lists(st.integers(0, count // UNIT), max_size=3))}
    edges = sorted({0, count, *cuts})
    # a device's windows and others begin anywhere in their chunk
    first, offset = UNIT * data.draw(st.integers(0, 200)), data.draw(st.integers(0, 7))
    masks = [np.zeros((first + count) // 8 + 9, np.uint8) for _ in rules]
    found = walked(dtypes, stored, edges, rules, masks, offset, first, stats)
    wanted = run(values, rules, *(bits.tobytes() for bits in wide), cuts=edges[1:-1], stats=stats)
    assert found.changed[0].tolist() == [wanted.changed[rule] for rule in rules]
    for rule, mask in zip(rules, masks, strict=True):
        begin = first // 8
        assert not mask[:begin].any()
        assert mask[begin : begin + -(-count // 8)].tobytes() == wanted.masks[rule].tobytes()
        assert not mask[begin + -(-count // 8) :].any()
    assert found.hashes[0].tolist() == [each % (1 << 64) for each in hashes(stored, 0)]
    if stats and first == 0:  # sums of blocks are rounded
        assert found.statistics is not None
        assert wanted.statistics is not None
        assert found.statistics[0].tobytes() == wanted.statistics.tobytes()


@pytest.mark.parametrize("pair", [("F32", "BF16"), ("F16", "BF16")])
def test_a_dtype_that_does_not_hold_a_side_is_no_pair(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        head(pair, "BF16")
