"""The kernels of packed deltas against slow twins, and how classes are chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ckdiff.deltas.classes import MOST_CLASSES, choose
from ckdiff.deltas.form import FORMS
from ckdiff.kernels.abi import (
    CLASS_AT,
    CLASS_BITS,
    CLASS_COLUMNS,
    CLASS_LEAST,
    CLASS_PENDING,
    CLASS_SYMBOLS,
    DELTA_AT,
    DELTA_EXTRA,
    DELTA_HEAD,
    DELTA_PENDING,
    GAPS_SCRATCH,
    LANES,
    LARGE_HALF,
)
from ckdiff.kernels.compiled import c_function

Bytes = npt.NDArray[np.uint8]
SLACK, ZONE = 72, 0xA5
ALL = 0xFFFFFFFFFFFFFFFF
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def room(size: int) -> Bytes:
    """A buffer with what the kernels may touch after its end, and a zone that they may not."""
    return np.full(size + SLACK + 64, ZONE, np.uint8)


def untouched(buffer: Bytes) -> bool:
    return bool((buffer[-64:] == ZONE).all())


# -- gaps ------------------------------------------------------------------------------------------


def gaps(flags: Sequence[int], low: int, flip: int) -> tuple[bytes, bytes]:
    """The kernel's gap bytes and low bits."""
    bits = np.packbits(np.array(flags, np.uint8), bitorder="little")
    padded = np.full(len(bits) + 8, 0xFF, np.uint8)  # what comes after the last one says nothing
    padded[: len(bits)] = bits
    scratch = room(GAPS_SCRATCH)
    out, low_out, sizes = room(2 * len(flags)), room(4 * len(flags)), np.zeros(2, np.int64)
    c_function("gaps").ctypes(
        padded.ctypes.data, len(flags), flip, low, out.ctypes.data, low_out.ctypes.data,
        sizes.ctypes.data, scratch.ctypes.data,
    )  # fmt: skip
    assert (scratch[GAPS_SCRATCH:] == ZONE).all()
    assert untouched(out)
    assert untouched(low_out)
    return out[: sizes[0]].tobytes(), low_out[: sizes[1]].tobytes()


def slow_gaps(flags: Sequence[int], low: int, flip: int) -> tuple[bytes, bytes]:
    high, bits, last = bytearray(), list[int](), -1
    for at, flag in enumerate(flags):
        if flag == (flip == 0):
            gap, last = at - last - 1, at
            high += b"\xff" * ((gap >> low) // 255) + bytes([(gap >> low) % 255])
            bits += [gap >> i & 1 for i in range(low)]
    packed = np.packbits(np.array(bits, np.uint8), bitorder="little")
    return bytes(high), packed.tobytes()


def ungaps(data: bytes, low: bytes, low_bits: int, width: int, flip: int, count: int) -> list[int]:
    """The kernel's bits, or none where it refuses."""
    low_data, out = room(len(low)), room(count // 8)
    low_data[: len(low)] = np.frombuffer(low, np.uint8)
    copy = np.frombuffer(data + b"\xff" * 8, np.uint8)
    found = c_function("ungaps").ctypes(
        copy.ctypes.data, len(data), low_data.ctypes.data, low_bits, width, flip, count,
        out.ctypes.data,
    )  # fmt: skip
    assert untouched(out)
    if found < 0:
        return []
    flags = np.unpackbits(out, count=count, bitorder="little")
    assert found == np.count_nonzero(flags != (flip != 0))
    return [int(flag) for flag in flags]


@QUICK
@given(
    count=st.integers(1, 3000),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]),
    low=st.one_of(st.integers(0, 10), st.integers(0, 32)),
    flip=st.sampled_from([0, ALL]),
    seed=st.integers(0, 1000),
)
@example(count=64, density=1.0, low=32, flip=0, seed=0)
@example(count=1, density=0.0, low=0, flip=ALL, seed=0)
def test_gaps_are_those_of_the_twin_and_come_back(
    count: int, density: float, low: int, flip: int, seed: int
) -> None:
    flags = (np.random.default_rng(seed).random(count) < density).astype(np.uint8)
    if flip:
        flags = 1 - flags
    high, bits = gaps(flags.tolist(), low, flip)
    assert (high, bits) == slow_gaps(flags.tolist(), low, flip)
    marked = int(np.count_nonzero(flags != (flip != 0)))
    assert ungaps(high, bits, marked * low, low, flip, count) == flags.tolist()
    if marked:  # one bit or one byte less is one too few
        assert not low or ungaps(high, bits, marked * low - 1, low, flip, count) == []
        assert ungaps(high, bits, marked * low, low, flip, int(np.flatnonzero(
            flags != (flip != 0))[-1])) == []  # fmt: skip


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511, 765])
def test_long_gaps(gap: int) -> None:
    flags = [0] * gap + [1]
    assert gaps(flags, 0, 0)[0] == b"\xff" * (gap // 255) + bytes([gap % 255])
    assert ungaps(*gaps(flags, 0, 0), 0, 0, 0, len(flags)) == flags


@QUICK
@given(
    data=st.binary(max_size=60),
    low=st.binary(max_size=60),
    width=st.integers(0, 32),
    count=st.integers(0, 3000),
    flip=st.sampled_from([0, ALL]),
)
@example(data=b"\xff" * 60, low=b"", width=0, count=3000, flip=0)
@example(data=b"\xff" * 59 + b"\xfe", low=b"\xff" * 4, width=32, count=3000, flip=0)
def test_any_bytes_make_bits_or_nothing(
    data: bytes, low: bytes, width: int, count: int, flip: int
) -> None:
    flags = ungaps(data, low, 8 * len(low), width, flip, count)
    if flags and width == 0:
        assert gaps(flags, 0, flip)[0] == data


# -- pairs -----------------------------------------------------------------------------------------


def unpair(pairs: bytes, count: int, rest: bytes) -> list[int]:
    """The kernel's symbols, or none where it does not use up the rest."""
    out = room(count)
    sides = [np.frombuffer(side + b"\xff" * 8, np.uint8) for side in (pairs, rest)]
    used = c_function("unpair").ctypes(
        sides[0].ctypes.data, count, sides[1].ctypes.data, len(rest), out.ctypes.data
    )
    assert (out[count:] == ZONE).all()
    assert used <= len(rest)
    return out[:count].tolist() if used == len(rest) else []


@QUICK
@given(
    count=st.integers(1, 700),
    largest=st.sampled_from([0, 14, 15, 16, 40, 255]),
    large=st.sampled_from([0.0, 0.02, 1.0]),
    seed=st.integers(0, 1000),
)
def test_pairs_are_those_of_the_twin_and_come_back(
    count: int, largest: int, large: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    limit = np.where(rng.random(count) < large, largest, min(largest, 14))
    symbols = rng.integers(0, limit, endpoint=True)
    buffer = np.full(count + SLACK + 64, 0xEE, np.uint8)
    buffer[:count] = symbols
    pairs, rest = room(count // 2 + 1), room(count)
    size = c_function("pair").ctypes(buffer.ctypes.data, count, pairs.ctypes.data, rest.ctypes.data)
    assert untouched(pairs)
    assert untouched(rest)
    assert (buffer[count + 64 :] == 0xEE).all()
    halves = [*np.minimum(symbols, LARGE_HALF).tolist(), 0]
    expected = bytes(a + 16 * b for a, b in zip(halves[::2], halves[1::2], strict=False))
    found = pairs[: -(-count // 2)].tobytes(), rest[:size].tobytes()
    assert found == (expected, bytes(x for x in symbols.tolist() if x >= LARGE_HALF))
    assert unpair(found[0], count, found[1]) == symbols.tolist()
    assert unpair(found[0], count, found[1] + b"\0") == []
    assert not size or unpair(found[0], count, found[1][:-1]) == []


# -- tally and split -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "F64"])
@pytest.mark.parametrize("every", [1, 3])
def test_tally_counts_by_magnitude(dtype: str, every: int) -> None:
    form, rng = FORMS[dtype], np.random.default_rng(every)
    words = 10
    base = rng.integers(0, 256, words * LANES * form.bytes, np.uint8).view(f"u{form.bytes}")
    tuned = np.where(rng.random(len(base)) < 0.3, base ^ 1, base).astype(base.dtype)
    counts = np.zeros((form.bins, 2), np.int64)
    c_function("tally", form.kind).ctypes(
        base.ctypes.data, tuned.ctypes.data, words, every, form.shift, counts.ctypes.data
    )
    expected = np.zeros_like(counts)
    for word in range(0, words, every):
        for lane in range(LANES * word, LANES * (word + 1)):
            place = int(base[lane]) % (1 << (8 * form.bytes - 1)) >> form.shift
            expected[place] += (1, int(base[lane] != tuned[lane]))
    assert (counts == expected).all()


@pytest.mark.parametrize("kind", ["16f", "16f portable", "64f"])
@pytest.mark.parametrize("classes", [1, 3])
def test_split_goes_on_where_it_stopped(kind: str, classes: int) -> None:
    words, width = 23, 16 if kind.startswith("16") else 64
    rng = np.random.default_rng(classes)
    base = rng.integers(0, 256, words * 8 * width, np.uint8).view(f"u{width // 8}")
    other = rng.integers(0, 256, words * 8 * width, np.uint8).view(base.dtype)
    tuned = np.where(rng.random(len(base)) < 0.4, other, base)
    split = c_function("split", kind).ctypes

    def streams(steps: list[int]) -> list[bytes]:
        state = np.zeros(DELTA_HEAD + CLASS_COLUMNS * classes, np.int64)
        rows = state[DELTA_HEAD:].reshape(-1, CLASS_COLUMNS)
        bits = [room(words * 8) for _ in rows]
        symbols = [room(words * LANES) for _ in rows]
        extra, scratch = room(words * width * 8), np.zeros(LANES * 8, np.uint8)
        state[DELTA_EXTRA] = extra.ctypes.data
        for c, row in enumerate(rows):
            row[CLASS_LEAST] = c << (width - 3)
            row[CLASS_BITS], row[CLASS_SYMBOLS] = bits[c].ctypes.data, symbols[c].ctypes.data
        for first, stop in itertools.pairwise([0, *steps, words]):
            at = first * 8 * width
            split(
                base.ctypes.data + at, tuned.ctypes.data + at, stop - first, classes,
                state.ctypes.data, scratch.ctypes.data,
            )  # fmt: skip
        assert all(untouched(x) for x in (*bits, *symbols, extra))
        whole = int(state[DELTA_EXTRA]) - extra.ctypes.data
        found = [extra[:whole].tobytes(), state[[DELTA_PENDING, DELTA_AT]].tobytes()]
        for row, its_bits, its_symbols in zip(rows, bits, symbols, strict=True):
            done = int(row[CLASS_AT]) // 64 * 8
            found += [its_bits[:done].tobytes(), row[[CLASS_PENDING, CLASS_AT]].tobytes()]
            found.append(its_symbols[: int(row[CLASS_SYMBOLS]) - its_symbols.ctypes.data].tobytes())
        return found

    assert streams([]) == streams(list(range(1, words))) == streams([5, 5, 20])
    assert sum(map(len, streams([]))) > words * LANES * 0.4


# -- classes ---------------------------------------------------------------------------------------


def bits_for(counts: Sequence[Sequence[int]], cuts: Sequence[int], elements: int) -> float:
    """Bits of the sample that classes with these first bins take: positions, and what one costs."""
    sampled = sum(n for n, _ in counts)
    total = 0.0
    for first, stop in itertools.pairwise([*cuts, len(counts)]):
        n = sum(elements for elements, _ in counts[first:stop])
        k = sum(changed for _, changed in counts[first:stop])
        total += (1200 / elements + 0.0008) * sampled + sum(
            -x * math.log2(x / n) for x in (k, n - k) if x
        )
    return total


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(
        st.integers(500, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(150, n))),
        min_size=1,
        max_size=11,
    ),
    times=st.sampled_from([1, 4, 40]),
)
def test_the_best_classes_are_chosen(counts: list[tuple[int, int]], times: int) -> None:
    # every bin is large enough to be a class by itself
    sampled = sum(n for n, _ in counts)
    bins = range(1, len(counts))
    best = min(
        bits_for(counts, [0, *cuts], sampled * times)
        for more in range(min(MOST_CLASSES, len(counts)))
        for cuts in itertools.combinations(bins, more)
    )
    found = choose(np.array(counts, np.int64), sampled * times)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert len(found) <= MOST_CLASSES
    assert bits_for(counts, found, sampled * times) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    "counts",
    [
        [[0, 0]] * 5,
        [[9, 0], [5, 0]],
        [[9, 9], [5, 5]],
        [[0, 0], [1000, 1], [0, 0]],
    ],
)
def test_nothing_to_tell_apart_is_one_class(counts: list[list[int]]) -> None:
    assert choose(np.array(counts, np.int64), 1 << 22) == [0]


def test_tiny_bins_are_not_told_apart() -> None:
    counts = np.array([[1, 1], [100_000, 1000], [2, 0], [100_000, 50_000], [1, 0]], np.int64)
    assert choose(counts, 1 << 22) == [0, 3]
    many = np.tile([1000, 100], (2048, 1)).astype(np.int64)
    many[:1024, 1] = 900
    assert choose(many, 1 << 22) in ([0, 1024], [0, 1023], [0, 1025], [0, 1026], [0, 1022])
