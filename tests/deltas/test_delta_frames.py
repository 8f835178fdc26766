"""Frames of packed deltas: every pair of bits comes back."""

from __future__ import annotations

import itertools
import random

import naive_delta as naive
import numpy as np
import pytest
from delta_frames import (
    QUICK,
    Guarded,
    buffers,
    coders,
    specials,
    there_and_back,
    window,
    zones_intact,
)
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.deltas import packing
from ckdiff.deltas.form import FORMS
from ckdiff.deltas.varints import Damaged, FrameReader, varints

DENSITIES = [0, 0.002, 0.05, 0.5, 0.95, 1]


def test_the_buffers_are_watched() -> None:
    for coder in coders(False):
        assert {"_bits", "_symbols", "_extra"} <= {name for name, _ in buffers(coder)}
        assert zones_intact(coder)
        _, last = buffers(coder)[-1]
        last.base[..., -1] ^= 1
        assert not zones_intact(coder)
        last.base[..., -1] ^= 1


# -- there and back --------------------------------------------------------------------------------


def test_the_format_page_and_the_package_know_the_same_dtypes() -> None:
    known = {
        name: (8 * form.bytes, form.kind.endswith("f"), form.frame) for name, form in FORMS.items()
    }
    assert known == naive.LANES


@pytest.mark.parametrize("dtype", FORMS)
@QUICK
@given(data=st.data())
def test_windows_come_back(dtype: str, data: st.DataObject) -> None:
    lanes = data.draw(st.one_of(st.integers(1, 200), st.integers(1, 2000)))
    base, tuned = window(
        dtype,
        lanes,
        data.draw(st.sampled_from(DENSITIES)),
        data.draw(st.integers(0, 8 * FORMS[dtype].bytes - 1)),
        data.draw(st.integers(0, 2**32 - 1)),
    )
    there_and_back(dtype, base, tuned, offset=data.draw(st.integers(0, 16)))


@pytest.mark.parametrize("dtype", FORMS)
def test_special_patterns_become_each_other(dtype: str) -> None:
    width = 8 * FORMS[dtype].bytes
    pairs = list(itertools.product(specials(width), repeat=2))
    sides = [naive.bytes_of(list(side), width) for side in zip(*pairs, strict=True)]
    there_and_back(dtype, sides[0], sides[1])


@pytest.mark.parametrize("dtype", [name for name in FORMS if FORMS[name].bytes == 1])
def test_all_pairs_of_bytes(dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    there_and_back(dtype, np.repeat(every, 256).tobytes(), np.tile(every, 256).tobytes())


@pytest.mark.parametrize("dtype", [name for name in FORMS if FORMS[name].bytes == 2])
def test_all_16_bit_patterns_and_random_others(dtype: str) -> None:
    rng = np.random.default_rng(5)
    base = rng.permutation(np.arange(65536, dtype=np.uint16))
    for seed in range(3):
        tuned = np.random.default_rng(seed).permutation(base)
        there_and_back(dtype, base.tobytes(), tuned.tobytes(), slowly=seed == 0)


@pytest.mark.parametrize("dtype", ["U32", "F32", "U64", "F64"])
def test_steps_of_every_power(dtype: str) -> None:
    width = 8 * FORMS[dtype].bytes
    quarters = {i << p >> 2 for p in range(4, width) for i in (4, 5, 6, 7)}
    zs = {z + nearby for z in quarters for nearby in (-1, 0, 1)} | {(1 << width) - 2, *range(16)}
    zs = sorted(zs)
    noise = random.Random(3)
    base = [noise.getrandbits(width) for _ in zs]
    ordered = naive.LANES[dtype][1]
    tuned = [naive.moved(x, z, width, ordered) for x, z in zip(base, zs, strict=True)]
    frame = there_and_back(dtype, naive.bytes_of(base, width), naive.bytes_of(tuned, width))
    steps = naive.parse(frame, width, len(zs)).classes[0].steps
    assert len(set(steps)) == 16 + (width - 4) * (2 if width == 64 else 4)


@pytest.mark.parametrize("z", [13, 14, 15, 16, 17, 19, 20])
@pytest.mark.parametrize("often", [0.01, 1])
def test_steps_around_the_largest_half_byte(z: int, often: float) -> None:
    rng = np.random.default_rng(z)
    zs = np.where(rng.random(3001) < often, z, 0).tolist()
    base = rng.integers(0, 65536, len(zs)).tolist()
    tuned = [naive.moved(x, z, 16, True) for x, z in zip(base, zs, strict=True)]
    frame = there_and_back("BF16", naive.bytes_of(base, 16), naive.bytes_of(tuned, 16))
    one = naive.parse(frame, 16, len(zs)).classes[0]
    assert one.paired == (z < 15 or often < 1)
    if one.paired:
        assert one.rest_size == sum(z >= 15 for z in zs)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "C64", "F64"])
def test_any_number_of_classes(dtype: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_SAMPLED", 8)  # a word is enough to choose
    bins, rng = FORMS[dtype].bins, random.Random(count)
    for lanes in (64, 1111, 2500):
        firsts = [0, *sorted(rng.sample(range(1, bins), count - 1))]
        monkeypatch.setattr(packing, "choose", lambda *_, firsts=firsts: firsts)
        for density in (0.02, 0.6, 0.97):
            base, tuned = window(dtype, lanes, density, 6, lanes)
            frame = there_and_back(dtype, base, tuned, offset=count)
            if frame:
                found = naive.parse(frame, 8 * FORMS[dtype].bytes, lanes).classes
                assert [one.least >> FORMS[dtype].shift for one in found] == firsts


def weights(count: int, seed: int = 0) -> tuple[bytes, bytes]:
    """bf16 weights before and after an update that is the same for all: small ones change most."""
    rng = np.random.default_rng(seed)
    before = rng.normal(0, 0.02, count).astype(np.float32)
    after = before + rng.normal(0, 3e-6, count).astype(np.float32)
    sides = [((x.view(np.uint32) + 0x7FFF) >> 16).astype(np.uint16) for x in (before, after)]
    return sides[0].tobytes(), sides[1].tobytes()


def test_classes_are_found_where_small_weights_change_more_often() -> None:
    base, tuned = weights(100_000)
    frame = there_and_back("BF16", base, tuned)
    classes = naive.parse(frame, 16, 100_000).classes
    assert len(classes) > 2
    shares = [one.changed / one.elements for one in classes]
    assert shares == sorted(shares, reverse=True)
    assert {one.mode for one in classes} >= {naive.GAPS}
    # where chance has no regard to the weight, there is nothing to tell apart
    rng = np.random.default_rng(1)
    lanes = np.frombuffer(base, np.uint16)
    tuned = np.where(rng.random(len(lanes)) < 0.05, lanes + 1, lanes).astype(np.uint16).tobytes()
    assert len(naive.parse(there_and_back("BF16", base, tuned), 16, 100_000).classes) == 1


@pytest.mark.parametrize("dtype", ["U8", "F8_E5M2", "F6_E2M3", "BF16", "F32", "F64"])
def test_windows_as_large_as_they_get(dtype: str) -> None:
    form = FORMS[dtype]
    for nbytes in (form.frame, form.frame - form.bytes):
        lanes = nbytes // form.bytes
        base, tuned = window(dtype, lanes, 0.3, 8 * form.bytes - 1, lanes)
        there_and_back(dtype, base, tuned, slowly=False)
    # everything changes, as far as it can
    base, tuned = bytes(form.frame), (1 << (8 * form.bytes - 1)).to_bytes(form.bytes, "little")
    there_and_back(dtype, base, tuned * (form.frame // form.bytes), slowly=False)


def test_gaps_in_the_largest_window() -> None:
    size = FORMS["U8"].frame
    for places in ([0], [size - 1], [0, size - 1], [7, 8, 9, 300_000, 1 << 21]):
        base = bytes(size)
        tuned = bytearray(base)
        for at in places:
            tuned[at] = 1
        there_and_back("U8", base, bytes(tuned), slowly=False)
        there_and_back("U8", base, bytes(1 - x for x in tuned), slowly=False)


@pytest.mark.parametrize("dtype", FORMS)
@QUICK
@given(data=st.data())
def test_whole_windows_come_back(dtype: str, data: st.DataObject) -> None:
    size = FORMS[dtype].bytes * data.draw(st.integers(1, 700))
    raw = data.draw(st.binary(min_size=size, max_size=size))
    if data.draw(st.booleans()):
        raw = (raw[:16] * size)[:size]
    frame = coders(False)[0].encode_whole(FORMS[dtype], np.frombuffer(raw, np.uint8))
    out = Guarded(size, 1)
    coders(False)[1].decode_whole(FORMS[dtype], memoryview(frame), out.array)
    assert out.intact()
    assert out.array.tobytes() == raw
    assert naive.decode_whole(dtype, frame, size) == raw


# -- numbers ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_numbers_come_back(numbers: list[int]) -> None:
    data = varints(numbers)
    reader, slow = FrameReader(memoryview(data)), naive.Bytes(data)
    for number in numbers:
        assert reader.number(number) == slow.number(number) == number
    reader.finish()
    if numbers and numbers[0]:
        with pytest.raises(Damaged):
            FrameReader(memoryview(data)).number(numbers[0] - 1)
