"""Windows on a device against the CPU's kernels, bit for bit: pieces, stages, streams, memory.

On a GPU where there is one, and else on torch's CPU device. Rules are in test_gpu_fused.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock, call

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, on_device, run, some_elements

from ckdiff.dtypes import DTYPES
from ckdiff.errors import BudgetError, CkdiffError
from ckdiff.kernels import BLOCK, Comparing, Results, abi
from ckdiff.kernels.gpu import open_device, staging
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.kernels import DeviceKernels
from ckdiff.kernels.gpu.sizes import SMALLEST, Sizes
from ckdiff.rules import Rule

DEVICE = open_device("cuda" if torch.cuda.is_available() else "torch-cpu")
RULES = ["exact", "atol=1e-3"]
LONG = some_elements("BF16", 3 * BLOCK, 1)  # three pieces


def agree(
    dtype: str,
    sides: Sequence[bytes],
    *,
    using: DeviceKernels | None = None,
    stats: bool = False,
    cuts: Sequence[int] = (),
) -> None:
    """Hold both against each other: masks, counts, hashes and statistics, to the bit."""
    using = using or on_device(DEVICE, [dtype], RULES, stats=stats)
    found, expected = (
        run(dtype, RULES, *sides, stats=stats, offset=1, cuts=cuts, using=one)
        for one in (using, None)
    )
    assert found.unlike(expected) == []


# -- windows ---------------------------------------------------------------------------------------

MIXED = ("BF16", "F32", "F4", "F8_E4M3", "I64", "F64", "F6_E2M3")
SEVERAL = ("exact", "atol=1e-3", "rtol=1e-3@bf16", "ulp=1")


class Window:
    """Tensors of several dtypes, one after the other with some places left out."""

    def __init__(self, seed: int, most: int) -> None:
        noise = random.Random(seed)
        self.kept: list[np.ndarray] = []
        rows: list[list[int]] = []
        position = 0
        for row in range(14):
            slot = noise.choice([0, 0, noise.randrange(len(MIXED))])
            dtype, of = MIXED[slot], naive.FORMATS[MIXED[slot]].bits
            count = noise.randrange(1, most) * naive.per_byte(dtype)
            addresses = []
            for side in some_elements(dtype, count, seed * 100 + row):
                offset = noise.randrange(10)
                self.kept.append(np.frombuffer(b"x" * offset + side, np.uint8))
                addresses.append(self.kept[-1].ctypes.data + offset)
            unit = noise.randrange(9)
            cuts = sorted(512 * noise.randrange(1, 9) for _ in range(noise.choice([0, 0, 3])))
            edges = [0, *(cut for cut in cuts if cut < count), count]
            for first, stop in itertools.pairwise(edges):
                at = [address + first * of // 8 for address in addresses]
                rows.append([*at, stop - first, position + first, slot, unit + first // 512, row])
            position += -(-count // 512) * 512 + noise.choice([0, 0, 512])
        self.segments = np.array(rows, np.int64)
        self.size = -(-position // 8)

    def run(self, using: Comparing, *, stats: bool = True) -> list[bytes]:
        masks = [np.zeros(self.size, np.uint8) for _ in SEVERAL]
        into = Results(len(self.segments), len(SEVERAL), with_statistics=stats)
        using.run(self.segments, masks, into)
        found = [*masks, into.changed, into.hashes, into.statistics]
        return [array.tobytes() for array in found if array is not None]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.sampled_from([90, 900, 3000]), st.booleans())
def test_windows_of_many_tensors(seed: int, most: int, stats: bool) -> None:
    """Several dtypes in one piece, gaps between tensors, and any length, place and cut; hashed on
    the device, or where statistics are taken.
    """
    window, there = Window(seed, most), on_device(DEVICE, MIXED, SEVERAL, stats=stats)
    here = kernels(MIXED, SEVERAL, stats)
    assert window.run(there, stats=stats) == window.run(here, stats=stats)


@pytest.mark.parametrize("dtype", ["BF16", "F64", "F6_E3M2", "U8"])
def test_several_pieces_and_statistics(dtype: str) -> None:
    """More pieces than stages, a ragged end, and sums of floats in the order of blocks."""
    count = 5 * BLOCK + 1000
    bits = naive.FORMATS[dtype].bits
    data = np.random.default_rng(1).integers(0, 256, count * bits // 8, np.uint8)
    tuned = data.copy()
    tuned[::7] ^= 1
    for stats in (True, False):
        agree(dtype, (data.tobytes(), tuned.tobytes()), stats=stats, cuts=[BLOCK + 512])


def test_nothing_to_compare() -> None:
    there, into = on_device(DEVICE, MIXED, SEVERAL), Results(0, 4, with_statistics=False)
    there.run(np.empty((0, abi.SEG_COLUMNS), np.int64), [np.zeros(8, np.uint8)] * 4, into)


def test_a_tensor_right_behind_those_of_the_device_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranges that the device has may lie in each other; what begins where one ends is not in it."""
    memory = np.arange(4096, dtype=np.uint8)
    at, cpu = memory.ctypes.data, kernels(("U8",), ("exact",), False)
    device = open_device("torch-cpu")
    there = DeviceKernels(
        cpu, [DTYPES["U8"]], [Rule.parse("exact")], device, window=BLOCK, workers=1,
        memory=1 << 30, resident=[(at + 1024, at + 2048), (at + 1200, at + 1536)],
    )  # fmt: skip
    seen, start = list[list[list[bool]]](), staging.Stage.start
    monkeypatch.setattr(
        staging.Stage, "start",
        lambda *args, **more: (seen.append(more["resident"].tolist()), start(*args, **more))[1],
    )  # fmt: skip
    begins = [(1023, 1024), (1535, 1536), (2047, 2048)]
    rows = [[at + x, at + y, 1, 512 * i, 0, i, i] for i, (x, y) in enumerate(begins)]
    there.run(
        np.array(rows, np.int64), [np.zeros(192, np.uint8)], Results(3, 1, with_statistics=False)
    )
    assert seen == [[[False, True], [True, True], [True, False]]]


def test_threads_share_a_device() -> None:
    there, here = on_device(DEVICE, MIXED, SEVERAL, stats=True), kernels(MIXED, SEVERAL, True)
    windows = [Window(seed, 3000) for seed in range(6)]
    expected = [window.run(here) for window in windows]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda window: window.run(there), windows)) == expected


# -- streams ---------------------------------------------------------------------------------------


class Paper(Device):
    """Says of itself that it is a GPU; ``log`` has what is asked of its streams and events."""

    def __init__(self) -> None:
        self.log, self.names = Mock(), (f"s{i}" for i in range(99))
        super().__init__(torch.device("cpu"), "a GPU of paper")
        self.cuda = True
        self.comparing = self.new_stream()

    def new_stream(self, priority: int = 0) -> Any:
        return getattr(self.log, next(self.names))

    def new_event(self) -> Any:
        return self.new_stream()

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        self.log.on(stream)
        return contextlib.nullcontext()

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def drop_cache(self) -> None:
        self.log.drop()


@pytest.fixture
def paper() -> tuple[Mock, DeviceKernels]:
    device = Paper()
    using = on_device(device, ["BF16"], RULES)
    device.log.reset_mock()
    return device.log, using


def test_streams_wait_for_each_other_and_the_cpu_once_a_piece(
    paper: tuple[Mock, DeviceKernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, using = paper
    real = staging.Stage.finish

    def finish(self: Any, *arguments: Any) -> None:
        log.finish()
        real(self, *arguments)

    monkeypatch.setattr(staging.Stage, "finish", finish)
    agree("BF16", LONG, using=using)

    def sent(stream: str, copied: str, done: str) -> list[Any]:
        asked, of = [getattr(call, name) for name in (copied, done)], [log.s1, getattr(log, stream)]
        return [
            call.on(of[1]), asked[0].record(of[1]), call.on(of[0]),
            call.s1.wait_event(getattr(log, copied)), asked[1].record(of[0]),
        ]  # fmt: skip

    first, second, finish_ = ("s2", "s3", "s4"), ("s5", "s6", "s7"), call.finish()
    assert log.mock_calls == [
        *sent(*first), *sent(*second), finish_, call.s4.synchronize(), *sent(*first),
        finish_, call.s7.synchronize(), finish_, call.s4.synchronize(),
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "waited"), [(0, ["s2"]), (1, ["s5", "s2"])])
def test_memory_is_not_given_back_before_the_device_is_done(
    before: int,
    waited: list[str],
    paper: tuple[Mock, DeviceKernels],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a piece that fails, and with another one on its way."""
    log, using = paper
    monkeypatch.setattr(staging, "_compare", Scarce(before, RuntimeError("CUDA error: lost")))
    with pytest.raises(CkdiffError, match="a GPU of paper failed: CUDA error: lost"):
        agree("BF16", LONG, using=using)
    asked = [one for one in log.mock_calls if one[0].endswith(".synchronize")]
    assert asked == [
        c for name in waited for c in (getattr(call, name).synchronize(), call.s1.synchronize())
    ]


# -- memory ----------------------------------------------------------------------------------------


class Scarce:
    """Device memory that ends after so many pieces."""

    def __init__(self, after: int, error: RuntimeError) -> None:
        self.after, self.error, self.calls = after, error, 0
        self._real = staging._compare

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        self._real(*arguments)


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("no memory"), RuntimeError("CUDA error: out of memory\nmore")],
    ids=["torch", "pinned"],
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_out_of_memory(after: int, error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way comes back, the CPU does the rest, and later all."""
    scarce = Scarce(after, error)
    monkeypatch.setattr(staging, "_compare", scarce)
    using = on_device(DEVICE, ["F64"], RULES, stats=True)
    sides = some_elements("F64", 5 * BLOCK + 700, 1)
    for _ in range(2):
        agree("F64", sides, using=using, stats=True)
        assert scarce.calls == after + 1
    assert using.gave_up
    said = f"warning: {DEVICE.name} is out of memory: comparing on the CPU from here on"
    assert list(using.messages) == [said]


def test_another_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_compare", Scarce(0, RuntimeError("CUDA error: lost\nmore")))
    said = f"^{re.escape(DEVICE.name)} failed: CUDA error: lost \\("
    with pytest.raises(CkdiffError, match=said) as caught:
        agree("BF16", LONG)
    assert caught.value.hint == "run with --device cpu"


def test_a_piece_that_does_not_come_back_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Mock(side_effect=torch.cuda.OutOfMemoryError("CUDA error: out of memory"))
    monkeypatch.setattr(staging.Stage, "finish", lost)
    said = f"{re.escape(DEVICE.name)} failed: CUDA error: out of memory"
    with pytest.raises(CkdiffError, match=said):
        agree("BF16", LONG)


def test_too_little_device_memory_is_said_before() -> None:
    with pytest.raises(BudgetError, match="of device memory is too little: with 1 worker this"):
        on_device(DEVICE, ["BF16"], ["exact"], memory=1 << 20)
    sizes = Sizes(1 << 25, 2, 64)
    memories = (75, 120, 1024)
    found = [sizes.fitting(1, memory << 20) for memory in memories]
    assert SMALLEST <= found[0] < found[1] < found[2] == sizes.largest == 1 << 22
    for elements, memory in zip(found[:2], memories, strict=False):
        assert sizes.needed(elements, 1) <= memory << 20 < sizes.needed(2 * elements, 1)
