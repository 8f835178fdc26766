"""Sequences of what differs, and zstd frames made of them and taken apart, against naive twins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_runs import naive_runs

from ckdiff.kernels import zstdframes
from ckdiff.kernels.runs import WIDTHS, RunFinder
from ckdiff.kernels.zstdframes import (
    BLOCK,
    FrameDecoder,
    SequenceEncoder,
    ended,
    frame_head,
    frame_header,
    last_block,
    raw_block,
    zero_blocks,
)

WINDOW = 4 * BLOCK


def pair(seed: int, size: int, share: float, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes, and the same with a share of them changed from some byte on."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, size, dtype=np.uint8)
    tuned = base.copy()
    where = np.flatnonzero(rng.random(size) < share)
    where = where[where >= first]
    tuned[where] ^= rng.integers(1, 256, len(where), dtype=np.uint8)
    return base, tuned


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 700), st.sampled_from([0.0, 0.005, 0.1, 0.5, 1.0]),
    st.sampled_from(WIDTHS), st.sampled_from([64, 128, 192]),
)  # fmt: skip
def test_sequences_are_those_of_the_twin(
    seed: int, size: int, share: float, width: int, block: int
) -> None:
    size -= size % width
    base, tuned = pair(seed, size, share)
    found = RunFinder(1024, block).find(base, tuned, width)
    literals, sequences, ends = naive_runs(base.tobytes(), tuned.tobytes(), block, width)
    assert found.literals.tobytes() == literals
    assert [tuple(row) for row in found.sequences.tolist()] == sequences
    assert [tuple(row) for row in found.ends.tolist()] == ends
    assert (found.elements, found.changed) == (ends[-1][2:] if ends else (0, 0))


def made(base: np.ndarray, tuned: np.ndarray, window: int = WINDOW) -> bytes:
    """A frame of the exclusive or, made a window at a time."""
    finder, encoder = RunFinder(window, BLOCK), SequenceEncoder(window)
    parts = []
    for at in range(0, len(base), window):
        one, other = base[at : at + window], tuned[at : at + window]
        parts.append(encoder.blocks(finder.find(one, other, 1), one, other, first=at == 0))
    return frame_header(len(base)) + b"".join(parts[:-1]) + ended(parts[-1])


def decoded(frame: bytes, size: int, piece: int, part: int = 1000) -> bytes:
    """What a frame of ``size`` bytes holds, decoded a piece at a time; raises ValueError."""
    given = iter([frame[i : i + part] for i in range(0, len(frame), part)])
    decoder = FrameDecoder(lambda: next(given, b""), frame_head(frame[:18]).window)
    out = np.zeros(size, np.uint8)
    for at in range(0, size, piece):
        decoder.fill(out[at : at + piece])
    decoder.finish()
    return out.tobytes()


SIZES = (1, 255, 256, 65791, 65792, BLOCK, BLOCK + 1, WINDOW, 2 * WINDOW + 4321)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 1.0])
def test_frames_hold_what_differs(size: int, share: float) -> None:
    base, tuned = pair(size, size, share)
    frame, wanted = made(base, tuned), (base ^ tuned).tobytes()
    assert zstandard.ZstdDecompressor().decompress(frame, read_across_frames=False) == wanted
    assert zstandard.get_frame_parameters(frame).content_size == size
    assert decoded(frame, size, 50_000) == wanted


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.01, 0.02, 0.1])
def test_frames_are_no_larger_than_those_of_level_1(share: float) -> None:
    base, tuned = pair(7, 4 * WINDOW, share)
    level1 = zstandard.ZstdCompressor(level=1).compress((base ^ tuned).data)
    assert len(made(base, tuned)) <= len(level1)


@pytest.mark.parametrize("share", [0.01, 0.6])
def test_a_frame_does_not_depend_on_what_was_made_before_it(share: float) -> None:
    """Offsets are at distance one: blocks mean the same wherever they stand, also behind others."""
    base, tuned = pair(3, 3 * WINDOW, share, first=WINDOW + 5000)
    whole = made(base, tuned)
    finder, encoder = RunFinder(WINDOW, BLOCK), SequenceEncoder(WINDOW)
    parts = []
    for at in reversed(range(0, len(base), WINDOW)):
        one, other = base[at : at + WINDOW], tuned[at : at + WINDOW]
        parts.append(encoder.blocks(finder.find(one, other, 1), one, other, first=at == 0))
    parts.reverse()
    assert frame_header(len(base)) + b"".join(parts[:-1]) + ended(parts[-1]) == whole


def test_blocks_of_zeros_and_raw_ones_stand_between_others() -> None:
    blocks = raw_block(b"abc") + zero_blocks(2 * BLOCK + 7)
    frame = frame_header(3 + 2 * BLOCK + 7) + ended(blocks)
    assert zstandard.ZstdDecompressor().decompress(frame) == b"abc" + bytes(2 * BLOCK + 7)
    assert last_block(blocks) == len(blocks) - 4
    with pytest.raises(ValueError, match="whole blocks"):
        last_block(blocks[:-1])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 22), st.integers(1, 999), st.integers(1, 99))
def test_frames_of_others_are_decoded(data: bytes, level: int, piece: int, part: int) -> None:
    frame = zstandard.ZstdCompressor(level=level).compress(data)
    head = frame_head(frame[:18])
    assert (head.content, head.window >= min(len(data), 1 << 10)) == (len(data), True)
    assert decoded(frame, len(data), piece, part) == data


@pytest.fixture(params=[True, False], ids=["called", "by the package"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(zstdframes, "_library", lambda: None)


DATA = np.random.default_rng(5).integers(0, 9, 40_000, dtype=np.uint8).tobytes()
FRAME = zstandard.ZstdCompressor(level=3).compress(DATA)

WRONG: dict[str, Callable[[], object]] = {
    "cut": lambda: decoded(FRAME[:-5], len(DATA), 999),
    "nothing at all": lambda: decoded(b"", 0, 9),
    "followed by a byte": lambda: decoded(FRAME + b"x", len(DATA), 999),
    "followed by a frame": lambda: decoded(FRAME + FRAME, len(DATA), 999),
    "followed by one that may be skipped": lambda: decoded(
        FRAME + b"\x50\x2a\x4d\x18\x00\x00\x00\x00", len(DATA), 999
    ),
    "longer than asked": lambda: decoded(FRAME, len(DATA) - 1, 999),
    "shorter than asked": lambda: decoded(FRAME, len(DATA) + 1, 999),
    "damaged": lambda: decoded(FRAME[:9] + b"\xff\xff\xff" + FRAME[12:], len(DATA), 999),
    "no frame": lambda: decoded(b"x" * 100, 100, 100),
    "without its size": lambda: frame_head(
        zstandard.ZstdCompressor(write_content_size=False).compress(DATA)[:18]
    ),
    "with a dictionary": lambda: frame_head(b"\x28\xb5\x2f\xfd\x23\x07\x10" + bytes(11)),
    "cut in its header": lambda: frame_head(b"\x28\xb5\x2f\xfd\xa0\x07"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("either_way")
def test_what_is_wrong_with_a_frame_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="zstd frame"):
        WRONG[name]()


@pytest.mark.usefixtures("either_way")
def test_both_ways_decode_the_same() -> None:
    assert decoded(FRAME, len(DATA), 777, 100) == DATA
    assert decoded(zstandard.ZstdCompressor().compress(b""), 0, 1) == b""


def test_windows_that_do_not_fit_are_refused() -> None:
    finder, eight = RunFinder(BLOCK, BLOCK), np.zeros(8, np.uint8)
    large = np.zeros(BLOCK + 1, np.uint8)
    for base, tuned, width in ((eight, eight[:7], 1), (large, large, 1), (eight, eight, 3)):
        with pytest.raises(ValueError, match="two windows"):
            finder.find(base, tuned, width)
    with pytest.raises(TypeError):
        finder.find(eight.view(np.int8), eight.view(np.int8), 1)  # type: ignore[arg-type]
