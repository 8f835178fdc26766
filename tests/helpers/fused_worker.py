"""A process of its own for Triton: it decides at import whether it interprets or compiles.

    python fused_worker.py bits DTYPE...   with TRITON_INTERPRET=1: against the CPU's kernels
    python fused_worker.py compact DTYPE...   likewise: counts, positions and values
    python fused_worker.py held HERE THERE   likewise: a diff of tensors that are on the device
    python fused_worker.py diff BASE TUNED OUT RULE...   likewise: a diff on torch's CPU device
    python fused_worker.py ptx DTYPE...    compiles for a GPU of which there is none

The last line is JSON.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import naive
import numpy as np
import torch
from device_changes import changes_agree
from device_tensors import diffed, pretend, some_states
from kernel_runs import kernels, run, some_elements, tough_pairs

from ckdiff.diffs.plan import plan
from ckdiff.diffs.run import run as run_plan
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import BLOCK
from ckdiff.kernels.binding import bind
from ckdiff.kernels.gpu import compact, compactcode, digests, fused, open_device, preparing
from ckdiff.kernels.gpu.fusedcode import MOST_RULES
from ckdiff.kernels.gpu.kernels import DeviceKernels
from ckdiff.kernels.gpu.tables import Table
from ckdiff.options import Observer, Options
from ckdiff.rules import Rule

T = ["0", "5e-324", "1e-45", "1e-38", "1e-5", "0.25", "65504", "3.4028235677973362e+38",
     "1.7976931348623157e+308"]  # fmt: skip
R = ["0", "1e-46", "1e-38", "1e-3", "0.0078125", "0.3", "1", "1.9999", "2"]
K = ["0", "1", "127", "32768", "65535", "2147483648", "4294967295", "9223372036854775808",
     "18446744073709551615"]  # fmt: skip
RULES = [*(f"atol={t}" for t in T), *(f"rtol={r}" for r in R), *(f"ulp={k}" for k in K)]
CAST = ["exact", "atol=1e-5", "rtol=1e-3", "ulp=2"]
MOST = 3000  # elements, as interpreting is slow


def rules_of(dtype: str) -> list[str]:
    """As many as can be evaluated at once: all, or on rounded elements fewer of the others."""
    rounded = [f"{rule}@{t}" for t, of in naive.ROUNDED.items() if dtype in of for rule in CAST]
    return ["exact", *rounded, *RULES[:: 2 if rounded else 1]]


def sides_of(dtype: str) -> tuple[bytes, bytes]:
    if naive.per_byte(dtype) > 1:
        return some_elements(dtype, 4001 * naive.per_byte(dtype), 1)
    x, y = tough_pairs(dtype, 600)
    some = np.sort(np.random.default_rng(1).permutation(len(x))[:MOST])
    of = DTYPES[dtype]
    powers = (np.arange(1 << of.exponent) << of.mantissa).astype(x.dtype)  # each is more than zero
    x = np.concatenate([x[some], powers])
    return x.tobytes(), np.concatenate([y[some], powers * 0]).tobytes()


def bits(dtypes: list[str]) -> object:
    np.seterr(all="ignore")  # numpy computes what a GPU would
    preparing._TRIED = 4096  # what is tried first; here all is
    wrong: list[str] = []
    for dtype in dtypes:
        rules = rules_of(dtype)
        assert len(rules) <= MOST_RULES
        using = DeviceKernels(
            kernels((dtype,), tuple(rules)),
            [DTYPES[dtype]],
            [Rule.parse(rule) for rule in rules],
            open_device("torch-cpu"),
            window=BLOCK,
            workers=1,
            memory=1 << 30,
        )
        assert list(using.messages) == []
        assert using.device.fused
        times = 24 if dtype == "BF16" else 1  # for several pieces
        base, tuned = (side * times for side in sides_of(dtype))
        cuts = [512, 1536]
        expected = run(dtype, rules, base, tuned, cuts=cuts, offset=3)
        found = run(dtype, rules, base, tuned, cuts=cuts, offset=3, using=using)
        assert found.hashes == expected.hashes
        wrong += [
            f"{dtype} {rule}"
            for rule, mask in expected.masks.items()
            if (found.masks[rule] != mask).any() or found.changed[rule] != expected.changed[rule]
        ]
    return wrong


def compact_(dtypes: list[str]) -> object:
    """Hypothesis draws what the plain twin is held against."""
    np.seterr(all="ignore")
    preparing._TRIED = 2000
    return [dtype for dtype in dtypes if changes_agree(dtype, 6)]


def held(places: list[str]) -> object:
    import pytest

    np.seterr(all="ignore")
    base, tuned = some_states()
    diffed(base, tuned, places[0], device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        copied = pretend(patch)
        why = diffed(base, tuned, places[1]).device_why
    return [why, sum(copied)]


def diff(arguments: list[str]) -> object:
    np.seterr(all="ignore")
    base, tuned, out, *rules = arguments
    notes: list[str] = []
    options = Options(rules=tuple(rules), device="torch-cpu", memory="8GiB", workers=1)
    with plan(base, tuned, out, options, Observer(note=notes.append)) as planned:
        return [run_plan(planned).device_why, notes]


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


def ptx(dtypes: list[str]) -> object:
    from triton.runtime import driver

    driver.set_active(Absent())
    made: list[Any] = []

    class Compiled:
        """Compiles what would be launched, with the very arguments."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **options: Any) -> None:
                made.append(self.real.warmup(*arguments, grid=grid, **options))

            return launch

    fused.compare, digests.digest = Compiled(fused.compare), Compiled(digests.digest)
    compactcode.compact = Compiled(compactcode.compact)
    found = {}
    for dtype in dtypes:
        of = DTYPES[dtype]
        rules = ["exact", "atol=1e-5", "rtol=1e-3", "ulp=1"]
        rules += [f"rtol=1e-3@{t}" for t, sources in naive.ROUNDED.items() if dtype in sources]
        bounds = [bind(Rule.parse(rule), of) for rule in rules]
        table = torch.zeros(65536, dtype=torch.int32)
        code = fused.Fused(of, bounds, torch.device("cpu"), table)
        at = np.array([4096])
        there = Table.of(at, at, at, at * 0).sent(torch.device("cpu"))
        masks = torch.zeros(len(rules), 512, dtype=torch.uint8)
        code(there, masks, torch.zeros(len(rules), 1, dtype=torch.int32))
        if dtype in ("BF16", "F6_E2M3"):  # these know no more of a dtype than its width
            out = torch.zeros(4, 8, dtype=torch.int64)
            digests.Digests(torch.device("cpu"))(there, out, of.bits)
        if dtype == "BF16":
            compact.moved(there, masks[0], torch.zeros(1, dtype=torch.int64), 1, of)
        for name, compiled in zip(("compare", "digest", "compact"), made, strict=False):
            text = compiled.asm["ptx"]
            names = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]+)", text, re.M)
            found[f"{name} {dtype}"] = {one: names.count(one) for one in set(names)}
        made.clear()
    return found


if __name__ == "__main__":
    print(
        json.dumps(
            {"bits": bits, "compact": compact_, "held": held, "diff": diff, "ptx": ptx}[
                sys.argv[1]
            ](sys.argv[2:])
        )
    )
