"""The kernels over masks of several stores, against numpy."""

from __future__ import annotations

import itertools
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import abi, entropy, hashing
from ckdiff.kernels.binades import WAYS, bins
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.zstd import Decoder

Masks = list[npt.NDArray[np.uint8]]


def random_masks(rng: np.random.Generator, stores: int, size: int) -> Masks:
    """Masks of all densities, with empty and full stretches, at odd addresses."""
    masks = []
    for _ in range(stores):
        density = rng.choice([0.0, 0.001, 0.1, 0.5, 1.0])
        bits = rng.random(size * 8) < density
        low, high = sorted(rng.integers(0, size * 8, 2).tolist())
        bits[low:high] = rng.random() < 0.3
        held = np.zeros(size + 1, np.uint8)
        held[1:] = np.packbits(bits, bitorder="little")
        masks.append(held[1:])
    return masks


@given(seed=st.integers(0, 2**32), words=st.integers(1, 70))
def test_bits_and_zero_bytes_of_a_mask(seed: int, words: int) -> None:
    (mask,) = random_masks(np.random.default_rng(seed), 1, 8 * words)
    zeros = len(mask) - np.count_nonzero(mask)
    assert entropy.survey(mask) == (np.unpackbits(mask).sum(), zeros)


def segments_of(
    masks: Masks, cuts: list[int], rows: list[int], target: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.int64]:
    """One segment between each pair of ``cuts`` (bytes)."""
    table = np.zeros((len(rows), abi.SEGMENT_COLUMNS + len(masks)), np.int64)
    for row, (start, stop), segment in zip(rows, itertools.pairwise(cuts), table, strict=True):
        segment[abi.SEG_SIZE], segment[abi.SEG_GROUP] = stop - start, row
        segment[abi.SEG_TARGET] = 0 if target is None else target.ctypes.data + start
        segment[abi.SEGMENT_COLUMNS :] = [mask.ctypes.data + start for mask in masks]
    return table


def planes(stores: int) -> str:
    return str(stores.bit_length())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stores=st.sampled_from([2, 3, 4, 7, 8, 15, 16, 40, 64]),
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=4),
)
def test_pairs_and_votes(seed: int, stores: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    cuts = np.cumsum([0, *(64 * size for size in sizes)]).tolist()
    masks = random_masks(rng, stores, cuts[-1])
    rows = rng.integers(0, 3, len(sizes)).tolist()
    table = segments_of(masks, cuts, rows)
    pairs = np.zeros((3, stores * (stores + 1) // 2), np.int64)
    votes = np.zeros((3, stores + 1), np.int64)
    scratch = np.zeros(2 * stores, np.int64)
    c_function("agree", planes(stores)).ctypes(
        table.ctypes.data, len(table), stores, pairs.ctypes.data, votes.ctypes.data,
        scratch.ctypes.data,
    )  # fmt: skip
    bits = np.unpackbits(np.stack(masks), axis=1, bitorder="little").astype(np.int64)
    expected_pairs, expected_votes = np.zeros_like(pairs), np.zeros_like(votes)
    for row, (start, stop) in zip(rows, itertools.pairwise(cuts), strict=True):
        part = bits[:, 8 * start : 8 * stop]
        counts = part @ part.T
        expected_pairs[row] += counts[np.triu_indices(stores)]
        expected_votes[row] += np.bincount(part.sum(0), minlength=stores + 1)
    assert np.array_equal(pairs, expected_pairs)
    assert np.array_equal(votes[:, 1:], expected_votes[:, 1:])
    assert not votes[:, 0].any(), "elements without a vote are for the caller to know"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    stores=st.sampled_from([2, 3, 4, 7, 16, 64]),
    operation=st.sampled_from(["difference", "odd", "at-least"]),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
)
def test_set_algebra(seed: int, stores: int, operation: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    cuts = np.cumsum([0, *(64 * size for size in sizes)]).tolist()
    masks = random_masks(rng, stores, cuts[-1])
    rows = rng.integers(0, 3, len(sizes)).tolist()
    found = np.full(cuts[-1] + 2, 0xEE, np.uint8)
    table = segments_of(masks, cuts, rows, found[1:])
    counts = np.zeros(3, np.int64)
    bits = np.unpackbits(np.stack(masks), axis=1, bitorder="little").astype(np.int64)
    votes = bits.sum(0)
    threshold = int(rng.integers(1, stores + 1))
    kind, expected = {
        "difference": ("difference", (bits[0] == 1) & (votes == 1)),
        "odd": ("odd", votes % 2 == 1),
        "at-least": (f"at-least:{planes(stores)}", votes >= threshold),
    }[operation]
    c_function("combine", kind).ctypes(
        table.ctypes.data, len(table), stores, threshold, counts.ctypes.data
    )
    assert np.array_equal(found[1:-1], np.packbits(expected, bitorder="little"))
    assert found[0] == found[-1] == 0xEE
    by_row = np.zeros(3, np.int64)
    for row, (start, stop) in zip(rows, itertools.pairwise(cuts), strict=True):
        by_row[row] += int(expected[8 * start : 8 * stop].sum())
    assert np.array_equal(counts, by_row)


def binade(dtype: str, bits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The bin of each element, from its value or its fields, in Python integers."""
    form = DTYPES[dtype]
    out = []
    for raw in bits.tolist():
        if form.kind == "float":
            size = raw & ((1 << (form.bits - 1)) - 1)
            if form.special == "fnuz" and raw == 1 << (form.bits - 1):
                out.append(1 << form.exponent)
            else:
                out.append(0 if size == 0 else (size >> form.mantissa) + 1)
        elif form.kind == "int":
            out.append(abs(raw - (1 << form.bits) if raw >> (form.bits - 1) else raw).bit_length())
        elif form.kind == "uint":
            out.append(raw.bit_length())
        else:
            out.append(0)
    return np.array(out, np.int64)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("elements", [8, 64, 136, 1024, 1500])
def test_cells(dtype: str, elements: int) -> None:
    form, rng, stores = DTYPES[dtype], np.random.default_rng(elements), 3
    data = bytearray(rng.bytes(elements * form.bits // 8))
    data[: len(data) // 4] = bytes(len(data) // 4)  # zeros
    if dtype == "F8_E4M3FNUZ":
        data[-1] = 0x80
    base = np.frombuffer(bytes(7) + bytes(data), np.uint8)[7:]
    masks = random_masks(rng, stores, -(-elements // 512) * 64)
    for mask in masks:  # bits past the end are zero, as in a store
        bits = np.unpackbits(mask, bitorder="little")
        bits[elements:] = 0
        mask[:] = np.packbits(bits, bitorder="little")
    width = bins(form)
    cells = np.zeros((stores + 1, WAYS, width), np.int64)
    table = np.array([mask.ctypes.data for mask in masks], np.int64)
    scratch, sums = np.zeros(abi.CELLS_SCRATCH, np.uint8), np.zeros(2, np.uint64)
    c_function("cells", dtype).ctypes(
        base.ctypes.data, elements, table.ctypes.data, stores, cells.ctypes.data,
        scratch.ctypes.data,
    )  # fmt: skip
    ContentHasher().add(sums, base[: len(data)], 0, form.bits)
    places = binade(dtype, naive.as_bits(dtype, bytes(data)))
    found = cells.sum(1)
    assert np.array_equal(found[0], np.bincount(places, minlength=width))
    for mask, counts in zip(masks, found[1:], strict=True):
        held = np.unpackbits(mask, bitorder="little", count=elements).astype(bool)
        assert np.array_equal(counts, np.bincount(places[held], minlength=width))
    digest = hashing.finish(int(sums[0]), int(sums[1]), len(data))
    assert digest == naive.content_hash(dtype, bytes(data))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 200),
    first=st.integers(0, 400),
    elements=st.integers(1, 3000),
)
def test_margins(seed: int, width: int, first: int, elements: int) -> None:
    mask = random_masks(np.random.default_rng(seed), 1, -(-elements // 64) * 8)[0]
    held = np.unpackbits(mask, bitorder="little", count=elements).astype(np.int64)
    flat = first + np.arange(elements)
    rows = np.zeros(flat[-1] // width - first // width + 1, np.int64)
    columns = np.zeros(width, np.int64)
    c_function("margins").ctypes(
        mask.ctypes.data, elements, first % width, width, rows.ctypes.data, columns.ctypes.data
    )
    expected = np.bincount(flat // width - first // width, weights=held, minlength=len(rows))
    assert np.array_equal(rows, expected)
    assert np.array_equal(columns, np.bincount(flat % width, weights=held, minlength=width))


def test_frames_are_decoded_until_one_is_wrong() -> None:
    decoder = Decoder()
    assert decoder.function, "the zstandard package exports its library"
    size, rng = 1 << 16, np.random.default_rng(0)
    pieces = [rng.bytes(size), bytes(size), b"\xaa" * size, rng.bytes(size // 2) * 2]
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    frames = [np.frombuffer(compressor.compress(piece), np.uint8) for piece in pieces]

    def decode(frames: list[npt.NDArray[np.uint8]]) -> tuple[int, bytes]:
        out = np.full((len(frames), size), 0xEE, np.uint8)
        table = np.zeros((len(frames), abi.DECODE_COLUMNS), np.int64)
        for i, frame in enumerate(frames):
            table[i] = out[i].ctypes.data, frame.ctypes.data, len(frame)
        done = c_function("decode").ctypes(
            table.ctypes.data, len(table), size, decoder.function, decoder.state
        )
        return done, out.tobytes()

    assert decode(frames) == (4, b"".join(pieces))
    nothing = frames[0][:0]  # stands for zeros
    assert decode([frames[0], nothing, frames[2]]) == (3, pieces[0] + bytes(size) + pieces[2])
    for damage in (frames[1][:-1], np.frombuffer(compressor.compress(b"short"), np.uint8)):
        assert decode([frames[0], damage, frames[2]])[0] == 1
    flipped = frames[3].copy()
    flipped[-1] ^= 1  # the content's checksum
    assert decode([*frames[:3], flipped])[0] == 3
    assert decode(frames)[0] == 4, "an error leaves the decoder usable"
