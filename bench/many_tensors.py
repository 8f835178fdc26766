"""100,000 small tensors: diff, open_store and mask(name). And how long the command takes to start.

python bench/many_tensors.py [--tensors 100000] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ckdiff, header, median, table, watch

import ckdiff as api


def wall(command: list[str], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    count, rounds = (2000, 1) if a.quick else (a.tensors, 5)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = [
            f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.up_proj.weight" for i in range(count)
        ]
        head, _, _ = header([(name, "BF16", (16, 48)) for name in names])
        data = np.random.default_rng(0).integers(0, 60000, count * 768, dtype=np.uint16)
        for side in ("base", "tuned"):
            (root / side).mkdir()
            if side == "tuned":
                data[::10] ^= 1
            (root / side / "model.safetensors").write_bytes(head + data.tobytes())
        out = root / "masks.zarr"
        command = ckdiff("diff", root / "base", root / "tuned", "-o", out, "--json", "--overwrite")
        runs = [watch(command) for _ in range(rounds)]
        result = json.loads(runs[0].stdout)
        assert result["rules"]["exact"]["changed"] == len(range(0, count * 768, 10))
        rows += [
            [
                f"diff -o of {count:,} tensors, whole command",
                f"{median([r.seconds for r in runs]):.2f} s",
            ],
            ["its peak RssAnon", f"{max(r.rss_anon for r in runs)} MiB"],
        ]
        opening, first, later = [], [], []
        for i in range(rounds):
            began = time.perf_counter()
            store = api.open_store(out)
            opening.append(time.perf_counter() - began)
            began = time.perf_counter()
            store.mask(names[count // 2 + i])
            first.append(time.perf_counter() - began)
            began = time.perf_counter()
            store.mask(names[count // 2 - i])
            later.append(time.perf_counter() - began)
        rows += [
            ["open_store", f"{median(opening):.3f} s"],
            ["mask(name), first of a chunk", f"{median(first) * 1e3:.2f} ms"],
            ["mask(name), later", f"{median(later) * 1e3:.2f} ms"],
        ]
        small = root / "small"
        head, _, _ = header([("weight", "BF16", (512, 1024))])
        for side in ("base", "tuned"):
            (small / side).mkdir(parents=True)
            (small / side / "model.safetensors").write_bytes(
                head + data[: 1 << 19].tobytes()[: 1 << 20]
            )
        if count * 768 >= 1 << 19:
            pair = ckdiff("diff", small / "base", small / "tuned")
            rows.append(["diff of a 1 MB pair, warm kernel cache", f"{wall(pair, rounds):.2f} s"])
    help_rounds = 1 if a.quick else 9
    said = wall([sys.executable, "-m", "ckdiff", "--help"], help_rounds)
    rows.append(["ckdiff --help", f"{said:.3f} s"])
    table("Many tensors, and starting up", ["what", "median"], rows)


if __name__ == "__main__":
    main()
