"""No bytes do harm: frames that are cut, flipped, made up, or of another base."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import naive_delta as naive
import numpy as np
import pytest
import zstandard
from delta_frames import KINDS, QUICK, Guarded, coders, decoded, encoded, window
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckdiff.deltas import packing
from ckdiff.deltas.form import FORMS
from ckdiff.deltas.varints import Damaged, varints

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
    monkeypatch.setattr(packing, "_SAMPLED", 8)
    monkeypatch.setattr(packing, "choose", lambda *_: [0, 60, 120, 130, 200])
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
        patch.setattr(packing, "_SAMPLED", 8)
        bins = FORMS[dtype].bins
        firsts = sorted(data.draw(st.sets(st.integers(1, max(1, bins - 1)), max_size=7)))
        patch.setattr(packing, "choose", lambda *_: [0, *firsts])
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
    for nbytes in (0, 1, 127, form.frame + 2, 1 << 40):
        zeros = np.broadcast_to(np.uint8(0), nbytes)  # takes no memory
        with pytest.raises(Damaged):
            coders(False)[1].decode(form, frame, zeros, zeros)
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
