"""The GPU path: the bus, the card, what the CPU has to do meanwhile, and whole diffs.

    python bench/gpu.py [--gib 4] [--rounds 5] [--workers N] [--quick] [--dir DIR]

Without a GPU it says that none was measured, and what going the same way costs on torch's CPU
device, which says nothing about any GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import bf16_noise, make_pair, median, table, take_turns, timed

from ckdiff.budget import usable_cores
from ckdiff.dtypes import DTYPES
from ckdiff.engine import Diff
from ckdiff.errors import UsageError
from ckdiff.gpu import open_device, staging
from ckdiff.gpu.sizes import LARGEST_SIDE, out_bytes
from ckdiff.gpu.staging import Device, Slot, Stage
from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.binding import bind
from ckdiff.options import Options
from ckdiff.rules import Rule

RULES = ("exact", "atol=1e-5", "rtol=1e-3", "ulp=1")
UNIT = 512  # elements


def synchronize(device: Device) -> None:
    if device.cuda:
        torch.cuda.synchronize(device.device)


def seconds(work: Callable[[], object], device: Device, rounds: int) -> float:
    """Median of ``rounds``, after one that is not counted."""

    def once() -> None:
        work()
        synchronize(device)

    once()
    measure = timed(once)
    return median([measure() for _ in range(rounds)])


def bus(device: Device, rounds: int, quick: bool) -> tuple[float, float]:
    """(host to device, device memory) in bytes a second; memory counts reading and writing."""
    size = (1 << 24) if quick else (1 << 28)
    host, there = device.buffers(size)
    other = torch.empty_like(there)
    to = seconds(lambda: there.copy_(host, non_blocking=True), device, rounds)
    inside = seconds(lambda: other.copy_(there), device, rounds)
    piece = LARGEST_SIDE
    small = seconds(lambda: there[:piece].copy_(host[:piece], non_blocking=True), device, rounds)
    rows = [
        [f"host to device, pinned, {size >> 20} MiB", size / to / 1e9],
        [f"host to device, pinned, {piece >> 20} MiB", piece / small / 1e9],
        ["device memory, copy inside, read and written", 2 * size / inside / 1e9],
    ]
    table(f"The bus and the card: {device.name}", ["what", "GB/s"], rows)
    return size / to, 2 * size / inside


def comparing(device: Device, memory: float, rounds: int, quick: bool) -> None:
    """Comparing what is on the device already: masks and counts of one rule."""
    rows: list[list[object]] = []
    dtype = DTYPES["BF16"]
    for elements in [1 << 21] if quick else [1 << 21, 1 << 27]:
        base = torch.from_numpy(bf16_noise(elements).view(np.uint8)).to(device.device)
        tuned = base.clone()
        tuned[::20] ^= 1
        for text in RULES:
            slot = Slot(dtype, [bind(Rule.parse(text), dtype)], [None])
            out = torch.empty(out_bytes(elements, 1), dtype=torch.uint8, device=device.device)

            work = partial(staging._compare, slot, base, tuned, out)
            rate = 2 * len(base) / seconds(work, device, rounds)
            rows.append([text, elements >> 20, rate / 1e9, rate / memory])
    title = f"Comparing alone, bf16, both sides on the device: {device.name}"
    table(title, ["rule", "Mi elements", "GB/s", "of device memory"], rows)


def meanwhile(workers: int, rounds: int) -> None:
    """What is left to the CPU: copying both sides to pinned memory, and their hashes."""
    dtype = DTYPES["BF16"]
    cpu = Kernels([dtype], [Rule.parse("exact")])
    here = Device(torch.device("cpu"), "")
    elements = LARGEST_SIDE // 2
    jobs = []
    for i in range(workers):
        base = bf16_noise(8 * elements, i)
        tuned = base.copy()
        tuned[:: 10 * UNIT] ^= 1
        stage = Stage(here, LARGEST_SIDE, out_bytes(elements, 1))
        mask = np.zeros(elements // 8, np.uint8)
        pieces = []
        for at in range(0, len(base), elements):
            row = np.zeros((1, abi.SEG_COLUMNS), np.int64)
            row[0, abi.SEG_BASE] = base[at:].ctypes.data
            row[0, abi.SEG_TUNED] = tuned[at:].ctypes.data
            row[0, abi.SEG_ELEMENTS] = elements
            pieces.append(row)
        jobs.append((base, tuned, stage, mask, pieces))

    def fill(job: int) -> None:
        _, _, stage, _, pieces = jobs[job]
        for row in pieces:
            size = 2 * elements
            stage._fill(staging._Flight(row, 0, elements, 1, size, 16))

    def measure(job: int) -> None:
        _, _, _, mask, pieces = jobs[job]
        for row in pieces:
            cpu.measure(row, mask, Results(1, 1, with_statistics=False))

    def all_at_once(work: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return run

    def both(job: int) -> None:
        fill(job)
        measure(job)

    total = workers * 2 * 2 * 8 * elements
    rows = [
        [name, total / seconds(all_at_once(work), here, rounds) / 1e9]
        for name, work in {
            "copying to staging memory": fill,
            "content hashes": measure,
            "both": both,
        }.items()
    ]
    table(f"What the CPU does meanwhile, {workers} workers", ["what", "GB/s"], rows)


def whole(
    device: Device, to_device: float | None, a: argparse.Namespace, gib: float, rounds: int
) -> None:
    """Diffs from the page cache, on the CPU and on the device, in turn."""
    there = "cuda" if device.cuda else "torch-cpu"
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        changed = make_pair(root, gib, 0.01)

        def run(where: str, rules: tuple[str, ...]) -> float:
            options = Options(rules=rules, workers=a.workers, memory="16GiB", device=where)
            with Diff(root / "base", root / "tuned", None, options) as planned:
                result = planned.run()
            assert result.rules["exact"]["changed"] == changed, "WRONG COUNT"
            return result.seconds

        contestants: dict[str, Callable[[], float]] = {}
        # torch's CPU device only shows that it works: one rule will do
        for rules in (("exact",), RULES) if device.cuda else (("exact",),):
            for where in ("cpu", there):
                name = f"{where}, {', '.join(rules)}"
                contestants[name] = lambda where=where, rules=rules: run(where, rules)
        take_turns(contestants, 1)  # the page cache, kernels, torch
        times = take_turns(contestants, rounds)
    size = 2 * gib * 2**30
    rows = []
    for name, found in times.items():
        rate = size / median(found)
        of_bus = "" if to_device is None or name.startswith("cpu") else rate / to_device
        rows.append([name, median(found), rate / 1e9, of_bus])
    title = f"Whole diffs, 2 x {gib:g} GiB bf16, warm, no store, {a.workers} workers"
    table(f"{title}: {device.name}", ["device, rules", "s", "GB/s", "of host to device"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4, help="size of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--dir", help="where the pair goes (default: a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    gib, rounds = (0.125, 1) if a.quick else (a.gib, a.rounds)
    to_device: float | None = None
    try:
        device = open_device("cuda")
    except UsageError as error:
        print(f"{error}: none measured. What follows is torch's CPU device.")
        device = open_device("torch-cpu")
    else:
        to_device, memory = bus(device, rounds, a.quick)
        comparing(device, memory, rounds, a.quick)
    meanwhile(a.workers, rounds)
    whole(device, to_device, a, gib, rounds)
    if device.cuda:
        peak = torch.cuda.max_memory_reserved(device.device)
        print(f"\nmost device memory that torch reserved in all: {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
