"""Windows on a device against the CPU's kernels, bit for bit: pieces, stages, streams, memory.

On a GPU where there is one, and else on torch's CPU device. Rules are in test_gpu_fused.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import naive
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, run, some_elements

from ckdiff.dtypes import DTYPES
from ckdiff.errors import BudgetError, CkdiffError
from ckdiff.kernels import BLOCK, Comparing, Results, abi
from ckdiff.kernels.gpu import open_device, staging
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.kernels import DeviceKernels
from ckdiff.kernels.gpu.sizes import SMALLEST, Sizes
from ckdiff.rules import Rule


def device() -> Device:
    return open_device("cuda" if torch.cuda.is_available() else "torch-cpu")


NAME = device().name


def on_device(
    dtypes: Sequence[str],
    rules: Sequence[str],
    *,
    stats: bool = False,
    window: int = BLOCK,
    memory: int = 1 << 30,
) -> DeviceKernels:
    """The kernels under test; windows as small as can be, so that there are several pieces."""
    every = tuple(dict.fromkeys(["exact", *rules]))
    return DeviceKernels(
        kernels(tuple(dtypes), every, stats),
        [DTYPES[name] for name in dtypes],
        [Rule.parse(rule) for rule in every],
        device(),
        window=window,
        workers=1,
        memory=memory,
    )


def agree(
    dtype: str,
    rules: Sequence[str],
    base: bytes,
    tuned: bytes,
    *,
    using: DeviceKernels | None = None,
    stats: bool = False,
    offset: int = 1,
    cuts: Sequence[int] = (),
) -> None:
    """Hold both against each other: masks, counts, hashes and statistics, to the bit."""
    using = using or on_device([dtype], rules, stats=stats)
    expected = run(dtype, rules, base, tuned, stats=stats, offset=offset, cuts=cuts)
    found = run(dtype, rules, base, tuned, stats=stats, offset=offset, cuts=cuts, using=using)
    wrong = [rule for rule, mask in expected.masks.items() if (found.masks[rule] != mask).any()]
    assert wrong == []
    assert found.changed == expected.changed
    assert found.hashes == expected.hashes
    if expected.statistics is not None:
        assert found.statistics is not None
        assert found.statistics.tobytes() == expected.statistics.tobytes()


# -- one tensor ------------------------------------------------------------------------------------


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_length_place_and_cut(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["BF16", "F32", "F64", "F8_E4M3", "F4", "F6_E2M3", "I64"]))
    step = naive.per_byte(dtype)
    count = data.draw(st.integers(1, 3000)) * step
    cuts = sorted(data.draw(st.sets(st.integers(1, 8), max_size=3)))
    base, tuned = some_elements(dtype, count, data.draw(st.integers(0, 9)))
    agree(
        dtype,
        ["atol=1e-3", "ulp=1"],
        base,
        tuned,
        offset=data.draw(st.integers(0, 9)),
        cuts=[512 * cut for cut in cuts if 512 * cut < count],
        stats=True,
    )


@pytest.mark.parametrize("dtype", ["BF16", "F64", "F6_E3M2", "U8"])
def test_several_pieces_and_statistics(dtype: str) -> None:
    """More pieces than stages, a ragged end, and sums of floats in the order of blocks."""
    count = 5 * BLOCK + 1000
    data = np.random.default_rng(1).integers(0, 256, count * DTYPES[dtype].bits // 8, np.uint8)
    tuned = data.copy()
    tuned[::7] ^= 1
    sides = data.tobytes(), tuned.tobytes()
    agree(dtype, ["atol=1e-3"], *sides, stats=True, cuts=[BLOCK + 512])


# -- windows ---------------------------------------------------------------------------------------

MIXED = ("BF16", "F32", "F4", "F8_E4M3", "I64")


class Window:
    """Tensors of several dtypes, one after the other with some places left out."""

    def __init__(self, seed: int, most: int) -> None:
        noise = random.Random(seed)
        self.kept: list[np.ndarray] = []
        rows: list[list[int]] = []
        position = 0
        for row in range(14):
            slot = noise.choice([0, 0, noise.randrange(len(MIXED))])
            dtype = MIXED[slot]
            count = noise.randrange(1, most) * naive.per_byte(dtype)
            addresses = []
            for side in some_elements(dtype, count, seed * 100 + row):
                self.kept.append(np.frombuffer(b"x" + side, np.uint8))
                addresses.append(self.kept[-1].ctypes.data + 1)
            rows.append([*addresses, count, position, slot, noise.randrange(9), row])
            position += -(-count // 512) * 512 + noise.choice([0, 0, 512])
        self.segments = np.array(rows, np.int64)
        self.size = -(-position // 8)

    def run(self, using: Comparing, rules: int) -> tuple[list[bytes], bytes, bytes, bytes]:
        masks = [np.zeros(self.size, np.uint8) for _ in range(rules)]
        into = Results(len(self.segments), rules, with_statistics=True)
        using.run(self.segments, masks, into)
        assert into.statistics is not None
        found = into.changed.tobytes(), into.hashes.tobytes(), into.statistics.tobytes()
        return [mask.tobytes() for mask in masks], *found


def window_rules(using: Comparing | None = None) -> tuple[DeviceKernels, Comparing, int]:
    rules = ("exact", "atol=1e-3", "rtol=1e-3@bf16")
    return on_device(MIXED, rules, stats=True), kernels(MIXED, rules, True), len(rules)


@pytest.mark.parametrize("seed", range(4))
def test_windows_of_many_tensors(seed: int) -> None:
    """Several dtypes in one piece, and gaps between tensors."""
    there, here, rules = window_rules()
    window = Window(seed, 900)
    assert window.run(there, rules) == window.run(here, rules)


def test_nothing_to_compare() -> None:
    there, _, rules = window_rules()
    into = Results(0, rules, with_statistics=True)
    there.run(np.empty((0, abi.SEG_COLUMNS), np.int64), [np.zeros(8, np.uint8)] * rules, into)


def test_threads_share_a_device() -> None:
    there, here, rules = window_rules()
    windows = [Window(seed, 3000) for seed in range(6)]
    expected = [window.run(here, rules) for window in windows]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda window: window.run(there, rules), windows)) == expected


# -- streams ---------------------------------------------------------------------------------------


class Log(Device):
    """Says of itself that it is a GPU, and writes down what is asked of streams and events."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names = (f"s{i}" for i in range(99))
        super().__init__(torch.device("cpu"), "a GPU of paper")
        self.cuda = True
        self.comparing = self.new_stream()

    def new_stream(self, priority: int = 0) -> Any:
        return Thing(self.lines, next(self.names))

    def new_event(self) -> Any:
        return Thing(self.lines, next(self.names))

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.lines.append(f"on {stream.name}")
        yield

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def drop_cache(self) -> None:
        self.lines.append("drop")


class Thing:
    """A stream or an event."""

    def __init__(self, lines: list[str], name: str) -> None:
        self.lines, self.name = lines, name

    def __getattr__(self, method: str) -> Any:
        def call(*others: Thing) -> None:
            self.lines.append(" ".join([self.name, method, *(other.name for other in others)]))

        return call


def paper_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Log, DeviceKernels]:
    log = Log()
    monkeypatch.setattr(sys.modules[__name__], "device", lambda: log)
    using = on_device(["BF16"], ["atol=1e-3"])
    log.lines.clear()
    return log, using


def test_streams_wait_for_each_other_and_the_cpu_once_a_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, using = paper_gpu(monkeypatch)
    real = staging.Stage.finish

    def finish(self: Any, *arguments: Any) -> None:
        log.lines.append("finish")
        real(self, *arguments)

    monkeypatch.setattr(staging.Stage, "finish", finish)
    sides = some_elements("BF16", 3 * BLOCK, 1)
    agree("BF16", ["atol=1e-3"], *sides, using=using)
    compare = log.comparing.name

    def sent(stream: str, copied: str, done: str) -> list[str]:
        return [
            f"on {stream}", f"{copied} record {stream}", f"on {compare}",
            f"{compare} wait_event {copied}", f"{done} record {compare}",
        ]  # fmt: skip

    first, second = ("s2", "s3", "s4"), ("s5", "s6", "s7")
    assert log.lines == [
        *sent(*first), *sent(*second),
        "finish", f"{first[2]} synchronize", *sent(*first),
        "finish", f"{second[2]} synchronize", "finish", f"{first[2]} synchronize",
    ]  # fmt: skip


def test_memory_is_not_given_back_before_the_device_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, using = paper_gpu(monkeypatch)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: lost")

    monkeypatch.setattr(staging, "_compare", fail)
    with pytest.raises(CkdiffError, match="a GPU of paper failed: CUDA error: lost"):
        agree("BF16", ["atol=1e-3"], *some_elements("BF16", 3 * BLOCK, 1), using=using)
    assert log.lines[-2:] == ["s2 synchronize", f"{log.comparing.name} synchronize"]
    # and a piece on its way when another one fails
    log.lines.clear()
    calls: list[int] = []

    def fail_later(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            fail()

    monkeypatch.setattr(staging, "_compare", fail_later)
    with pytest.raises(CkdiffError, match="lost"):
        agree("BF16", ["atol=1e-3"], *some_elements("BF16", 3 * BLOCK, 1), using=using)
    waited = [line for line in log.lines if line.endswith(" synchronize")]
    assert [line.split()[0] for line in waited[0::2]] == ["s5", "s2"]


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
    using = on_device(["F64"], ["atol=1e-3"], stats=True, window=BLOCK)
    sides = some_elements("F64", 5 * BLOCK + 700, 1)
    for _ in range(2):
        agree("F64", ["atol=1e-3"], *sides, using=using, stats=True)
        assert scarce.calls == after + 1
    assert using.gave_up
    said = f"warning: {NAME} is out of memory: comparing on the CPU from here on"
    assert list(using.messages) == [said]


def test_another_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_compare", Scarce(0, RuntimeError("CUDA error: lost\nmore")))
    with pytest.raises(
        CkdiffError, match=f"^{re.escape(NAME)} failed: CUDA error: lost \\("
    ) as caught:
        agree("F32", [], *some_elements("F32", 5000, 1))
    assert caught.value.hint == "run with --device cpu"


def test_a_piece_that_does_not_come_back_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(staging.Stage, "finish", lost)
    with pytest.raises(CkdiffError, match=f"{re.escape(NAME)} failed: CUDA error: out of memory"):
        agree("F32", [], *some_elements("F32", 9 * BLOCK, 1))


def test_too_little_device_memory_is_said_before() -> None:
    with pytest.raises(BudgetError, match="of device memory is too little: with 1 worker this"):
        on_device(["BF16"], ["exact"], memory=1 << 20)
    sizes = Sizes(1 << 25, 2, 64)
    memories = (75, 120, 1024)
    found = [sizes.fitting(1, memory << 20) for memory in memories]
    assert SMALLEST <= found[0] < found[1] < found[2] == sizes.largest == 1 << 22
    for elements, memory in zip(found[:2], memories, strict=False):
        assert sizes.needed(elements, 1) <= memory << 20 < sizes.needed(2 * elements, 1)
