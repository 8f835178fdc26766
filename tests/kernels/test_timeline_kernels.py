"""The kernels of a timeline against their naive twin."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_timeline import tell

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi, hashing
from ckdiff.kernels.memory import Bytes
from ckdiff.kernels.timeline import Marching, Sums, columns, moves
from ckdiff.rules import Rule


def run(
    dtype: str, rule: str, sides: list[bytes], cuts: tuple[int, ...] = (), width: int = 1
) -> tuple[Sums, list[Bytes], npt.NDArray[Any], npt.NDArray[Any]]:
    """March over one tensor, handed over in segments that begin at ``cuts``."""
    bits, count = DTYPES[dtype].bits, len(sides[0]) * 8 // DTYPES[dtype].bits
    rules = list(dict.fromkeys([Rule.parse("exact"), Rule.parse(rule)]))
    kernels = Marching([DTYPES[dtype]], rules, len(sides))
    steps, room = len(sides) - 1, -(-count // 512) * 512 + 512
    masks = [np.zeros(room // 8, np.uint8) for _ in range(steps * len(rules))]
    held = [np.frombuffer(b"\x55" * 3 + side + b"\xaa" * 64, np.uint8) for side in sides]
    places = [array.ctypes.data + 3 for array in held]
    pairs = [(0, s) for s in range(1, len(sides))] + list(pairwise(range(1, len(sides))))
    table = []
    for first, stop in pairwise([0, *cuts, count]):
        at = [place + first * bits // 8 for place in places]
        row = [stop - first, first, first // hashing.UNIT, 0]
        row += [number for place in at for number in (place, bits)]
        row += [number for a, b in pairs for number in (at[a], at[b], 0)]
        table.append(row)
    segments = np.array(table, np.int64)
    into = Sums(1, len(sides), len(rules), steps)
    kernels.run(segments, masks, into)
    of_rule = masks[len(rules) - 1 :: len(rules)]
    out = np.zeros(room * width, np.uint8)
    moves(segments, of_rule, out, width, into)
    return into, of_rule, out.view(f"<u{width}")[:count], out.view(f"<u{width}")[count:]


def drawn(dtype: str, count: int, steps: int, seed: int, share: float) -> list[bytes]:
    """A run in which some bytes change at each step, and some return."""
    chance, size = random.Random(seed), count * DTYPES[dtype].bits // 8
    sides = [chance.randbytes(size)]
    for _ in range(steps):
        now = bytearray(sides[-1])
        for i in range(size):
            if chance.random() < share:
                now[i] = sides[0][i] if chance.random() < 0.4 else chance.randrange(256)
        sides.append(bytes(now))
    return sides


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(["BF16", "F32", "F8_E4M3", "I16", "F4", "F64", "BOOL"]),
    rule=st.sampled_from(["exact", "atol=0.5", "rtol=1e-2", "ulp=2"]),
    count=st.sampled_from([2, 62, 64, 510, 512, 1100]),
    steps=st.integers(1, 5),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_twin(dtype: str, rule: str, count: int, steps: int, seed: int, share: float) -> None:
    sides = drawn(dtype, count, steps, seed, share)
    cuts = tuple(cut for cut in (512, 1024) if cut < count)
    told = tell(rule, dtype, sides)
    into, masks, first, rest = run(dtype, rule, sides, cuts)
    exact = tell("exact", dtype, sides)
    assert into.firsts[0, :, 0].tolist() == exact.first
    assert into.firsts[0, :, -1].tolist() == told.first
    assert [told.first[0], *into.nexts[0].tolist()] == told.previous
    for mask, wanted in zip(masks, told.masks, strict=True):
        packed = naive.packed(wanted)
        assert mask[: len(packed)].tobytes() == packed
        assert not mask[len(packed) :].any()
    assert into.moves[0].tolist() == [*told.kept, told.moved]
    assert first.tolist() == told.moves
    assert not rest.any()
    for side, data in enumerate(sides):
        low, high = map(int, into.hashes[0, side])
        assert hashing.finish(low, high, len(data)) == naive.content_hash(dtype, data)


def test_more_than_a_step_of_the_kernel() -> None:
    """A tensor that goes over several blocks, the last of which is ragged."""
    count = 2 * abi.MARCH_STEP + 700
    chance = np.random.default_rng(5)
    first = chance.integers(0, 1 << 16, count, np.uint16)
    sides = [first]
    for _ in range(4):
        sides.append(np.where(chance.random(count) < 0.1, chance.integers(0, 99, count), sides[-1]))
    raw = [side.astype("<u2").tobytes() for side in sides]
    into, masks, moved, _ = run("BF16", "exact", raw, (512 * 9,))
    marks = np.array([side != first for side in sides[1:]])
    assert [np.unpackbits(m, count=count, bitorder="little").tolist() for m in masks] == (
        marks.astype(int).tolist()
    )
    assert into.firsts[0, :, 0].tolist() == marks.sum(1).tolist()
    assert into.nexts[0].tolist() == [int((a != b).sum()) for a, b in pairwise(sides[1:])]
    expected = np.where(marks.any(0), marks.argmax(0) + 1, 0)
    assert (moved == expected).all()
    for side, data in enumerate(raw):
        low, high = map(int, into.hashes[0, side])
        assert hashing.finish(low, high, len(data)) == naive.content_hash("BF16", data)


def test_which_sides_are_compared_at_once() -> None:
    """Those of one width that are compared as they are stored, by their bits alone."""

    def found(rules: list[str], change: tuple[int, int] | None = None, dtype: str = "F32") -> bool:
        kernels = Marching([DTYPES[dtype], DTYPES["BF16"]], [Rule.parse(rule) for rule in rules], 3)
        head, bits = abi.MARCH_HEAD, DTYPES[dtype].bits
        row = [0] * head + [64, bits, 128, bits, 192, bits, 64, 128, 0, 64, 192, 0, 128, 192, 0]
        if change is not None:
            row[head + change[0]] = change[1]
        return bool(kernels._sweeping(np.array([row], np.int64))[0])

    assert found(["exact"])
    assert not found(["exact", "atol=1"])
    assert not found(["exact"], dtype="F4")
    for change in ((3, 16), (10, 256), (14, 1), (9, 256)):
        assert not found(["exact"], change)


def test_many_steps_have_wider_numbers() -> None:
    sides = [bytes([0] * 512), *([bytes([0] * 512)] * 299), bytes([1] + [0] * 511)]
    into, _, first, _ = run("U8", "exact", sides, width=2)
    assert first[0] == 300
    assert not first[1:].any()
    assert into.moves[0, -1] == 1
    with pytest.raises(ValueError, match="no numbers of 1 bytes"):
        run("U8", "exact", sides, width=1)


def test_what_does_not_fit_is_refused() -> None:
    kernels = Marching([DTYPES["U8"]], [Rule.parse("exact")], 3)
    into = Sums(1, 3, 1, 2)
    masks = [np.zeros(64, np.uint8), np.zeros(64, np.uint8)]
    segments = np.zeros((1, columns(3)), np.int64)
    segments[0, abi.MARCH_ELEMENTS] = 513
    with pytest.raises(ValueError, match="reach"):
        kernels.run(segments, masks, into)
    with pytest.raises(ValueError, match="columns"):
        kernels.run(segments[:, :-1].copy(), masks, into)
    with pytest.raises(ValueError, match="mask for each"):
        kernels.run(segments, masks[:1], into)
    segments[0, abi.MARCH_ELEMENTS], segments[0, abi.MARCH_ROW] = 5, 1
    with pytest.raises(ValueError, match="reach"):
        moves(segments, masks, None, 1, into)
