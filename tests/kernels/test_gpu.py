"""Diffs on a device, whole: what is taken and why, what is said, and that stores are the same.

There is no GPU here; ``torch-cpu`` goes the way of a GPU on torch's CPU device.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checkpoint_pairs import RULES, Pair, files_of, some_model, some_pair, write_side
from cli_support import error, ok
from device_tensors import diffed
from source import ROOT

import ckdiff
from ckdiff.diffs import devices, trial
from ckdiff.diffs.plan import plan
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW
from ckdiff.errors import BudgetError, CkdiffError, UsageError
from ckdiff.kernels import gpu
from ckdiff.kernels.gpu import device, sizes, staging
from ckdiff.kernels.gpu import kernels as device_kernels
from ckdiff.options import DEVICES, Options

BENCH = Path(__file__).parents[2] / "bench" / "gpu.py"
MEMORY = "8GiB"  # the test process has plenty of memory in use already
NO_GPU = not torch.cuda.is_available()
without_gpu = pytest.mark.skipif(not NO_GPU, reason="says what happens without a GPU")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sides")
    model = {**some_model(5, tensors=14, largest=9000), "long": long_pair()}
    base, tuned = (write_side(root / side, model, side, 1) for side in ("base", "tuned"))
    return base, tuned


def long_pair() -> Pair:
    """More than a window of the smallest size, with a ragged end."""
    pair = some_pair("BF16", (1001,), 7)
    return Pair("BF16", (1001, 700), pair.base * 700, pair.tuned * 700)


def diff(sides: tuple[Path, Path], out: Path | None = None, **options: Any) -> ckdiff.DiffResult:
    return diffed(*sides, out, **{"rules": ("exact",), "window": None} | options)


# -- the same store --------------------------------------------------------------------------------


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("window", [None, 1 << 19])
def test_a_store_is_the_same_to_the_byte(
    sides: tuple[Path, Path], tmp_path: Path, stats: bool, window: int | None
) -> None:
    here = diff(sides, tmp_path / "here", rules=RULES, stats=stats, device="cpu")
    there = diff(sides, tmp_path / "there", rules=RULES, stats=stats, window=window)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert there.rules == here.rules
    assert here.device_why is None
    assert there.device_why == "torch's CPU: it was asked for"


def test_a_run_goes_on_where_another_device_was(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """What was done on the CPU is resumed on the GPU: where it was computed is not in the plan."""
    with plan(*sides, tmp_path / "x", Options(memory=MEMORY)) as planned:
        first = planned.identity()
    with plan(*sides, tmp_path / "x", Options(memory=MEMORY, device="torch-cpu")) as planned:
        assert planned.identity() == first


def test_memory_that_runs_out_is_told_and_the_store_is_the_same(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diff(sides, tmp_path / "here", rules=RULES, device="cpu")

    lost = Mock(side_effect=torch.cuda.OutOfMemoryError("no memory"))
    monkeypatch.setattr(staging, "_compare", lost)
    notes: list[str] = []
    there = diff(sides, tmp_path / "there", rules=RULES, notes=notes)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert notes == ["warning: torch's CPU is out of memory: comparing on the CPU from here on"]
    assert there.device == "cpu"
    assert there.device_why == "the device ran out of memory"
    assert there.to_dict()["device_why"] == there.device_why


# -- what is asked for -----------------------------------------------------------------------------


def test_options_of_the_command_line_and_of_python_are_the_same() -> None:
    from ckdiff.cli import options

    assert options.DEVICES == DEVICES


def test_wrong_devices_are_refused(sides: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="device must be cpu, cuda or auto, not 'gpu'"):
        ckdiff.diff(*sides, device="gpu")
    with pytest.raises(UsageError, match="cannot read the size 'much'"):
        ckdiff.diff(*sides, device_memory="much")
    with pytest.raises(BudgetError, match="of device memory is too little: with 1 worker"):
        plan(*sides, None, Options(memory=MEMORY, device="torch-cpu", device_memory="1MiB"))


@without_gpu
def test_without_a_gpu(sides: tuple[Path, Path]) -> None:
    line = error("diff", *map(str, sides), "--device", "cuda")
    assert line.startswith("no GPU with CUDA was found")
    assert line.rstrip().endswith("(leave out --device, or use --device auto)")


def test_without_torch(sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="a GPU is used through torch, which is not installed"):
        diff(sides, device="cuda")
    monkeypatch.setattr(devices, "WORTH_STARTING", 0)
    found = diff(sides, device="auto")
    assert found.device == "cpu"
    assert found.device_why == "a GPU is used through torch, which is not installed"


@pytest.mark.parametrize(("version", "old"), [("3.5.1", True), ("3.6.0", False), ("4.0", False)])
def test_a_triton_that_cannot_compile_this(
    monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    tried = Mock()
    monkeypatch.setattr(gpu, "_need", tried)
    if old:
        with pytest.raises(
            UsageError, match=r"Triton 3.6 or newer, and this is 3.5.1 .*ckdiff\[gpu"
        ):
            gpu._need_triton()
    else:
        gpu._need_triton()
    assert tried.call_count == 2 - old
    extra = f'"triton>={gpu._OLDEST[0]}.{gpu._OLDEST[1]};'
    assert extra in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("name", ["torch", "Triton"])
@pytest.mark.parametrize(
    ("why", "said"),
    [
        (None, "is not installed"),
        (OSError("libcuda.so.1: cannot open\nmore"), r"cannot be imported: libcuda\.so\.1: cannot"),
    ],
)
def test_what_a_gpu_is_used_through_cannot_be_imported(
    why: OSError | None, said: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ModuleNotFoundError(name=f"{name.lower()}.language")
    monkeypatch.setattr(gpu.importlib, "import_module", Mock(side_effect=why or missing))
    with pytest.raises(UsageError, match=f"^a GPU is used through {name}, which {said}"):
        gpu._need(name, "whatever")


def fails(why: str) -> Mock:
    return Mock(side_effect=RuntimeError(f"CUDA error: {why}\nmore"))


def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before there is anything to clean up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fails("all devices are busy"))
    with pytest.raises(UsageError, match=r"^the GPU cannot be used: CUDA error: all devices are"):
        gpu.open_device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "an old one")
    monkeypatch.setattr(device, "Device", lambda device, name: SimpleNamespace(device=device))
    monkeypatch.setattr(torch, "zeros", fails("no kernel image is available"))
    with pytest.raises(UsageError, match=r"^the GPU cannot be used: CUDA error: no kernel image"):
        gpu.open_device("cuda")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("CUDA error: lost\nmore"), "torch's CPU failed: CUDA error: lost"),
        (torch.cuda.OutOfMemoryError("no memory"), "the device ran out of memory"),
    ],
)
def test_a_device_that_fails_before_the_first_window(
    error: RuntimeError, why: str, sides: tuple[Path, Path], auto: pytest.MonkeyPatch
) -> None:
    auto.setattr(device_kernels, "make_slots", Mock(side_effect=error))
    notes: list[str] = []
    assert diff(sides, device="auto", notes=notes).device_why == why
    assert notes == []
    if isinstance(error, torch.cuda.OutOfMemoryError):
        assert diff(sides, notes=notes).device_why == why
        assert notes == ["warning: torch's CPU is out of memory: comparing on the CPU"]
    else:
        with pytest.raises(CkdiffError, match=f"^{why}"):
            diff(sides)


def test_host_memory_that_is_too_little_for_copies(
    sides: tuple[Path, Path], auto: pytest.MonkeyPatch
) -> None:
    auto.setattr(sizes, "staging_memory", lambda window, rules, bits: window << 20)
    found = diff(sides, device="auto")
    assert found.device == "cpu"
    assert str(found.device_why).startswith("8.0 GiB of memory is too little")
    with pytest.raises(BudgetError, match=r"8\.0 GiB of memory is too little"):
        diff(sides)


def test_windows_shrink_until_copies_fit(tmp_path: Path) -> None:
    model = {"long": long_pair()}
    pair = [write_side(tmp_path / side, model, side, 1) for side in ("base", "tuned")]

    def planned(device: str, memory: int) -> tuple[int, int]:
        with plan(*pair, None, Options(memory=memory, workers=1, device=device)) as found:
            return found.allotment.window, found.allotment.needed

    here, there = planned("cpu", 8 << 30), planned("torch-cpu", 8 << 30)
    assert there[0] == devices.LARGEST_THERE > here[0] == LARGEST_WINDOW
    window, needed = planned("torch-cpu", there[1] // 2)
    assert SMALLEST_WINDOW <= window < there[0]
    assert needed <= there[1] // 2


def test_where_the_cpu_compares_windows_are_those_of_the_cpu(
    sides: tuple[Path, Path], auto: pytest.MonkeyPatch
) -> None:
    tried = Mock(return_value=(False, "we say so"))
    auto.setattr(trial, "try_both", tried)
    diff(sides, device="auto")
    here, there, *_ = tried.call_args.args
    assert [here.window, there.window] == [LARGEST_WINDOW, devices.LARGEST_THERE]


@pytest.mark.parametrize(
    ("stream", "on_cluster", "why"),
    [
        (False, True, "a cluster's workers compare on their CPUs"),
        (True, False, "data arrives more slowly than the CPU compares it"),
    ],
)
def test_auto_leaves_clusters_and_streams_to_cpus(
    stream: bool, on_cluster: bool, why: str, auto: pytest.MonkeyPatch
) -> None:
    asked = Options(device="auto", stream=stream)
    assert devices.Devices.of(asked, 1 << 40, on_cluster=on_cluster).taken.why == why


def test_a_cluster_has_no_gpus() -> None:
    with pytest.raises(UsageError, match="a cluster's workers compare on their CPUs, not on cuda"):
        devices.Devices.of(Options(device="cuda"), 1 << 40, on_cluster=True)


def told(code: str, sides: tuple[Path, Path]) -> list[str]:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, sides)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_cpu_path_imports_no_torch(sides: tuple[Path, Path]) -> None:
    code = (
        "import sys, ckdiff\n"
        "for device in ('cpu', 'auto'):\n"
        "    ckdiff.diff(*sys.argv[1:], device=device)\n"
        "print('torch' in sys.modules)"
    )
    assert told(code, sides) == ["False"]


def test_the_memory_of_torch_itself_is_not_counted(sides: tuple[Path, Path]) -> None:
    """Importing it takes most of what is allowed by default."""
    code = (
        "import sys\n"
        "from ckdiff.diffs.plan import plan\n"
        "from ckdiff.diffs.run import run\n"
        "from ckdiff.options import Options\n"
        "with plan(*sys.argv[1:], None, Options(workers=2, device='torch-cpu')) as planned:\n"
        "    print(planned.allotment.needed < planned.allotment.memory == 256 << 20)\n"
        "    print(planned.devices.resident > 32 << 20)\n"
        "    run(planned)\n"
    )
    assert told(code, sides) == ["True", "True"]


# -- auto ------------------------------------------------------------------------------------------


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """``auto`` looks for a GPU whatever the size, and finds torch's CPU device."""
    opened = gpu.open_device
    monkeypatch.setattr(devices, "WORTH_STARTING", 0)
    monkeypatch.setattr(gpu, "open_device", lambda name: opened("torch-cpu"))
    return monkeypatch


def test_auto_leaves_small_checkpoints_to_the_cpu(sides: tuple[Path, Path]) -> None:
    where = [str(side) for side in sides]
    found = json.loads(ok("diff", *where, "--device", "auto", "--json").stdout)
    assert found["device"] == "cpu"
    assert "is too little for starting a GPU to pay" in found["device_why"]
    text = ok("diff", *where, "--device", "auto").stdout
    assert f"compared on the CPU: {found['device_why']}" in text
    assert "compared on" not in ok("diff", *where).stdout
    assert json.loads(ok("diff", *where, "--json").stdout)["device_why"] is None


@pytest.mark.parametrize("faster", [False, True])
def test_auto_takes_what_is_faster(
    faster: bool, sides: tuple[Path, Path], tmp_path: Path, auto: pytest.MonkeyPatch
) -> None:
    decide, drop = Mock(return_value=(faster, "we say so")), Mock()
    auto.setattr(trial, "decide", decide)
    auto.setattr(device.Device, "drop_cache", drop)
    runs: list[int] = []
    real = device_kernels.DeviceKernels.run

    def run(self: Any, *arguments: Any) -> None:
        runs.append(decide.call_count)
        real(self, *arguments)

    auto.setattr(device_kernels.DeviceKernels, "run", run)
    found = diff(sides, tmp_path / "there", device="auto")
    decide.assert_called_once()
    assert min(decide.call_args.args[:3]) > 0
    assert found.device_why == ("torch's CPU: we say so" if faster else "we say so")
    assert (1 in runs) == faster  # used after the trial
    assert 0 in runs  # and in it
    assert drop.called == (not faster)  # memory is for those who use the device
    diff(sides, tmp_path / "here", device="cpu")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_auto_goes_on_without_a_device_that_fails(
    sides: tuple[Path, Path], auto: pytest.MonkeyPatch
) -> None:
    auto.setattr(staging, "_compare", fails("lost"))
    assert diff(sides, device="auto").device_why == "torch's CPU failed: CUDA error: lost"
    found = diff(sides, device="auto", device_memory="1MiB")
    assert str(found.device_why).startswith("1.0 MiB of device memory is too little")


@pytest.mark.parametrize(
    ("source", "rate", "used"),
    [
        (60, 50, "torch's CPU: it is faster here"),
        (60, 21, "the GPU is no faster here"),
        (1, 50, "the source delivers 1.0 GB/s, which the CPU keeps up with"),
    ],
)
def test_both_are_measured_and_both_figures_said(
    source: int, rate: int, used: str, sides: tuple[Path, Path], auto: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on only while windows are read, or compared, the CPU at 20 GB/s."""
    now = [0.0]

    def compare(window: Any) -> None:
        there = isinstance(window._task.comparing, device_kernels.DeviceKernels)
        now[0] += window.nbytes / (rate if there else 20) / 1e9

    def read(window: Any) -> None:
        now[0] += window.nbytes / source / 1e9

    auto.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    auto.setattr(trial._Window, "compare", compare)
    auto.setattr(trial._Window, "read", read)
    found = diff(sides, device="auto", workers=1)
    said = f"{used} (20.0 GB/s on the CPU, {rate}.0 GB/s on torch's CPU)"
    assert (found.device, found.device_why) == ("cpu", said)


def benchmark(*arguments: str) -> str:
    command = [sys.executable, str(BENCH), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr  # it holds the counts against what was changed
    return done.stdout


@without_gpu
def test_the_benchmark_says_that_nothing_was_measured() -> None:
    assert re.fullmatch("nothing was measured: no GPU with CUDA was found.*\n", benchmark())


def test_the_benchmark_goes_its_whole_way(tmp_path: Path) -> None:
    said = benchmark("--rehearse", "--dir", str(tmp_path))
    rows = ["host to device", "positions and values", "hashes: exact |", "| device |"]
    rows += ["workers, 4 rules", "--memory 4GiB, --device-memory 4GiB, median of 1"]
    rows += ["--memory by default, --device-memory 1GiB, median of 1"]
    assert [row for row in rows if row not in said] == []
