"""Content hashes of one side alone are those that the comparing kernels take on the way."""

from __future__ import annotations

import itertools
import random

import naive
import naive_values
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import run, some_elements

from ckdiff.kernels import hashing
from ckdiff.kernels.casting import widen
from ckdiff.kernels.contents import ContentHasher

UNIT = hashing.UNIT


def by_contents(dtype: str, data: bytes, cuts: list[int], offset: int) -> str:
    """The content hash of bytes handed over in spans, in any order, at odd addresses."""
    bits, hasher = naive.FORMATS[dtype].bits, ContentHasher()
    edges = [0, *cuts, len(data) * 8 // bits]
    spans = list(itertools.pairwise(edges))
    random.Random(len(data)).shuffle(spans)
    sums = np.zeros(2, np.uint64)
    for first, stop in spans:
        part = data[first * bits // 8 : stop * bits // 8]
        held = np.full(len(part) + offset, 0x55, np.uint8)
        held[offset:] = np.frombuffer(part, np.uint8)
        hasher.add(sums, held[offset:], first * bits // 8, bits)
    return hashing.finish(int(sums[0]), int(sums[1]), len(data))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_same_bytes_have_one_hash(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(naive.FORMATS)))
    elements = data.draw(st.integers(1, 5 * UNIT))
    elements -= elements % naive.per_byte(dtype)
    units = st.lists(st.integers(1, 4), unique=True, max_size=3)
    cuts = sorted(UNIT * u for u in data.draw(units) if UNIT * u < elements)
    base, tuned = some_elements(dtype, elements, data.draw(st.integers(0, 1000)))
    compared = run(dtype, [], base, tuned, offset=data.draw(st.integers(0, 3))).hashes
    for side, found in zip((base, tuned), compared, strict=True):
        assert found == naive.content_hash(dtype, side)
        assert found == by_contents(dtype, side, cuts, data.draw(st.integers(0, 3)))


@pytest.mark.parametrize(("narrow", "wide"), [("BF16", "F32"), ("F8_E4M3", "BF16")])
def test_beside_a_comparison_by_value(narrow: str, wide: str) -> None:
    """Of two dtypes the wider one is hashed as it is compared, the other from its own bits."""
    own, _ = some_elements(narrow, 3 * UNIT + 77, 1)
    widened = np.zeros((3 * UNIT + 77) * naive.FORMATS[wide].bits // 8, np.uint8)
    widen(np.frombuffer(own, np.uint8), narrow, wide, widened)
    bits = np.frombuffer(own, f"u{naive.FORMATS[narrow].bits // 8}")
    assert widened.tobytes() == naive_values.wider(narrow, wide, bits).tobytes()
    other = widened.copy()
    other[1000] ^= 1
    compared = run(wide, [], widened.tobytes(), other.tobytes())
    assert compared.changed == {"exact": 1}
    assert compared.hashes[1] == naive.content_hash(wide, other.tobytes())
    alone = run(narrow, [], own, own)
    assert by_contents(narrow, own, [UNIT], 1) == alone.hashes[0] == alone.hashes[1]
    assert alone.hashes[0] != compared.hashes[0], "the hash is of the bits that are stored"


def test_where_the_library_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "xxh3_128_address", lambda: 0)
    base, _ = some_elements("BF16", 2 * UNIT + 5, 2)
    assert by_contents("BF16", base, [UNIT], 1) == naive.content_hash("BF16", base)
