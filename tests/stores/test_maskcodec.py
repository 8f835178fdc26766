"""Mask frames are plain zstd, whatever way they were made, and depend on the bits alone."""

from __future__ import annotations

import hashlib
import itertools
import math

import numcodecs.zstd
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.kernels.abi import LONGEST, PIECE
from ckdiff.kernels.compiled import c_function
from ckdiff.stores.maskcodec import (
    FIRST_BITS,
    LEVELS,
    MaskEncoder,
    code_table,
    limited_lengths,
    normalised,
)

Bytes = npt.NDArray[np.uint8]


def scattered(density: float, seed: int = 0) -> Bytes:
    rng = np.random.default_rng(seed)
    return np.packbits(rng.random(PIECE * 8) < density)


def checked(piece: Bytes) -> bytes:
    """The frame of a piece, after two decoders have agreed on what it says."""
    frame = MaskEncoder().encode(piece)
    assert MaskEncoder(alike=False).encode(piece) == frame
    assert zstandard.ZstdDecompressor().decompress(frame) == piece.tobytes()
    assert bytes(numcodecs.zstd.decompress(frame)) == piece.tobytes()
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.content_size == PIECE
    assert parameters.has_checksum
    return frame


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_level_decodes(level: int) -> None:
    frame = checked(scattered(LEVELS[level], seed=level))
    library = zstandard.ZstdCompressor(level=1).compress(scattered(LEVELS[level], seed=level).data)
    assert len(frame) <= len(library) * 1.03


def test_the_nearest_level_of_any_number_of_bits() -> None:
    bits = np.arange(1, 8 * PIECE + 1)
    by_formula = [math.log(n / (8 * PIECE) / 0.014) / math.log(1.12) for n in bits.tolist()]
    by_table = np.searchsorted(FIRST_BITS, bits, side="right") - 1
    assert (by_table == np.clip(np.rint(by_formula), -1, len(LEVELS))).all()


def test_codes_are_those_that_stores_were_written_with() -> None:
    tables = hashlib.sha256()
    for level in range(len(LEVELS)):
        codes, _, tree = code_table(level)
        tables.update(codes.tobytes() + tree)
    assert tables.hexdigest() == "c78b817b233d3d986f962aa08e188c3e995c472fba58f5df26cb38081d3abc1d"


@pytest.mark.parametrize("density", [0, 1e-5, 0.001, 0.01, 0.45, 0.5, 0.6, 0.9, 0.999, 1])
def test_densities_without_a_level(density: float) -> None:
    checked(scattered(density))


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.0005, 0.6),
    st.integers(0, PIECE),
    st.integers(0, 3),
)
def test_any_mixture(seed: int, density: float, cut: int, structure: int) -> None:
    piece = scattered(density, seed)
    if structure == 1:
        piece[cut:] = 0
    elif structure == 2:
        piece[:cut] = 255
    elif structure == 3:
        piece[:] = np.resize(piece[: cut % 97 + 1], PIECE)
    checked(piece)


def test_adversarial_bytes_for_a_level() -> None:
    # The right share of zero bytes and the right density, but otherwise the dearest codes: longer
    # than the piece itself, so that it has to be stored raw.
    rng = np.random.default_rng(5)
    for p in (0.05, 0.1, 0.3):
        zeros = (1 - p) ** 8
        share = (8 * p) / (8 * (1 - zeros))
        piece = np.where(rng.random(PIECE) < zeros, 0, 0xFF).astype(np.uint8)
        some = np.packbits(rng.random(PIECE * 8) < share)
        piece = np.where(piece == 0, 0, np.maximum(some, 1)).astype(np.uint8)
        assert len(checked(piece)) <= PIECE + 64


def test_stripes_go_to_the_library() -> None:
    rows = np.repeat((np.arange(PIECE // 256) % 10 == 0) * 255, 256).astype(np.uint8)
    assert len(checked(rows)) < 500


def test_the_same_bits_give_the_same_frame() -> None:
    encoder, piece = MaskEncoder(), scattered(0.1)
    first = encoder.encode(piece)
    encoder.encode(scattered(0.2))
    encoder.encode(scattered(0.001))
    assert encoder.encode(piece.copy()) == first == MaskEncoder().encode(piece)


def test_survey_counts_bits_and_zero_bytes() -> None:
    piece = scattered(0.07)
    out = np.zeros(2, np.int64)
    c_function("survey").ctypes(piece.ctypes.data, PIECE // 8, out.ctypes.data)
    assert out.tolist() == [int(np.bitwise_count(piece).sum()), int((piece == 0).sum())]


@given(st.lists(st.floats(1e-9, 1), min_size=2, max_size=256))
def test_limited_lengths_are_a_complete_code(frequencies: list[float]) -> None:
    lengths = limited_lengths(frequencies)
    assert sum(2.0**-length for length in lengths) == 1
    assert max(lengths) <= LONGEST
    # a symbol that is more frequent is never longer
    order = np.argsort(frequencies, kind="stable")
    assert all(
        frequencies[a] == frequencies[b] or lengths[a] >= lengths[b]
        for a, b in itertools.pairwise(order)
    )


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_pair_codes_are_two_codes(level: int) -> None:
    entries, _, _ = code_table(level)
    single = entries.reshape(256, 256)
    lengths = (single & 31)[:, 0].astype(int) - int(single[0, 0] & 31) // 2
    assert ((single & 31) == lengths[:, None] + lengths[None, :]).all()


def test_normalised_fills_the_table() -> None:
    for weights in ([1] * 255, [11] + [1] * 200, list(range(1, 12)) * 20):
        counts = normalised(weights, 64)
        assert sum(counts) == 64
        assert min(counts) >= 1
