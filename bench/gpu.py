"""The GPU path: the bus, the card, what the CPU has to do meanwhile, and whole diffs.

    python bench/gpu.py [--gib N] [--rounds 5] [--workers N] [--device-memory SIZE] [--quick]
                        [--dir DIR]

Without a GPU it says that none was measured, and what going the same way costs on torch's CPU
device, which says nothing about any GPU.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import bf16_noise, make_pair, median, table, take_turns, timed
from torch.utils._python_dispatch import TorchDispatchMode

import ckdiff.kernels.gpu
from ckdiff.budget import MIB, format_size, parse_size, usable_cores
from ckdiff.diffs.plan import plan
from ckdiff.diffs.run import run as run_plan
from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError
from ckdiff.kernels import Kernels, Results, abi
from ckdiff.kernels.gpu import open_device, staging
from ckdiff.kernels.gpu.preparing import make_slots
from ckdiff.kernels.gpu.sizes import LARGEST_SIDE, out_bytes
from ckdiff.kernels.gpu.staging import Device, Slot, Stages
from ckdiff.options import Options
from ckdiff.rules import Rule

RULES = ("exact", "atol=1e-5", "rtol=1e-3", "ulp=1")
SETS = (*((rule,) for rule in RULES), RULES)
UNIT = 512  # elements
IN_A_ROW = 20  # calls that are timed together
CACHED = 256 * MIB  # more than a card's second-level cache holds


def event_seconds(work: Callable[[int], object], rounds: int) -> float:
    """Seconds of a call on the device's own clock: median of several rows of calls.

    ``work`` gets the number of the call, by which it takes another buffer each time.
    """
    found = []
    for i in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in range(IN_A_ROW):
            work(call)
        end.record()
        end.synchronize()
        if i:  # the first one is not counted
            found.append(start.elapsed_time(end) / 1e3 / IN_A_ROW)
    return median(found)


def buffers(device: Device, size: int, total: int) -> list[torch.Tensor]:
    """Buffers of a size, of so many bytes together, or of what half of the free memory holds."""
    free, _ = torch.cuda.mem_get_info(device.device)
    return [device.memory(size) for _ in range(max(1, min(total, free // 2) // size))]


def bus(device: Device, rounds: int) -> tuple[float, float]:
    """(host to device, device memory) in bytes a second; memory counts reading and writing."""
    rows: list[list[object]] = []
    rates = []
    for size in (2 * LARGEST_SIDE, 64 * MIB):
        there = buffers(device, size, 2 * CACHED)
        here = [device.pinned(size) for _ in range(4)]

        def copy(i: int, to: Sequence[torch.Tensor], of: Sequence[torch.Tensor]) -> None:
            to[i % len(to)].copy_(of[i % len(of)], non_blocking=True)

        for name, to, of, times in (
            ("host to device, pinned", there, here, 1),
            ("device to host, pinned", here, there, 1),
            ("inside the device, read and written", there[::2], there[1::2] or there, 2),
        ):
            rate = times * size / event_seconds(lambda i, to=to, of=of: copy(i, to, of), rounds)
            rows.append([name, size >> 20, rate / 1e9])
            rates.append(rate)
        del there, here
    table(f"The bus and the card: {device.name}", ["what", "MiB a copy", "GB/s"], rows)
    return rates[3], rates[5]  # of the larger copies


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would be launched for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def slot_of(device: Device, rules: Sequence[str], *, fused: bool) -> Slot:
    dtype, parsed = DTYPES["BF16"], [Rule.parse(rule) for rule in rules]
    before, device.fused = device.fused, fused
    (slot,), why = make_slots(Kernels([dtype], parsed), [dtype], parsed, device)
    device.fused = before
    if why is not None:
        print(f"without Triton: {why}")
    return slot


def launches(device: Device) -> None:
    """How often a GPU would be, or is, told to do something for a piece."""
    rows: list[list[object]] = []
    elements = 1 << 16
    side = device.memory(2 * elements).zero_()
    for rules in SETS:
        slot = slot_of(device, rules, fused=False)
        out = device.memory(out_bytes(elements, len(rules)))
        with Operations() as seen:
            staging._compare(slot, side, side, out)
        rows.append([", ".join(rules), 1, seen.count])
    table("Launches for a piece of bf16", ["rules", "Triton", "torch operations"], rows)


def compare_one_of(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], slot: Slot, out: torch.Tensor, i: int
) -> None:
    staging._compare(slot, *pairs[i % len(pairs)], out)


def comparing(device: Device, to_device: float, memory: float, rounds: int, quick: bool) -> None:
    """Comparing what is on the device already: masks and counts."""
    rows: list[list[object]] = []
    for elements in [1 << 21] if quick else [1 << 21, 1 << 25]:
        sides = buffers(device, 2 * elements, 2 * CACHED)
        noise = torch.from_numpy(bf16_noise(elements).view(np.uint8)).to(device.device)
        for side, i in zip(sides, itertools.count(), strict=False):
            side.copy_(noise)
            side[::20] ^= i & 1
        pairs = list(zip(sides[::2], sides[1::2], strict=False)) or [(sides[0], sides[0])]
        for rules in SETS:
            out = device.memory(out_bytes(elements, len(rules)))
            for fused in (True, False) if device.fused else (False,):
                slot = slot_of(device, rules, fused=fused)

                work = partial(compare_one_of, pairs, slot, out)
                way = "Triton" if slot.fused is not None else "torch operations"
                try:
                    spent = event_seconds(work, rounds)
                except torch.cuda.OutOfMemoryError:
                    rows.append([", ".join(rules), elements >> 20, way, "no memory", "", "", ""])
                    continue
                # what has to be moved in any case
                moved = (4 * elements + len(out)) / spent
                read = 4 * elements / spent
                rows.append([", ".join(rules), elements >> 20, way, 1e6 * spent, read / 1e9,
                             moved / memory, read / to_device])  # fmt: skip
        del sides, pairs, noise, work
        device.drop_cache()
    head = ["rules", "Mi elements", "with", "µs", "GB/s", "of device memory", "times the bus"]
    table(f"Comparing alone, bf16, both sides on the device: {device.name}", head, rows)


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
        stage = Stages(here, LARGEST_SIDE, out_bytes(elements, 1), 0).each[0]
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

    def seconds(work: Callable[[int], None]) -> float:
        measure = timed(all_at_once(work))
        measure()
        return median([measure() for _ in range(rounds)])

    total = workers * 2 * 2 * 8 * elements
    rows = [
        [name, total / seconds(work) / 1e9]
        for name, work in {
            "copying to staging memory": fill,
            "content hashes": measure,
            "both": both,
        }.items()
    ]
    table(f"What the CPU does meanwhile, {workers} workers", ["what", "GB/s"], rows)


@contextmanager
def with_or_without_triton(wanted: bool) -> Iterator[None]:
    find = ckdiff.kernels.gpu._find_triton
    if not wanted:
        ckdiff.kernels.gpu._find_triton = lambda device: None
    try:
        yield
    finally:
        ckdiff.kernels.gpu._find_triton = find


def whole(
    device: Device, to_device: float | None, a: argparse.Namespace, gib: float, rounds: int
) -> None:
    """Diffs from the page cache, on the CPU and on the device, in turn."""
    there = "cuda" if device.cuda else "torch-cpu"
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        changed = make_pair(root, gib, 0.01)

        def run(where: str, rules: tuple[str, ...], fused: bool) -> float:
            options = Options(rules=rules, workers=a.workers, memory="16GiB", device=where,
                              device_memory=a.device_memory)  # fmt: skip
            with (
                with_or_without_triton(fused),
                plan(root / "base", root / "tuned", None, options) as planned,
            ):
                result = run_plan(planned)
            assert result.rules["exact"]["changed"] == changed, "WRONG COUNT"
            return result.seconds

        ways = [("cpu", "cpu", False), (f"{there}, torch operations", there, False)]
        if device.fused:
            ways.append((f"{there}, Triton", there, True))
        contestants: dict[str, Callable[[], float]] = {}
        # torch's CPU device only shows that it works: one rule will do
        for rules in (("exact",), RULES) if device.cuda else (("exact",),):
            for name, where, fused in ways:
                contestants[f"{name}: {', '.join(rules)}"] = (
                    lambda where=where, rules=rules, fused=fused: run(where, rules, fused)
                )
        take_turns(contestants, 1)  # the page cache, kernels, torch
        times = take_turns(contestants, rounds)
    size = 2 * gib * 2**30
    rows = []
    for name, found in times.items():
        rate = size / median(found)
        of_bus = "" if to_device is None or name.startswith("cpu") else rate / to_device
        rows.append([name, median(found), rate / 1e9, of_bus])
    title = f"Whole diffs, 2 x {gib:g} GiB bf16, warm, no store, {a.workers} workers"
    table(f"{title}: {device.name}", ["device: rules", "s", "GB/s", "of the bus"], rows)


def page_cache(wanted: float) -> float:
    """GiB of a side that surely stay in memory, at most what is wanted."""
    text = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) for line in text.splitlines() if "MemAvailable" in line)
    return min(wanted, max(1, (free >> 20) // 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, help="size of each side (default: 16, or what fits)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--device-memory", default="1GiB", help="as of ckdiff diff")
    parser.add_argument("--dir", help="where the pair goes (default: a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    to_device: float | None = None
    try:
        device = open_device("cuda")
    except UsageError as error:
        print(f"{error}: none measured. What follows is torch's CPU device.")
        device = open_device("torch-cpu")
    gib = a.gib or page_cache(16 if device.cuda else 4)
    gib, rounds = (0.125, 1) if a.quick else (gib, a.rounds)
    for note in device.notes:
        print(note)
    launches(device)
    if device.cuda:
        to_device, memory = bus(device, rounds)
        comparing(device, to_device, memory, rounds, a.quick)
        device.drop_cache()
        torch.cuda.reset_peak_memory_stats(device.device)
    meanwhile(a.workers, rounds)
    whole(device, to_device, a, gib, rounds)
    if device.cuda:
        most, allowed = torch.cuda.max_memory_reserved(device.device), parse_size(a.device_memory)
        kept = "kept" if most <= allowed else "NOT KEPT"
        print(
            f"\nmost device memory that torch reserved in diffs: {format_size(most)} of "
            f"{format_size(allowed)} allowed: {kept}"
        )


if __name__ == "__main__":
    main()
