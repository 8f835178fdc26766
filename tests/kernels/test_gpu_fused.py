"""One launch a piece: its bits, its code, and going on without it.

Without a GPU, Triton's interpreter runs the code element by element, and its compiler makes the
code of a GPU, which nobody runs. Both in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoint_pairs import files_of, some_model, write_side
from kernel_runs import kernels, run, some_elements

import ckdiff
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import BLOCK, gpu
from ckdiff.kernels.gpu import kernels as device_kernels
from ckdiff.kernels.gpu.kernels import DeviceKernels
from ckdiff.kernels.gpu.staging import Device
from ckdiff.rules import Rule

WORKER = Path(__file__).parents[1] / "helpers" / "fused_worker.py"
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this system"
)


def worker(*arguments: str, interpreted: bool, cache: str = "") -> Any:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    if cache:
        environment["TRITON_CACHE_DIR"] = cache
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- bits ------------------------------------------------------------------------------------------


@with_triton
@pytest.mark.parametrize("half", [0, 1])
def test_every_dtype_and_rule_is_as_on_the_cpu(half: int) -> None:
    assert worker("bits", *list(DTYPES)[half::2], interpreted=True) == []


@with_triton
def test_a_store_is_the_same_to_the_byte(tmp_path: Path) -> None:
    model = some_model(3, tensors=10, largest=3000)
    sides = [str(write_side(tmp_path / side, model, side, 1)) for side in ("base", "tuned")]
    rules = ["exact", "atol=1e-3", "rtol=1e-2@bf16", "ulp=1"]
    why, notes = worker("diff", *sides, str(tmp_path / "there"), *rules, interpreted=True)
    assert why == "torch's CPU: it was asked for"
    assert notes == []
    ckdiff.diff(*sides, out=tmp_path / "here", rules=rules, memory="8GiB")
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


# -- code ------------------------------------------------------------------------------------------


@with_triton
def test_a_gpu_would_round_as_the_cpu_does(tmp_path: Path) -> None:
    """Nothing is contracted, and subnormal numbers stay: what the interpreter does not show."""
    dtypes = ["BF16", "F16", "F32", "F64", "U32", "U8", "F6_E2M3"]
    found = worker("ptx", *dtypes, interpreted=False, cache=str(tmp_path))
    for dtype, code in found.items():
        parts = {name: name.split(".") for name in code}
        assert [name for name, part in parts.items() if "ftz" in part] == [], dtype
        assert [name for name, part in parts.items() if part[0] in ("fma", "div")] == [], dtype
        floats = {name for name, part in parts.items() if part[-1] in ("f32", "f64")}
        rounding = {name for name in floats if parts[name][0] in ("add", "sub", "mul")}
        width = {"BF16": "f32", "F16": "f32", "F32": "f32", "F64": "f64"}.get(dtype)
        if width is None:
            assert floats == set(), dtype
        else:
            assert {f"sub.rn.{width}", f"mul.rn.{width}"} <= rounding, dtype
        assert all(parts[name][1] == "rn" for name in rounding), dtype
    # whole sides are read once, in the widest loads there are
    reads = {dtype: code.get("ld.global.v4.b32", 0) for dtype, code in found.items()}
    assert {dtype: reads[dtype] for dtype in ("BF16", "F32", "U8")} == {
        "BF16": 4, "F32": 8, "U8": 2
    }  # fmt: skip


# -- without it ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "LEAST", 1)


class Fused:
    """Instead of what needs Triton: says nothing changed, or fails."""

    error: Exception | None = None

    def __init__(self, *_: object) -> None:
        pass

    @staticmethod
    def supports(bounds: Any) -> bool:
        return True

    def __call__(self, base: Any, tuned: Any, masks: torch.Tensor, counts: torch.Tensor) -> None:
        if self.error is not None:
            raise self.error
        masks.zero_()
        counts.zero_()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Device:
    module = ModuleType("ckdiff.kernels.gpu.fused")
    module.Fused = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ckdiff.kernels.gpu.fused", module)
    device = gpu.open_device("torch-cpu")
    device.fused = True
    return device


def made_on(device: Device) -> DeviceKernels:
    rules = ("exact", "atol=1e-3")
    return DeviceKernels(
        kernels(("BF16", "U8"), rules),
        [DTYPES["BF16"], DTYPES["U8"]],
        [Rule.parse(rule) for rule in rules],
        device,
        window=BLOCK,
        workers=1,
        memory=1 << 30,
    )


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, "its code for BF16 gives other bits than the CPU's"),
        (OSError("no compiler\nmore"), "OSError: no compiler"),
        (RuntimeError("PTXAS error"), "RuntimeError: PTXAS error"),
    ],
)
def test_code_that_fails_or_is_wrong_is_not_used(
    error: Exception | None, why: str, pretended: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fused, "error", error)
    using = made_on(pretended)
    assert list(using.messages) == [f"note: without Triton, in more steps: {why}"]
    assert [slot.fused for slot in using._slots] == [None, None]
    sides = some_elements("BF16", 3000, 1)
    expected = run("BF16", ["atol=1e-3"], *sides)
    found = run("BF16", ["atol=1e-3"], *sides, using=using)
    assert found.changed == expected.changed
    assert expected.changed["exact"] > 0


def test_memory_that_runs_out_there_is_no_reason_to_do_without(
    pretended: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fused, "error", torch.cuda.OutOfMemoryError("no memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        made_on(pretended)


def test_a_system_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "ckdiff.kernels.gpu.fused", raising=False)
    monkeypatch.delitem(sys.modules, "ckdiff.kernels.gpu.fusedcode", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    device = gpu.open_device("torch-cpu")
    assert not device.fused
    assert device.notes == ["note: without Triton, in more steps: it is not installed"]
