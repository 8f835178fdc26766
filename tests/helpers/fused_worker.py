"""A process of its own for Triton: it decides at import whether it interprets or compiles.

    python fused_worker.py all FOLDER   on a GPU, or in the interpreter with TRITON_INTERPRET=1:
                                        the code against the CPU's kernels
    python fused_worker.py ptx DTYPE... compiles for a GPU of which there is none

The last line is JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import naive
import numpy as np
import pytest
import torch
from checkpoint_pairs import files_of
from device_changes import changes_agree
from device_tensors import diffed, pretend, some_states
from kernel_runs import on_device, run, some_elements, tough_pairs

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.binding import bind
from ckdiff.kernels.gpu import fused, open_device, preparing
from ckdiff.kernels.gpu.fusedcode import MOST_RULES
from ckdiff.kernels.gpu.tables import Table
from ckdiff.rules import Rule

T = ["0", "5e-324", "1e-45", "1e-38", "1e-5", "0.25", "65504", "3.4028235677973362e+38",
     "1.7976931348623157e+308"]  # fmt: skip
R = ["0", "1e-46", "1e-38", "1e-3", "0.0078125", "0.3", "1", "1.9999", "2"]
K = ["0", "1", "127", "32768", "65535", "2147483648", "4294967295", "9223372036854775808",
     "18446744073709551615"]  # fmt: skip
RULES = [*(f"atol={t}" for t in T), *(f"rtol={r}" for r in R), *(f"ulp={k}" for k in K)]
CAST = ["exact", "atol=1e-5", "rtol=1e-3", "ulp=2"]
LONG = [f"rtol={r!r}" for r in (1.2345678901234567, 3.3e-10, 2**-52, 1 - 2**-53)]  # for integers
MOST = 3000  # elements, as interpreting is slow
DEVICE = "torch-cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def rules_of(dtype: str) -> list[str]:
    """As many as can be evaluated at once: all, or on rounded elements fewer of the others. A few
    where bits alone are compared, or pairs looked up: of one such dtype all.
    """
    if not DTYPES[dtype].numeric or (DTYPES[dtype].bits == 8 and dtype != "U8"):
        return ["exact", "atol=0.25", "rtol=0.3", "ulp=1"]
    rounded = [f"{rule}@{t}" for t, of in naive.ROUNDED.items() if dtype in of for rule in CAST]
    whole = LONG if dtype in naive.INTEGERS and dtype != "U8" else []
    return ["exact", *rounded, *whole, *RULES[:: 2 if rounded else 1]]


def sides_of(dtype: str) -> tuple[bytes, bytes]:
    if naive.per_byte(dtype) > 1:
        return some_elements(dtype, 4001 * naive.per_byte(dtype), 1)
    x, y = tough_pairs(dtype, 600)
    some = np.sort(np.random.default_rng(1).permutation(len(x))[:MOST])
    of = DTYPES[dtype]
    powers = (np.arange(1 << of.exponent) << of.mantissa).astype(x.dtype)  # each is more than zero
    x = np.concatenate([x[some], powers])
    return x.tobytes(), np.concatenate([y[some], powers * 0]).tobytes()


def bits(dtype: str, rules: list[str], times: int = 1) -> list[str]:
    """The rules (or hashes) that find something else than the CPU does, of two segments."""
    assert len(rules) <= MOST_RULES
    using = on_device(open_device(DEVICE), [dtype], rules)
    assert using.device.fused
    base, tuned = (side * times for side in sides_of(dtype))
    found, expected = (
        run(dtype, rules, base, tuned, cuts=[512], offset=3, using=one) for one in (using, None)
    )
    assert list(using.messages) == []
    return [f"{dtype} {wrong}" for wrong in found.unlike(expected)]


def all_(folder: str) -> object:
    np.seterr(all="ignore")  # numpy computes what a GPU would
    with patch.object(preparing, "_wrong", lambda *_, **__: ""):  # what is tried first; here all is
        wrong = [one for dtype in DTYPES for one in bits(dtype, rules_of(dtype))]
        wrong += bits("BF16", ["exact"], times=24)  # several pieces
        # one dtype of each width, as the code knows no other difference
        changes = [dtype for dtype in ("U8", "BF16", "F32", "I64") if changes_agree(dtype, 4)]
    states = some_states(20)
    if DEVICE == "cuda":
        states = tuple({name: t.cuda() for name, t in state.items()} for state in states)
    places = [Path(folder, device) for device in ("cpu", DEVICE)]
    diffed(*states, places[0], device="cpu")
    with pytest.MonkeyPatch.context() as patched, patch.object(preparing, "_TRIED", 600):
        copied = pretend(patched)
        diffed(*states, places[1], device=DEVICE)
    expected, found = map(files_of, places)
    stores = [name for name in expected if found[name] != expected[name]]
    return {"bits": wrong, "changes": changes, "stores": stores, "copied": sum(copied)}


class Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Compiles what would be launched, with the very arguments."""

    def __init__(self, real: Any, made: Callable[[str], None]) -> None:
        self.real, self.made = real, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.made(self.real.warmup(*arguments, grid=grid, **options).asm["ptx"])

        return launch


def ptx(*dtypes: str) -> object:
    from triton.runtime import driver

    driver.set_active(Absent())
    found: dict[str, dict[str, int]] = {}
    cpu = torch.device("cpu")
    for name in ("compare", "compact"):

        def note(text: str, name: str = name) -> None:
            names = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]+)", text, re.M)
            found[f"{name} {dtype}"] = {one: names.count(one) for one in set(names)}

        setattr(fused, name, Compiled(getattr(fused, name), note))
    for dtype in dtypes:
        of = DTYPES[dtype]
        rules = ["exact", *(f"{rule}=1e-3" for rule in ("atol", "rtol")), "ulp=1"]
        rules += [f"rtol=1e-3@{t}" for t, sources in naive.ROUNDED.items() if dtype in sources]
        bounds = [bind(Rule.parse(rule), of) for rule in rules]
        code = fused.Fused(of, bounds, cpu, torch.zeros(65536, dtype=torch.int32))
        there = Table.one(4096, 4096, 4096, cpu)
        masks = torch.zeros(len(rules), 512, dtype=torch.uint8)
        sums = torch.zeros(4, 1, dtype=torch.int64)
        code(there, masks, torch.zeros(len(rules), 1, dtype=torch.int32), sums)
        if dtype == "BF16":  # it knows no more of a dtype than its width
            code.move(there, masks[0], sums[0], (sums[0], masks[0]))
    return found


if __name__ == "__main__":
    print(json.dumps({"all": all_, "ptx": ptx}[sys.argv[1]](*sys.argv[2:])))
