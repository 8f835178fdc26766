"""The GPU path: the bus, the card, comparing what is on the card, and diffs from the page cache.

    python bench/gpu.py [--gib 4] [--rounds 3] [--memory 4GiB] [--device-memory 4GiB] [--dir DIR]

Runs from a checkout, in less than three minutes: rounds that would take longer are left out. Diffs
are measured with the memory that is given, and with the default. Without a GPU it says so, and
measures nothing; ``--rehearse`` goes the whole way on torch's CPU device, small and once: its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import make_pair, median, table, take_turns

from ckdiff.budget import MIB, format_size, parse_size, usable_cores
from ckdiff.diffs.plan import plan
from ckdiff.diffs.run import run as run_plan
from ckdiff.errors import UsageError
from ckdiff.kernels.gpu import open_device
from ckdiff.kernels.gpu.compact import changed_positions
from ckdiff.kernels.gpu.counting import count_changed, slot_for
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.tables import Table
from ckdiff.options import Options
from ckdiff.rules import Rule
from ckdiff.sync import Publisher

Memory = tuple[str | int | None, str | int]  # of the host, of the device
RULES = ("exact", "atol=1e-5", "rtol=1e-3", "ulp=1")
IN_A_ROW = 10  # calls that are timed together
CHANGED = 0.01
LIMIT = 160  # seconds, by which the last round shall have ended


def seconds(device: Device, work: Callable[[], object], rounds: int) -> float:
    """Of a call, median of some rows of calls that are waited for once."""

    def wait() -> None:
        if device.cuda:
            torch.cuda.synchronize(device.device)

    found = []
    for _ in range(rounds + 1):  # the first one is not counted
        wait()
        began = time.perf_counter()
        for _ in range(IN_A_ROW):
            work()
        wait()
        found.append((time.perf_counter() - began) / IN_A_ROW)
    return median(found[1:])


def bus(device: Device, size: int, rounds: int) -> tuple[float, float]:
    """(host to device, device memory) in bytes a second; memory counts reading and writing."""
    here, there, other = device.pinned(size), device.memory(size), device.memory(size)
    ways = {"host to device, pinned": (there, here, 1), "device to host, pinned": (here, there, 1),
            "in the device, read and written": (other, there, 2)}  # fmt: skip
    rows = []
    for name, (to, of, times) in ways.items():
        copy = partial(to.copy_, of, non_blocking=True)
        rows.append((name, times * size / seconds(device, copy, rounds) / 1e9))
    table(f"The bus and the card: {device.name}", ["what", "GB/s"], rows)
    return rows[0][1] * 1e9, rows[2][1] * 1e9


def inside(device: Device, elements: int, memory: float, rounds: int) -> None:
    """What is done with tensors that are on the device: bytes of both sides a second."""
    where = device.device
    base = torch.randn(elements, device=where).to(torch.bfloat16)
    tuned = base.clone()
    tuned.view(torch.int16)[torch.rand(elements, device=where) < CHANGED] ^= 1
    rules = tuple(Rule.parse(rule) for rule in RULES)
    work: dict[str, Callable[[], object]] = {}
    for some in (rules[:1], rules):
        slot, said = slot_for("BF16", some, where), ", ".join(map(str, some))
        numbers = Table.one(base.data_ptr(), tuned.data_ptr(), elements, where)
        masks = torch.zeros((len(some), elements // 8), dtype=torch.uint8, device=where)
        counts = torch.zeros((len(some), numbers.programs), dtype=torch.int32, device=where)
        sums = torch.zeros((4, numbers.programs), dtype=torch.int64, device=where)
        found = numbers, masks, counts
        work[f"counts and masks: {said}"] = partial(slot.compare, *found)
        work[f"counts, masks and content hashes: {said}"] = partial(slot.compare, *found, sums)
        work[f"counts of tensors: {said}"] = partial(count_changed, [(base, tuned)], ["BF16"], some)
    work["positions and values, 1 % changed"] = partial(changed_positions, base, tuned, "BF16")

    def plainly() -> object:
        return tuned[(base.view(torch.int16) != tuned.view(torch.int16)).nonzero().view(-1)]

    work["the same with torch.nonzero and a gather"] = plainly
    rows: list[list[object]] = []
    for name, one in work.items():
        rate = 4 * elements / seconds(device, one, rounds)
        rows.append([name, rate / 1e9, rate / memory])
    head = ["bf16, both sides on the device", "GB/s of both sides", "of device memory"]
    table(f"On the device, {elements >> 20} Mi elements: {device.name}", head, rows)


def publishing(device: Device, elements: int, root: Path, rounds: int) -> None:
    """Versions of a model on the device: all of it copied, or only what changed."""
    rows: list[list[object]] = []
    for kind in ("memory", "device"):
        weight = torch.zeros(elements, dtype=torch.bfloat16, device=device.device)
        weight.view(torch.int16).random_(1000)
        changes = torch.rand(elements, device=device.device) < CHANGED
        with Publisher(root / f"stream-{kind}", snapshot=kind) as publisher:
            found = []
            for _ in range(rounds + 2):  # the first is full, and the second brings kernels
                weight.view(torch.int16)[changes] ^= 1
                state = {f"w{i}": part for i, part in enumerate(weight.chunk(16))}
                found.append(publisher.publish(state).seconds)
        rows.append([kind, 2 * elements / median(found[2:]) / 1e9])
    head = ["snapshot", "GB/s of weights"]
    table(f"Publishing {elements >> 20} Mi bf16 weights, 1 % changed: {device.name}", head, rows)


class Diffs(NamedTuple):
    """Between checkpoints in the page cache."""

    root: Path
    gib: float  #: of each side
    changed: int  #: elements
    rounds: int  #: at most
    to_device: float  #: bytes a second that the bus carries

    def run(self, options: Options, sizes: list[int]) -> float:
        """Seconds of a diff, which has to find what was changed; ``sizes`` become its window in
        elements, and the memory in bytes that it was allowed.
        """
        torch.cuda.empty_cache()  # what a run of another size took would be kept beside this one's
        with plan(self.root / "base", self.root / "tuned", None, options) as planned:
            sizes[:] = planned.allotment.window, planned.allotment.memory
            result = run_plan(planned)
        assert result.rules["exact"]["changed"] == self.changed, "WRONG COUNT"
        return result.seconds


def whole(device: Device, of: Diffs, memory: Memory, until: float) -> None:
    """On the CPU and on the device, in turn, with some bounds on host and device memory; no round
    begins that would not end by ``until``.
    """
    there = "cuda" if device.cuda else "torch-cpu"
    several = [n for n in (2, 4, 8, 16) if n <= usable_cores()] or [1]
    contestants: dict[str, Callable[[], float]] = {}
    sizes: dict[str, list[int]] = {}
    for workers in several:
        for rules in (RULES[:1], RULES) if workers == several[-1] else (RULES[:1],):
            for where in ("cpu", there):
                name = f"{where}, {workers} workers, {len(rules)} rule{'s'[: len(rules) - 1]}"
                options = Options(rules=rules, workers=workers, memory=memory[0], device=where,
                                  device_memory=memory[1])  # fmt: skip
                contestants[name] = partial(of.run, options, sizes.setdefault(name, []))
    if device.cuda:
        torch.cuda.empty_cache()  # of the bounds before
        torch.cuda.reset_peak_memory_stats(device.device)
    began = time.perf_counter()
    take_turns(contestants, 1)  # the page cache, kernels, torch
    left, each = until - time.perf_counter(), time.perf_counter() - began
    rounds = max(1, min(of.rounds, int(left / each)))
    rows: list[list[object]] = []
    for name, found in take_turns(contestants, rounds).items():
        rate = 2 * of.gib * 2**30 / median(found)
        of_bus = "" if name.startswith("cpu") else rate / of.to_device
        window, allowed = sizes[name]
        rows.append([name, format_size(allowed), window * 2 / MIB, rate / 1e9, of_bus])
    bounds = f"--memory {memory[0] or 'by default'}, --device-memory {memory[1]}"
    head = ["compared on", "memory", "MiB a side and window", "GB/s", "of the bus"]
    table(f"Diffs from the page cache, 2 x {of.gib:g} GiB bf16, {bounds}, median of {rounds}: "
          f"{device.name}", head, rows)  # fmt: skip
    if device.cuda:
        most, bound = torch.cuda.max_memory_reserved(device.device), parse_size(memory[1])
        kept = "kept" if most <= bound else "NOT KEPT"
        print(f"\nmost device memory that torch reserved: {format_size(most)}, "
              f"with {format_size(bound)} allowed: {kept}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4.0, help="size of each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="4GiB", help="as of ckdiff diff")
    parser.add_argument("--device-memory", default="4GiB", help="as of ckdiff diff")
    parser.add_argument("--dir", help="where the pair goes (default: a temporary directory)")
    parser.add_argument("--rehearse", action="store_true", help="on torch's CPU device, small")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    began = time.perf_counter()
    try:
        device = open_device("torch-cpu" if a.rehearse else "cuda")
    except UsageError as error:
        print(f"nothing was measured: {error.message}")
        return
    small = a.quick or a.rehearse
    if small:
        a.gib, a.rounds = 1 / 64, 1
    elements = 1 << 20 if small else 1 << 28
    to_device, memory = bus(device, MIB if small else 256 * MIB, a.rounds)
    inside(device, elements, memory, a.rounds)
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        publishing(device, elements, Path(folder), a.rounds)
        device.drop_cache()
        changed = make_pair(Path(folder), a.gib, CHANGED, per=min(1 << 26, int(a.gib * 2**29)))
        of = Diffs(Path(folder), a.gib, changed, a.rounds, to_device)
        default, until = Options(), began + LIMIT
        whole(device, of, (a.memory, a.device_memory), (time.perf_counter() + until) / 2)
        whole(device, of, (default.memory, default.device_memory), until)
    print(f"\nin {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
