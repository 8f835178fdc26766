"""Frames of packed deltas: every pair of bits comes back, and no bytes do harm."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import naive_delta as naive
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ckdiff.deltas import packed
from ckdiff.deltas.packed import FORMS, FrameDecoder, FrameEncoder
from ckdiff.deltas.varints import Damaged, FrameReader, varints

Bytes = npt.NDArray[np.uint8]
GUARD, ZONE = 256, 0xA5  # bytes around every buffer, and what is in them
#: one dtype of each kind of lanes
KINDS = ["U8", "F8_E4M3", "U16", "BF16", "U32", "F32", "U64", "F64"]
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def coders(portable: bool) -> tuple[FrameEncoder, FrameDecoder]:
    """An encoder and a decoder whose own buffers have zones after every row that must stay."""
    made = FrameEncoder(portable=portable), FrameDecoder(portable=portable)
    for coder in made:
        for name, buffer in buffers(coder):
            wider = np.full((*buffer.shape[:-1], buffer.shape[-1] + GUARD), ZONE, np.uint8)
            setattr(coder, name, wider[..., :-GUARD])
    return made


def buffers(coder: object) -> list[tuple[str, Bytes]]:
    arrays = [(name, x) for name, x in vars(coder).items() if isinstance(x, np.ndarray)]
    return [(name, x) for name, x in arrays if x.dtype == np.uint8]


def zones_intact(coder: object) -> bool:
    return all((x.base[..., -GUARD:] == ZONE).all() for _, x in buffers(coder))


def test_the_buffers_are_watched() -> None:
    for coder in coders(False):
        assert {"_bits", "_symbols", "_extra"} <= {name for name, _ in buffers(coder)}
        assert zones_intact(coder)
        _, last = buffers(coder)[-1]
        last.base[..., -1] ^= 1
        assert not zones_intact(coder)
        last.base[..., -1] ^= 1


class Guarded:
    """A buffer at a chosen distance from an aligned address, between zones that must stay."""

    def __init__(self, size: int, offset: int, data: bytes = b"", filler: int = ZONE) -> None:
        self._all = np.full(size + 2 * GUARD + 64, filler, np.uint8)
        start = -self._all.ctypes.data % 64 + GUARD + offset
        self._expected = self._all.copy()
        self._inside = slice(start, start + size)
        self.array = self._all[self._inside]
        self.array[: len(data)] = np.frombuffer(data, np.uint8)
        self.address = self.array.ctypes.data

    def intact(self) -> bool:
        self._expected[self._inside] = self.array
        return bool((self._all == self._expected).all())


def encoded(
    dtype: str, base: bytes, tuned: bytes, *, offset: int = 0, portable: bool = False
) -> tuple[bytes, int]:
    """The frame of a window, its sides at addresses of any alignment, and its changed lanes."""
    sides = Guarded(len(base), offset, base), Guarded(len(tuned), 3 * offset % 64, tuned, 0x5A)
    encode = coders(portable)[0].encode
    found = encode(FORMS[dtype], sides[0].address, sides[1].address, len(base))
    assert sides[0].intact()
    assert sides[1].intact()
    assert zones_intact(coders(portable)[0])
    assert sides[0].array.tobytes() == base
    assert sides[1].array.tobytes() == tuned
    return found


def decoded(
    dtype: str, frame: bytes, base: bytes, *, offset: int = 0, portable: bool = False
) -> tuple[bytes, int]:
    """The tuned window and its changed lanes; nothing around the buffers may have been touched."""
    source, out = Guarded(len(base), offset, base), Guarded(len(base), 5 * offset % 64)
    decode = coders(portable)[1].decode
    try:
        form = FORMS[dtype]
        changed = decode(form, memoryview(frame), source.address, len(base), out.address)
    finally:
        assert source.intact()
        assert out.intact()
        assert zones_intact(coders(portable)[1])
        assert source.array.tobytes() == base
    return out.array.tobytes(), changed


def there_and_back(
    dtype: str, base: bytes, tuned: bytes, *, offset: int = 0, slowly: bool = True
) -> bytes:
    """The frame of a window, after everything that reads and makes frames has agreed on it."""
    frame, changed = encoded(dtype, base, tuned, offset=offset)
    assert encoded(dtype, base, tuned, offset=offset + 1, portable=True) == (frame, changed)
    width = FORMS[dtype].bytes
    sides = [np.frombuffer(side, f"u{width}") for side in (base, tuned)]
    assert changed == np.count_nonzero(sides[0] != sides[1])
    if not changed:
        assert frame == b""
        return frame
    for portable in (False, True):
        found = decoded(dtype, frame, base, offset=offset, portable=portable)
        assert found == (tuned, changed)
    if slowly:
        naive.check(dtype, frame, base, tuned)
        assert naive.decode(dtype, frame, base) == tuned
    return frame


def specials(width: int) -> list[int]:
    """Patterns at the edges of the ranges of floats and integers."""
    exponents = {8: (2, 3), 16: (7, 10), 32: (23,), 64: (52,)}[width]
    top = 1 << (width - 1)
    found = {0, 1, 2, top - 1, top - 2}
    for mantissa in exponents:
        infinity = top - (1 << mantissa)
        found |= {(1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity + 1}
    return sorted(found | {x | top for x in found})


DENSITIES = [0, 0.002, 0.05, 0.5, 0.95, 1]


def window(dtype: str, lanes: int, density: float, reach: int, seed: int) -> tuple[bytes, bytes]:
    """Two windows: patterns of all sorts, steps of up to ``reach`` bits, likelier if small."""
    width = 8 * FORMS[dtype].bytes
    rng = np.random.default_rng(seed)
    kind = f"u{width // 8}"
    base = (
        rng.integers(0, 1 << width, lanes, kind, endpoint=False)
        if width < 64
        else (rng.integers(0, (1 << 64) - 1, lanes, kind, endpoint=True))
    )
    odd = rng.random(lanes) < 0.1
    base[odd] = rng.choice(np.array(specials(width), kind), int(odd.sum()))
    lengths = rng.integers(0, reach, lanes, endpoint=True)
    steps = rng.integers(0, 1 << 63, lanes, "u8") >> (64 - lengths.clip(1)).astype("u8")
    steps |= np.uint64(1) << lengths.clip(0, width - 1).astype("u8")
    steps = np.where(rng.random(lanes) < 0.5, steps, -steps).astype(kind)
    # the changed ones: most where the magnitude is small
    small = (base & np.array((1 << (width - 1)) - 1, kind)) < 1 << (width - 2)
    chance = np.where(small, min(1, 1.8 * density), 0.2 * density if density < 1 else 1)
    tuned = np.where(rng.random(lanes) < chance, base + steps, base).astype(kind)
    return base.tobytes(), tuned.tobytes()


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
    lanes = data.draw(st.one_of(st.integers(1, 200), st.integers(1, 3000)))
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
    monkeypatch.setattr(packed, "_SAMPLED", 8)  # a word is enough to choose
    bins, rng = FORMS[dtype].bins, random.Random(count)
    for lanes in (64, 1111, 2500):
        firsts = [0, *sorted(rng.sample(range(1, bins), count - 1))]
        monkeypatch.setattr(packed, "choose", lambda *_, firsts=firsts: firsts)
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


# -- hostile frames --------------------------------------------------------------------------------


def outcome(dtype: str, frame: bytes, base: bytes) -> bytes | None:
    """The window that a frame gives, the same by every reader; None where all refuse it."""
    results: list[bytes | None] = []
    for portable in (False, True):
        try:
            results.append(decoded(dtype, frame, base, portable=portable)[0])
        except Damaged:
            results.append(None)
    try:
        results.append(naive.decode(dtype, frame, base))
    except naive.Refused:
        results.append(None)
    assert results[0] == results[1] == results[2]
    return results[0]


@cache
def samples() -> list[tuple[str, bytes, bytes, bytes]]:
    """(dtype, base, tuned, frame) of small windows that have all kinds of streams."""
    found = []
    for dtype, lanes, density, reach in [
        ("BF16", 300, 0.04, 5), ("BF16", 70, 0.5, 2), ("F32", 130, 0.3, 31), ("U64", 65, 0.9, 63),
        ("F64", 200, 0.97, 3), ("U8", 500, 0.02, 7), ("BF16", 900, 1, 1), ("F8_E4M3", 64, 0.1, 7),
    ]:  # fmt: skip
        base, tuned = window(dtype, lanes, density, reach, lanes)
        found.append((dtype, base, tuned, encoded(dtype, base, tuned)[0]))
    return found


def several_classes(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes, bytes]:
    monkeypatch.setattr(packed, "_SAMPLED", 8)
    monkeypatch.setattr(packed, "choose", lambda *_: [0, 60, 120, 130, 200])
    base, tuned = window("BF16", 700, 0.2, 9, 4)
    return base, tuned, encoded("BF16", base, tuned)[0]


def test_samples_have_every_mode() -> None:
    seen = {
        (one.mode, one.paired, one.low > 0)
        for dtype, base, _, frame in samples()
        for one in naive.parse(
            frame, naive.LANES[dtype][0], len(base) * 8 // naive.LANES[dtype][0]
        ).classes
    }
    assert {mode for mode, _, _ in seen} >= {naive.BITS, naive.GAPS}
    assert {paired for _, paired, _ in seen} == {False, True}
    assert {low for _, _, low in seen} == {False, True}


def test_cut_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, base, _, frame in [*samples(), ("BF16", *several_classes(monkeypatch))]:
        for size in range(len(frame)):
            with pytest.raises(Damaged):
                decoded(dtype, frame[:size], base)
        with pytest.raises(Damaged):
            decoded(dtype, frame + b"\0", base)


def test_flipped_bits_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = 0
    cases = [*samples(), ("BF16", *several_classes(monkeypatch))]
    for dtype, base, _, frame in cases:
        numbers = min(8 * len(frame), 8 * 24)  # every bit there, and some of the streams'
        for i in [*range(numbers), *range(numbers, 8 * len(frame), 41)]:
            wrong = bytearray(frame)
            wrong[i // 8] ^= 1 << i % 8
            found = outcome(dtype, bytes(wrong), base)
            refused += found is None
    assert refused > 300


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), dtype=st.sampled_from(KINDS), lanes=st.integers(1, 200))
def test_random_bytes_are_refused(data: bytes, dtype: str, lanes: int) -> None:
    base = bytes(lanes * FORMS[dtype].bytes)
    assert outcome(dtype, data, base) is None
    out = np.empty(len(base), np.uint8)
    if data[:1] != b"\1":
        with pytest.raises(Damaged):
            coders(False)[1].decode_whole(FORMS[dtype], memoryview(data), out)


@pytest.mark.parametrize("dtype", KINDS)
@QUICK
@given(data=st.data())
def test_a_wrong_base_does_no_harm(dtype: str, data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, 1000))
    seed = data.draw(st.integers(0, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_SAMPLED", 8)
        bins = FORMS[dtype].bins
        firsts = sorted(data.draw(st.sets(st.integers(1, max(1, bins - 1)), max_size=7)))
        patch.setattr(packed, "choose", lambda *_: [0, *firsts])
        base, tuned = window(dtype, lanes, 0.3, 5, seed)
        frame = encoded(dtype, base, tuned)[0]
    other = window(dtype, lanes, 0, 5, seed + 1)[0]
    if frame:
        assert outcome(dtype, frame, other) != tuned
        shifted = base[FORMS[dtype].bytes :] + base[: FORMS[dtype].bytes]
        outcome(dtype, frame, shifted)


def made(*numbers: int, streams: bytes = b"", kind: int = 0) -> bytes:
    return bytes([kind]) + varints(numbers) + streams


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


FULL, EMPTY = 1, 0
#: windows of 64 lanes of BF16, all 0, that are no frames: why -> bytes
CRAFTED = {
    "nothing": b"",
    "another kind": made(1, 0, 0, 64, 0, 0, kind=2),
    "a kind of two bytes": b"\x80\x00" + varints([1, 0, 0, 64, 0, 0]),
    "no classes": made(0, 0, 0),
    "nine classes": made(9, 0, 0, 64, 0, 0, *[1, 0, 0, 0] * 8),
    "eight classes of nothing": made(
        8, 0, 0, 0, 0, 0, *itertools.chain(*([c, 0, 0, 0] for c in range(1, 8)))
    ),
    "classes not ascending": made(3, 0, 0, 64, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0),
    "a second class at 0": made(2, 0, 0, 64, 0, 0, 0, 0, 0, 0),
    "a class above every lane": made(2, 0, 0, 64, 0, 0, 1 << 15, 0, 0, 0),
    "a class shifted out": made(2, 63, 0, 64, 0, 0, (1 << 63) - 1, 0, 0, 0),
    "shift 64": made(1, 64, 0, 64, 0, 0),
    "too few elements": made(1, 0, 0, 63, 0, 0),
    "too many elements": made(1, 0, 0, 65, 0, 0),
    "elements of a large frame": made(1, 0, 0, 1 << 22, 0, 0),
    "more changed than there are": made(1, 0, 0, 64, 65, FULL),
    "all changed in mode none": made(1, 0, 0, 64, 64, EMPTY, 64, streams=bytes(64)),
    "63 changed in mode all": made(1, 0, 0, 64, 63, FULL, 63, streams=bytes(63)),
    "low bits without gaps": made(1, 0, 0, 64, 64, FULL | 1 << 3, 64, streams=bytes(64)),
    "pairs of nothing": made(1, 0, 0, 64, 0, EMPTY | 4, 0, 0),
    "more low bits than 32": made(1, 0, 0, 64, 1, 3 | 33 << 3, 1, 1, 1, streams=bytes(7)),
    "ones do not match the bits": made(1, 0, 0, 64, 2, 2, 8, 2, streams=b"\1" + bytes(9)),
    "more gaps than ones": made(1, 0, 0, 64, 1, 3, 2, 2, 1, streams=bytes(3)),
    "fewer gaps than ones": made(1, 0, 0, 64, 2, 3, 1, 1, 2, streams=bytes(3)),
    "a gap past the end": made(1, 0, 0, 64, 1, 3, 1, 1, 1, streams=b"\x40\0"),
    "a gap without an end": made(1, 0, 0, 64, 1, 3, 1, 1, 1, streams=b"\xff\0"),
    "many times 255": made(1, 0, 0, 64, 1, 3, 1 << 20, 1 << 20, 1, streams=b"\xff" * (1 << 20)),
    "many times 255, shifted": made(
        1, 0, 0, 64, 1, 3 | 32 << 3, 1 << 20, 1 << 20, 1,
        streams=b"\xff" * ((1 << 20) - 1) + b"\xfe" + b"\xff" * 4 + b"\0",
    ),
    "more gap bytes than any frame": made(1, 0, 0, 64, 1, 3, (1 << 20) + 1, 9, 1),
    "stored larger than it is": made(1, 0, 0, 64, 64, FULL, 65, streams=bytes(65)),
    "pairs stored as bytes": made(1, 0, 0, 64, 64, FULL | 4, 64, 0, 0, streams=bytes(64)),
    "a rest too long": made(1, 0, 0, 64, 64, FULL | 4, 32, 1, 1, streams=bytes(33)),
    "a rest too short": made(1, 0, 0, 64, 64, FULL | 4, 32, 0, 0, streams=bytes(31) + b"\xf0"),
    "a power above the lane": made(
        1, 0, 99, 64, 64, FULL, 64, streams=bytes(13) + b"\x40" + bytes(63)
    ),
    "the largest symbol": made(1, 0, 800, 64, 64, FULL, 64, streams=bytes(100) + b"\xff" * 64),
    "extra bits missing": made(1, 0, 1, 64, 64, FULL, 64, streams=b"\0\x10" + bytes(63)),
    "extra bits left over": made(1, 0, 1, 64, 64, FULL, 64, streams=b"\0" + bytes(64)),
    "more extra bits than any frame": made(1, 0, (1 << 26) + 1, 64, 64, FULL, 64),
    "extra bits that are not there": made(1, 0, 1 << 26, 64, 64, FULL, 64, streams=bytes(64)),
    "no step": made(1, 0, 13, 64, 64, FULL, 64, streams=b"\xff\x1f" + b"\x3f" + bytes(63)),
    "a number without an end": b"\0" + b"\x80" * 30,
    "a number of 70 bits": b"\0" + b"\xff" * 9 + b"\x7f",
    "a number longer than it need be": b"\0\x81\0" + made(0, 0, 64, 0, 0)[1:],
    "not zstd": made(1, 0, 0, 64, 64, FULL, 40, streams=bytes(40)),
    **{
        f"zstd, {why}": made(1, 0, 0, 64, 64, FULL, len(data), streams=data)
        for why, data in {
            "63 symbols": zstd(bytes(63)),
            "65 symbols": zstd(bytes(65)),
            "a gigabyte claimed": b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 30) + b"\3\0\0",
            "a size that is a lie": b"\x28\xb5\x2f\xfd\x20\x40" + b"\x03\x00\x00" + bytes(9),
            "no size": zstd(bytes(64), write_content_size=False),
            "cut": zstd(bytes(64))[:-1],
            "more after it": zstd(bytes(64)) + b"\0",
            "two of them": zstd(bytes(64)) + zstd(b""),
            "more than it says": b"\x28\xb5\x2f\xfd\x20\x40" + bytes([3 | 65 << 3 & 0xF8, 2, 0, 0]),
            "a large window": b"\x28\xb5\x2f\xfd\x40\xff\x40\x00" + b"\x03\x02\x00\x00",
            "a skippable frame": b"\x50\x2a\x4d\x18" + struct.pack("<I", 8) + bytes(8),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("why", CRAFTED)
def test_crafted_frames_are_refused(why: str) -> None:
    assert outcome("BF16", CRAFTED[why], bytes(128)) is None


def test_crafted_frames_that_are_frames() -> None:
    """The ones above differ from these by what they are named for."""
    ones = b"\x01\x00" * 64
    for frame in (
        made(1, 0, 0, 64, 64, FULL, 64, streams=b"\1" * 64),
        made(1, 63, 0, 64, 64, FULL | 4, 32, 0, 0, streams=b"\x11" * 32),
        made(2, 0, 0, 64, 64, FULL, 64, 5, 0, 0, 0, streams=b"\1" * 64),
        made(1, 0, 0, 64, 64, 3, 0, 0, 64, streams=b"\1" * 64),
        made(1, 0, 0, 64, 64, FULL, len(zstd(b"\1" * 64)), streams=zstd(b"\1" * 64)),
    ):
        assert outcome("BF16", frame, bytes(128)) == ones
    gap = made(1, 0, 0, 64, 1, 3 | 32 << 3, 1, 1, 1, streams=b"\0\5\0\0\0\1")
    assert outcome("BF16", gap, bytes(128)) == bytes(10) + b"\1\0" + bytes(116)


@settings(max_examples=400, deadline=None)
@given(
    numbers=st.lists(
        st.one_of(st.integers(0, 8), st.sampled_from([15, 32, 63, 64, 128, 255, 1 << 20, 1 << 62])),
        max_size=20,
    ),
    streams=st.binary(max_size=150),
    dtype=st.sampled_from(KINDS),
)
@example(numbers=[1, 0, 0, 64, 64, 1, 64], streams=bytes(64), dtype="U8")
def test_frames_of_plausible_numbers(numbers: list[int], streams: bytes, dtype: str) -> None:
    outcome(dtype, made(1, 0, *numbers, streams=streams), bytes(64 * FORMS[dtype].bytes))


def test_windows_that_no_frame_has_are_refused() -> None:
    form = FORMS["BF16"]
    frame = memoryview(made(1, 0, 0, 0, 0, 0))
    for nbytes in (0, -2, 1, 127, form.frame + 2, 1 << 40):
        with pytest.raises(Damaged):
            coders(False)[1].decode(form, frame, 0, nbytes, 0)
    for size in (0, 1, 127, form.frame + 2):
        with pytest.raises(Damaged):
            coders(False)[1].decode_whole(form, memoryview(b"\1\0\0"), np.empty(size, np.uint8))


def whole_frames() -> Iterator[tuple[bytes, int]]:
    raw = bytes(range(200)) * 2 + bytes(400)
    frame = coders(False)[0].encode_whole(FORMS["F32"], np.frombuffer(raw, np.uint8))
    yield frame, len(raw)
    yield made(100, 100, 100, 100, kind=1, streams=bytes(400)), 400


def test_whole_frames_cut_and_flipped_do_no_harm() -> None:
    decode_whole = coders(False)[1].decode_whole
    for frame, size in whole_frames():
        for cut in range(len(frame)):
            with pytest.raises(Damaged):
                decode_whole(FORMS["F32"], memoryview(frame[:cut]), np.empty(size, np.uint8))
        for i in range(8 * len(frame)):
            wrong = bytearray(frame)
            wrong[i // 8] ^= 1 << i % 8
            out = Guarded(size, 1)
            try:
                decode_whole(FORMS["F32"], memoryview(wrong), out.array)
            except Damaged:
                found = None
            else:
                found = out.array.tobytes()
            assert out.intact()
            try:
                assert naive.decode_whole("F32", bytes(wrong), size) == found
            except naive.Refused:
                assert found is None


def test_kinds_do_not_pass_for_each_other() -> None:
    with pytest.raises(Damaged):
        decoded("U8", made(64, kind=1, streams=bytes(64)), bytes(64))
    changes = memoryview(made(1, 0, 0, 64, 0, 0))
    with pytest.raises(Damaged):
        coders(False)[1].decode_whole(FORMS["U8"], changes, np.empty(64, np.uint8))


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
