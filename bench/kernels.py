"""The kernels alone, straight from mappings in the page cache, two threads, against a plain sum.

    python bench/kernels.py [--gib 2] [--rounds 7] [--quick]

The sum adds up both files as 64-byte vectors and does nothing else: the floor.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import QUICK, header, make_pair, median, table
from loading import loading

from ckdiff.kernels.binding import parse_kind
from ckdiff.kernels.codegen.lanes import word_bytes
from ckdiff.kernels.compiled import c_function

WINDOW = 1 << 22  # bytes of one side handed to a kernel at a time


def on_threads(work: Callable[[int], None], threads: int) -> float:
    """Seconds until ``work(i)`` is done on every thread."""
    ready = threading.Barrier(threads + 1)

    def run(i: int) -> None:
        ready.wait()
        work(i)

    pool = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in pool:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in pool:
        thread.join()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=2, help="size of each side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    gib, rounds = (QUICK, 1) if a.quick else (a.gib, a.rounds)
    # of what is small each thread gets some, too
    window = WINDOW // 8 if a.quick else WINDOW
    total = loading()
    kinds = ["W16:exact", "BF16:atol", "BF16:rtol", "BF16:ulp", "F16:atol", "W32:exact",
             "F32:atol", "F32>BF16:exact"]  # fmt: skip
    kernels = {kind: c_function("compare", kind).ctypes for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_pair(root, gib, 0.1, shards=1)
        skip = len(header([("x", "BF16", (1,))])[0])
        maps = [
            np.memmap(next((root / s).glob("*.safetensors")), np.uint8, "r")
            for s in ("base", "tuned")
        ]
        size = (len(maps[0]) - skip) // (window * a.threads) * window  # of one side, a thread
        if not size:
            raise SystemExit(f"{gib:g} GiB are less than a window for each thread")
        addresses = [m.ctypes.data + len(m) - size * a.threads for m in maps]
        parameter = int(np.float64(1e-5).view(np.uint64))
        masks = [np.zeros(window, np.uint8) for _ in range(a.threads)]

        def read(i: int) -> None:
            for address in addresses:
                for at in range(i * size, (i + 1) * size, window):
                    total(address + at, window)

        def compare(kind: str) -> Callable[[int], None]:
            words = window // word_bytes(parse_kind(kind)[0])

            def run(i: int) -> None:
                for at in range(i * size, (i + 1) * size, window):
                    kernels[kind](
                        addresses[0] + at, addresses[1] + at, words, parameter, masks[i].ctypes.data
                    )

            return run

        on_threads(read, a.threads)
        times: dict[str, list[float]] = {"sum of both files": []} | {k: [] for k in kinds}
        for _ in range(rounds):
            times["sum of both files"].append(on_threads(read, a.threads))
            for kind in kinds:
                times[kind].append(on_threads(compare(kind), a.threads))
    floor = median(times["sum of both files"])
    gigabytes = 2 * size * a.threads / 1e9
    table(
        f"Kernels with mask and count, {a.threads} threads, 2 x {gib:g} GiB, median of {rounds}",
        ["kernel", "GB/s", "speed / sum"],
        [[k, gigabytes / median(t), floor / median(t)] for k, t in times.items()],
    )


if __name__ == "__main__":
    main()
