"""One launch a piece: its bits, its code, and what is done where neither can be trusted.

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
from typing import Any

import pytest
import torch
from kernel_runs import on_device

from ckdiff.errors import CkdiffError
from ckdiff.kernels import gpu
from ckdiff.kernels.gpu import preparing
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.preparing import Slot
from ckdiff.kernels.gpu.tables import Table

WORKER = Path(__file__).parents[1] / "helpers" / "fused_worker.py"
GPU = torch.cuda.is_available()
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton for this system"
)


def worker(*arguments: str, interpreted: bool, cache: Path) -> Any:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@with_triton
def test_the_code_says_what_the_cpu_s_kernels_say(tmp_path: Path) -> None:
    """Every dtype and rule, what is moved together, and a store of tensors on the device, which are
    not copied unless they are strided or one element off.
    """
    found = worker("all", str(tmp_path), interpreted=not GPU, cache=tmp_path / "cache")
    copied = 4 * 2000 + 2 * 2 * 1999
    assert found == {"bits": [], "changes": [], "stores": [], "copied": copied}


@with_triton
def test_a_gpu_would_round_as_the_cpu_does(tmp_path: Path) -> None:
    """Nothing is contracted, and subnormal numbers stay: what the interpreter does not show."""
    dtypes = ["BF16", "F16", "F32", "F64", "U32", "U8", "F6_E2M3"]
    found = worker("ptx", *dtypes, interpreted=False, cache=tmp_path)
    for name, code in found.items():
        parts = {one: one.split(".") for one in code}
        assert [one for one, part in parts.items() if "ftz" in part] == [], name
        assert [one for one, part in parts.items() if part[0] in ("fma", "div")] == [], name
        floats = {one for one, part in parts.items() if part[-1] in ("f32", "f64")}
        rounding = {one for one in floats if parts[one][0] in ("add", "sub", "mul")}
        what, dtype = name.split()
        width = {"BF16": "f32", "F16": "f32", "F32": "f32", "F64": "f64"}.get(dtype)
        if width is None or what != "compare":
            assert floats == set(), name
        else:
            assert {f"sub.rn.{width}", f"mul.rn.{width}"} <= rounding, name
        assert all(parts[one][1] == "rn" for one in rounding), name
    # whole sides are read once, in the widest loads there are
    reads = {name: code.get("ld.global.v4.b32", 0) for name, code in found.items()}
    assert {dtype: reads[f"compare {dtype}"] for dtype in ("BF16", "F32", "U8")} == {
        "BF16": 4, "F32": 8, "U8": 2
    }  # fmt: skip
    assert "compact BF16" in found


# -- code that cannot be trusted -------------------------------------------------------------------


class Pretended:
    """As code of a GPU: a wrong bit or digest, or an error."""

    wrong = ""
    error: Exception | None = None

    def __init__(self, plain: Slot) -> None:
        self.plain, self.rules = plain.code[0], plain.code[0].rules

    def __call__(self, table: Table, masks: Any, counts: Any, sums: Any) -> None:
        if self.error is not None:
            raise self.error
        self.plain(table, masks, counts, sums)
        if self.wrong == "bits":
            masks[-1, 1] ^= 1
        if self.wrong == "hashes":
            sums[3, 1] += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(
        preparing, "_fused", lambda plain, *_: Slot(plain.dtype, [Pretended(plain)])
    )
    device = gpu.open_device("torch-cpu")
    device.fused = True
    return device


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ("bits", None, "its bits of BF16 are other ones than the CPU's"),
        ("hashes", None, "its hashes of BF16 are other ones than the CPU's"),
        ("", OSError("no compiler\nmore"), "OSError: no compiler"),
        ("", RuntimeError("PTXAS error"), "RuntimeError: PTXAS error"),
    ],
)
def test_code_that_fails_or_is_wrong_is_not_used(
    wrong: str, error: Exception | None, why: str, pretended: Device, monkeypatch: Any
) -> None:
    on_device(pretended, ["BF16", "U8"], ["exact", "atol=1e-3"])
    monkeypatch.setattr(Pretended, "error", error)
    monkeypatch.setattr(Pretended, "wrong", wrong)
    with pytest.raises(CkdiffError) as caught:
        on_device(pretended, ["BF16", "U8"], ["exact", "atol=1e-3"])
    assert str(caught.value) == f"torch's CPU cannot be used: {why} (run with --device cpu)"


def test_memory_that_runs_out_there_is_no_reason_not_to_trust_it(
    pretended: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretended, "error", torch.cuda.OutOfMemoryError("no memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        on_device(pretended, ["BF16", "U8"], ["exact", "atol=1e-3"])
