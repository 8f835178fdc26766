"""Counting in tensors of torch, by kernels and by torch itself, against the slow twin."""

from __future__ import annotations

import tracemalloc
from typing import Any

import naive
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, random_bits

import ckdiff
from ckdiff.checkpoints.places import heldtorch
from ckdiff.checkpoints.places.held import Held
from ckdiff.checkpoints.places.heldtorch import held_tensor
from ckdiff.kernels import abi
from ckdiff.kernels.gpu import counting
from ckdiff.rules import Rule
from ckdiff.training import watchingcounts
from ckdiff.training.watchingcounts import Pair, count

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RULES = ["exact", "exact@bf16", "exact@f16", "atol=1e-3", "rtol=0.01", "ulp=2", "atol=0.1@bf16"]


def tensor_of(bits: Any, dtype: str) -> torch.Tensor:
    found = torch.empty(len(bits), dtype=DTYPES[dtype])  # a view of none has no last dimension
    if len(bits):
        found.view(torch.uint8)[:] = torch.from_numpy(bits.view(np.uint8).copy())
    return found


def pair(now: torch.Tensor, *then: torch.Tensor) -> Pair:
    held = held_tensor(now, torch, "", "here")
    assert isinstance(held, Held)
    return Pair(now, held, list(then))


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 3000), st.integers(0, 2)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(RULES),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1 << 10, 1 << 22]),
)
@example([("F32", 0, 0), ("BF16", 1, 1)], "exact", 0, 1 << 10)
@settings(max_examples=40)
def test_counts_are_the_twin_s(
    tensors: list[tuple[str, int, int]], rule: str, seed: int, chunk: int
) -> None:
    """Several tensors of any dtype, some of them strided; copies become what the tensors are."""
    pairs, expected = [], []
    noise = np.random.default_rng(seed)
    for i, (dtype, elements, strided) in enumerate(tensors):
        bits = [random_bits(dtype, elements, seed + 3 * i + k).copy() for k in range(3)]
        if dtype == "BOOL":
            bits = [side & 1 for side in bits]
        for k in (1, 2):
            same = noise.random(elements) < 0.7
            bits[k][same] = bits[0][same]
        now, *then = (tensor_of(side, dtype) for side in bits)
        if strided:  # what lies between its elements counts for nothing
            wide = torch.zeros(elements, strided + 1, dtype=now.dtype)
            wide[:, 0] = now
            now = wide[:, 0]
        pairs.append(pair(now, *then))
        expected.append(
            [naive.Pairs(dtype, side, bits[0]).changed(rule).sum() for side in bits[1:]]
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchingcounts, "_CHUNK", chunk)
        patch.setattr(watchingcounts, "_PIECE", 512)
        patch.setattr(watchingcounts, "_SLICE", 700)
        parsed = Rule.parse(rule)
        assert watchingcounts._count_there(pairs, parsed).tolist() == expected
        assert count(pairs, parsed, renew=1).tolist() == expected
        first = [row[0] for row in expected]
        assert count(pairs, parsed, renew=None).tolist() == [[n, 0] for n in first]
    for one in pairs:
        width = WORDS[one.now.element_size()]
        assert torch.equal(one.then[1].view(width), one.now.contiguous().view(width))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_what_is_on_a_device(
    rule: str, strided: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the processor's memory were a device's: the way there is the same for all of them.
    What is on one for which there is no code is copied.
    """
    asked: list[int] = []

    def count_changed(pairs: Any, *arguments: Any) -> torch.Tensor:
        asked.append(len(pairs))
        if not known:
            raise ckdiff.UsageError("no code")
        return real(pairs, *arguments)

    real = counting.count_changed
    monkeypatch.setattr(counting, "count_changed", count_changed)
    monkeypatch.setattr(watchingcounts, "_is_there", lambda tensor: True)
    monkeypatch.setattr(heldtorch, "is_here", lambda tensor: False)
    monkeypatch.setattr(heldtorch, "synchronize", lambda torch, tensors: None)
    pairs, expected = [], []
    for dtype in ("BF16", "F32", "I32"):
        bits = [random_bits(dtype, 5000, seed).copy() for seed in range(3)]
        for side in bits[1:]:
            side[::3] = bits[0][::3]
        now, *then = (tensor_of(side, dtype).view(50, 100) for side in bits)
        pairs.append(pair(now.t().contiguous().t() if strided else now, *then))
        assert type(pairs[-1].held).__name__ == "HeldOnDevice"
        expected.append(
            [naive.Pairs(dtype, side, bits[0]).changed(rule).sum() for side in bits[1:]]
        )
    assert count(pairs, Rule.parse(rule), renew=1).tolist() == expected
    assert asked == ([1] * 6 if strided else [6])[: 6 if known else 1]
    assert count(pairs, Rule.parse(rule)).tolist() == [[first, 0] for first, _ in expected]
    for one in pairs:
        width = WORDS[one.now.element_size()]
        assert torch.equal(one.then[1].view(width), one.now.contiguous().view(width))


def test_a_look_takes_no_memory_to_speak_of() -> None:
    weight = torch.zeros(1 << 24, dtype=torch.bfloat16)
    pairs = [pair(weight, weight.clone(), weight.clone())]
    count(pairs, Rule.parse("exact"), renew=1)  # kernels are loaded
    tracemalloc.start()
    try:
        count(pairs, Rule.parse("exact"), renew=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < weight.nbytes / 16


def test_what_is_written_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1000)
    watched = pair(weight, weight.clone())
    real = watchingcounts._Counting._table

    def training_goes_on(*args: Any) -> Any:
        weight.add_(1)
        return real(*args)

    monkeypatch.setattr(watchingcounts._Counting, "_table", training_goes_on)
    with pytest.raises(ckdiff.SourceChanged, match="was changed while it was being read"):
        count([watched], Rule.parse("exact"))


def test_a_kernel_is_given_what_it_can_hold() -> None:
    known = kernels(("F32",), ("exact",))
    table = np.zeros((1, abi.SEG_COLUMNS), np.int64)
    table[0, abi.SEG_ELEMENTS] = 1024
    with pytest.raises(ValueError, match="a kernel would reach"):
        known.count(table, np.zeros(64, np.uint8), np.zeros((1, 1), np.int64))
    with pytest.raises(ValueError, match="a kernel would reach"):
        known.count(table, np.zeros(128, np.uint8), np.zeros((0, 1), np.int64))
    with pytest.raises(ValueError, match="counts of 1 rules"):
        known.count(table, np.zeros(128, np.uint8), np.zeros((1, 2), np.int64))
