"""Whole units compared and hashed in one pass, and values that are made while they are compared."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import Kernels, Results, abi, codegen, hashing
from ckdiff.kernels.codegen import scaling
from ckdiff.kernels.compiled import Function, c_function
from ckdiff.kernels.memory import I64, U8, U64, place, room
from ckdiff.kernels.scaling import Recipe, Scaling, powers_of_two, scaled, table, turned
from ckdiff.rules import Rule

UNIT = hashing.UNIT
#: what the values of a kind are made of
WAYS = {"groups": "F4", "halves": "turned"}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_units_against_the_library(data: st.DataObject) -> None:
    count, first = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 1 << 40))
    width = data.draw(st.sampled_from([1, 2, 4]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    base = np.frombuffer(rng.bytes(width * UNIT * count + 3), np.uint8)[3:]  # anywhere
    tuned = base.copy()
    for at in data.draw(st.lists(st.integers(0, len(base) - 1), max_size=9)) if count else []:
        tuned[at] ^= data.draw(st.integers(0, 255))
    mask = np.full(count * UNIT // 8 + 1, 0x5A, np.uint8)
    sums = rng.integers(0, 1 << 63, 4).astype(np.uint64)
    before = [int(each) for each in sums]
    changed = c_function("units", {1: "1", 2: "2", 4: ""}[width]).ctypes(
        place(base, U8), place(tuned, U8), count, first, room(mask, U8), room(sums, U64)
    )
    differ = base.view(f"<u{width}") != tuned.view(f"<u{width}")
    assert changed == differ.sum()
    assert mask[:-1].tobytes() == np.packbits(differ, bitorder="little").tobytes()
    assert mask[-1] == 0x5A
    added = [
        sum_ for side in (base, tuned) for sum_ in hashing.add_units(side.data, first, width * UNIT)
    ]
    assert sums.tolist() == [
        (old + new) % (1 << 64) for old, new in zip(before, added, strict=True)
    ]


def _segments(rows: list[tuple[int, int, int, int]], unit: int) -> npt.NDArray[np.int64]:
    """(base, tuned, elements, position) of each segment, whose units go on from ``unit``."""
    table_ = np.zeros((len(rows), abi.SEG_COLUMNS), np.int64)
    columns = abi.SEG_BASE, abi.SEG_TUNED, abi.SEG_ELEMENTS, abi.SEG_POSITION
    table_[:, columns] = rows
    table_[:, abi.SEG_UNIT], table_[:, abi.SEG_ROW] = unit, range(len(rows))
    return table_


def _recipes(
    rng: np.random.Generator, count: int, way: str, kept: list[object], *, whole: bool = False
) -> list[Recipe]:
    """Recipes for so many values, a few parts of them; what they need is ``kept``."""
    if way == "turned":
        columns = int(rng.choice([96, 512, 1024, 1440]))
        some = [
            rng.integers(0, 256, count // size + 4 * columns + 400, np.uint8) for size in (2, 32)
        ]
        powers = np.empty(len(some[1]), np.float32)
        powers_of_two(some[1], powers)
        kept.append((some, powers))
        begin = int(rng.integers(0, 4)), int(rng.choice([0, 0, 32]))
        return [turned(some[0], powers, begin, columns, count)]
    columns = 32 * -(-count // 64)
    how = Scaling(way, "F8_E8M0" if way == "F4" else "F32", 2, columns, (1, 32))
    elements = rng.integers(0, 256, 2 * columns, np.uint8)
    scales = rng.integers(0, 256, 4 * how.scales, np.uint8)
    kept.append((elements, scales))
    cut = [0, *(() if whole else sorted(rng.integers(0, count // 2 + 1, 2) * 2)), count]
    return [
        scaled(elements[a * DTYPES[way].bits // 8 :], how, a, b - a, scales, 0)
        for a, b in itertools.pairwise(cut)
        if a < b
    ]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_values_made_on_the_way_are_those_made_before(data: st.DataObject) -> None:
    """Counts, bits and hashes, of one side made or both, and of all that may be said of them."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.one_of(st.integers(1, 9000), st.sampled_from([2048, 4096, 65536 + 1024])))
    statistics, rules = data.draw(st.booleans()), data.draw(st.integers(1, 2))
    ways = [data.draw(st.sampled_from(["F4", "F8_E4M3", "I8", "turned"])) for _ in range(2)]
    kept: list[object] = []
    recipes = [_recipes(rng, count, way, kept) for way in ways]
    values = [np.empty(4 * count, np.uint8) for _ in recipes]
    for side, out in zip(recipes, values, strict=True):
        for recipe in side:
            recipe.make(out)
            out = out[4 * recipe.values :]
    if data.draw(st.booleans()):  # sides that are nearly the same
        recipes[1] = [*recipes[0]]
        values[1] = values[0]
    made = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    position, unit = 512 * data.draw(st.integers(0, 200)), data.draw(st.integers(0, 1000))
    kernels = Kernels(
        [DTYPES["F32"]],
        [Rule.parse(text) for text in ("exact", "atol=1")[:rules]],
        with_statistics=statistics,
    )
    rooms = np.empty((2, 4 * abi.BLOCK), np.uint8)
    tables = [table(side, into) for side, into in zip(recipes, rooms, strict=True)]
    found = []
    for here in (made, (False, False)):
        places = [
            -place(recipe, I64) if late else place(data_, U8)
            for late, recipe, data_ in zip(here, tables, values, strict=True)
        ]
        masks = [np.zeros((position + count) // 8 + 9, np.uint8) for _ in range(rules)]
        results = Results(1, rules, with_statistics=statistics)
        kernels.run(_segments([(places[0], places[1], count, position)], unit), masks, results)
        sums = results.statistics
        found.append(
            [
                [mask.tobytes() for mask in masks],
                results.changed.tolist(),
                results.hashes.tolist(),
                b"" if sums is None else sums.tobytes(),
            ]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["groups", "halves"])
@pytest.mark.parametrize("features", [(False, False), (True, False)], ids=str)
def test_on_other_machines(
    kind: str, features: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What those do that have no vectors of 16 numbers, or do not pick bits out of words."""
    looks_up, picks_bits = features
    if looks_up and not scaling._looks_up():
        pytest.skip("this machine has none")
    monkeypatch.setattr(scaling, "_looks_up", lambda: looks_up)
    monkeypatch.setattr(scaling, "_picks_bits", lambda: picks_bits)
    made = codegen.compile_kernel("units", kind, abi.SIGNATURES["units"])
    functions = [c_function("units", kind), Function("units", made.address, made)]
    rng = np.random.default_rng(5)
    kept: list[object] = []
    count = 12  # units
    sides = [_recipes(rng, count * UNIT, WAYS[kind], kept, whole=True) for _ in range(2)]
    rooms = np.empty((2, 4 * abi.BLOCK), np.uint8)
    found = []
    for function in functions:
        mask, sums = np.zeros(count * UNIT // 8, np.uint8), np.zeros(4, np.uint64)
        recipes = [table(side, into) for side, into in zip(sides, rooms, strict=True)]
        places = [place(recipe, I64) for recipe in recipes]
        changed = function.ctypes(*places, count, 3, room(mask, U8), room(sums, U64))
        after = [recipe.tobytes() for recipe in recipes]
        found.append((changed, mask.tobytes(), sums.tolist(), after))
    assert found[0] == found[1]
    assert found[0][0] > UNIT
