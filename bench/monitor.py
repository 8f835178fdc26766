"""A look at a model's update, beside what people write with torch, in turn and in one run.

    python bench/monitor.py [--elements 1e8] [--rounds 9] [--threads 2] [--json] [--quick]

The model is square bfloat16 matrices, of which a tenth of the elements are changed. "torch" is
(a != b).sum() of each parameter and its copy, with one wait at the end. Counts are held against
each other. Processor time is that of all threads: other work does not stretch it by much.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from common import median, table, take_turns, timed
from torch import nn

from ckdiff.training import UpdateMonitor

SIDE = 2500


class Layers(nn.Module):
    """Square matrices of one dtype."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        made = (nn.Linear(SIDE, SIDE, bias=False, dtype=dtype) for _ in range(count))
        self.layers = nn.ModuleList(made)


def by_torch(model: nn.Module, *copies: list[torch.Tensor]) -> Callable[[], list[int]]:
    """Counts against each list of copies."""

    def look() -> list[int]:
        with torch.no_grad():
            sums = [
                torch.stack([(a != b).sum() for a, b in zip(model.parameters(), some, strict=True)])
                for some in copies
            ]
            return [int(found.sum()) for found in sums]

    return look


def rounded(model: nn.Module, copies: list[torch.Tensor]) -> Callable[[], int]:
    """The same of what both are in bfloat16."""

    def look() -> int:
        with torch.no_grad():
            pairs = zip(model.parameters(), copies, strict=True)
            kind = torch.bfloat16
            return int(torch.stack([(a.to(kind) != b.to(kind)).sum() for a, b in pairs]).sum())

    return look


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::10] += 1


def measured(run: Callable[[], object], processor: list[float]) -> Callable[[], float]:
    """``run`` as a contestant; the processor's time goes to a list."""
    wall = timed(run)

    def measure() -> float:
        began = time.process_time()
        seconds = wall()
        processor.append(time.process_time() - began)
        return seconds

    return measure


def contestants(count: int) -> dict[str, Callable[[], object]]:
    """What takes turns; each has been held against the others."""
    small, wide = Layers(count, torch.bfloat16), Layers(count, torch.float32)
    start = [parameter.detach().clone() for parameter in small.parameters()]
    masters = [parameter.detach().clone() for parameter in wide.parameters()]
    one = UpdateMonitor(small, since_last=False)
    both = UpdateMonitor(small)
    served = UpdateMonitor(wide, rule="exact@bf16", since_last=False)
    change(small)
    change(wide)
    expected = by_torch(small, start)()[0]
    first = [one.look().changed, both.look().changed, both.look().changed]
    if first != [expected] * 3 or served.look().changed != rounded(wide, masters)():
        raise SystemExit(f"counts differ: {first}, {expected}")
    return {
        "bf16, the start: ckdiff": one.look,
        "bf16, the start: torch": by_torch(small, start),
        "bf16, the start and the last look, which is renewed: ckdiff": both.look,
        "float32 as exact@bf16, the start: ckdiff": served.look,
        "float32 as exact@bf16, the start: torch": rounded(wide, masters),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=float, default=1e8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.elements, options.rounds = 2 * SIDE**2, 1
    torch.set_num_threads(options.threads)
    count = max(1, round(options.elements / SIDE**2))
    busy: dict[str, list[float]] = defaultdict(list)
    runs = {name: measured(run, busy[name]) for name, run in contestants(count).items()}
    times = take_turns(runs, options.rounds)
    wall, processor = (
        {name: [1e3 * second for second in seconds] for name, seconds in some.items()}
        for some in (times, busy)
    )
    if options.json:
        found = {"elements": count * SIDE**2, "milliseconds": wall, "processor": processor}
        print(json.dumps(found))
        return
    rows = [(name, median(ms), min(ms), median(processor[name])) for name, ms in wall.items()]
    title = f"A look at {count * SIDE**2 / 1e6:.0f} million parameters, {options.threads} threads"
    columns = ["what is compared, and by whom", "median ms", "least ms", "processor ms"]
    table(title, columns, rows)


if __name__ == "__main__":
    main()
