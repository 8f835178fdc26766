"""What differs between two windows, and putting it there again, against naive twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.kernels.changes import GROUP, MARGIN, PAGE, ChangeFinder, Changes, Kept, Put

WINDOW = 5 * PAGE // 2
KINDS = st.sampled_from(["", "portable"])
SIZES = st.integers(0, WINDOW) | st.integers(0, 200)
SHARES = st.sampled_from([0.0, 0.0005, 0.02, 0.5, 1.0])


def naive_changes(old: np.ndarray, new: np.ndarray) -> Changes:
    one, other = old.tolist(), new.tolist()
    at = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    words: dict[int, int] = {}
    for i in at:
        words[i // 64] = words.get(i // 64, 0) | 1 << i % 64
    blocks = bytearray(8 * -(-len(one) // GROUP))
    for block in words:
        blocks[block // 8] |= 1 << block % 8
    return Changes(
        np.frombuffer(blocks, np.uint64), np.array(list(words.values()), np.uint64),
        *(np.array([side[i] for i in at], np.uint8) for side in (one, other)),
    )  # fmt: skip


def kept(old: np.ndarray, new: np.ndarray) -> Kept:
    found = naive_changes(old, new)
    margin = np.full(MARGIN, 99, np.uint8)
    return Kept(found.blocks, found.masks, np.concatenate([found.old, found.new, margin]))


def two_windows(seed: int, size: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one size, that differ in a share of their bytes."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, size, dtype=np.uint8)
    flips = rng.integers(1, 256, size, dtype=np.uint8)
    return old, np.where(rng.random(size) < share, old ^ flips, old)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), SIZES, SHARES, st.integers(0, 3), KINDS)
def test_changes_are_those_of_the_twin(
    seed: int, size: int, share: float, offset: int, kind: str
) -> None:
    one, other = (side[offset:] for side in two_windows(seed, size + offset, share))
    found = ChangeFinder(WINDOW).find(one, other, kind)
    for mine, twin in zip(found, naive_changes(one, other), strict=True):
        assert mine.dtype == twin.dtype
        assert mine.tolist() == twin.tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), SIZES, SHARES, SHARES, st.integers(0, PAGE - 1), st.booleans(), KINDS,
)  # fmt: skip
def test_what_is_put_is_what_the_twin_puts(
    seed: int, size: int, share: float, done: float, skew: int, undo: bool, kind: str
) -> None:
    """Whatever part of it is there already, to the byte."""
    old, new = two_windows(seed, size, share)
    rng = np.random.default_rng(seed)
    held = np.where(rng.random(size) < done, new, old)
    data = np.concatenate([held, rng.integers(0, 256, MARGIN, dtype=np.uint8)])
    behind = data[size:].copy()
    put = Put(WINDOW)
    runs = put(kept(old, new), data, skew, undo=undo, kind=kind)
    assert runs is not None
    wanted = old if undo else new
    assert data[:size].tolist() == wanted.tolist()
    assert data[size:].tolist() == behind.tolist()
    touched = {(skew + i) // PAGE for i in np.flatnonzero(held != wanted).tolist()}
    written = [i for i in range(size) if (skew + i) // PAGE in touched]
    assert [i for first, stop in runs for i in range(first, stop)] == written
    assert not put(kept(old, new), data, skew, undo=undo, kind=kind)


@given(st.integers(0, 2**32), SIZES, st.booleans(), KINDS)
def test_what_is_neither_is_seen(seed: int, size: int, undo: bool, kind: str) -> None:
    old, new = two_windows(seed, size, 0.1)
    where = np.flatnonzero(old != new)
    if not len(where):
        return
    at = int(where[seed % len(where)])
    data = np.concatenate([old, np.zeros(MARGIN, np.uint8)])
    data[at] = next(byte for byte in range(256) if byte not in (old[at], new[at]))
    assert Put(WINDOW)(kept(old, new), data, 0, undo=undo, kind=kind) is None


def test_what_changes_beside_them_is_not_their_business() -> None:
    old, new = two_windows(1, WINDOW, 0.1)
    data = np.concatenate([old, np.zeros(MARGIN, np.uint8)])
    beside = np.flatnonzero(old == new)
    data[beside] ^= 5
    assert Put(WINDOW)(kept(old, new), data, 0) is not None
    assert data[beside].tolist() == (old[beside] ^ 5).tolist()


def test_windows_that_do_not_fit_are_refused() -> None:
    finder = ChangeFinder(64)
    for sizes in ((10, 12), (65, 65)):
        with pytest.raises(ValueError, match="one size"):
            finder.find(*(np.zeros(size, np.uint8) for size in sizes))
    with pytest.raises(TypeError):
        finder.find(np.zeros(8, np.int8), np.zeros(8, np.int8))


@pytest.mark.parametrize("size", [1000, 64 * 64, 511, 512, 8 * 512])
def test_changes_of_other_bytes_are_refused(size: int) -> None:
    old, new = two_windows(3, size, 1.0)
    put, data, found = Put(WINDOW), np.zeros(size + MARGIN, np.uint8), kept(old, new)
    assert put(found, np.concatenate([old, data[:MARGIN]]), 0) is not None
    wrong = [
        found._replace(values=found.values[1:]),
        found._replace(values=found.values[2:]),
        found._replace(values=np.append(found.values, found.values[:2])),
        found._replace(values=found.values[: MARGIN - 2]),
        found._replace(masks=found.masks[1:]),
        found._replace(masks=np.append(found.masks, found.masks[:1])),
        found._replace(blocks=found.blocks[1:]),
        found._replace(blocks=found.blocks ^ np.uint64(1)),
        found._replace(blocks=found.blocks << np.uint64(1)),
    ]
    if size % 64:
        wrong.append(found._replace(masks=np.full_like(found.masks, 2**64 - 1)))
        wrong[-1] = wrong[-1]._replace(values=np.zeros(128 * len(found.masks) + MARGIN, np.uint8))
    for other in wrong:
        with pytest.raises(ValueError, match=r"not of these bytes|needs|margin"):
            put(other, data, 0)
    for less in (size - 1, size - 64):
        with pytest.raises(ValueError, match="not of these bytes"):
            put(found, data[: less + MARGIN], 0)
    for skew in (-1, PAGE):
        with pytest.raises(ValueError, match="margin"):
            put(found, data, skew)
    with pytest.raises(ValueError, match="margin"):
        Put(size - 1)(found, data, 0)
