"""Peak RssAnon and total RSS of `ckdiff diff -o` against the size of the model.

    python bench/memory.py [--gib 1 4 16] [--quick]

The pairs are sparse files with a change in every MiB: memory does not care what the bytes are.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import header, table, watched_diff


def sparse_pair(root: Path, gib: float) -> None:
    rows = round(gib * 2**30) // 2 // 8192 // 16
    tensors = [(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (rows, 8192)) for i in range(16)]
    head, _, size = header(tensors)
    for side in ("base", "tuned"):
        (root / side).mkdir(parents=True)
        with open(root / side / "model.safetensors", "wb") as f:
            f.write(head)
            f.truncate(size)
            if side == "tuned":
                for at in range(len(head), size, 1 << 20):
                    f.seek(at)
                    f.write(b"\x01")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 4, 16], help="sizes of a side")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    rows = []
    for gib in [0.125] if a.quick else a.gib:
        for options in ([], ["--rule", "exact", "--rule", "atol=1e-5", "--stats"]):
            with tempfile.TemporaryDirectory(dir=a.dir) as folder:
                root = Path(folder)
                sparse_pair(root, gib)
                run, result, _ = watched_diff(root, *options, workers=a.workers)
                speed = result["bytes_read"] / run.seconds / 1e9
                what = "exact, atol, stats" if options else "exact"
                rows.append([f"2 x {gib:g} GiB", what, run.rss_anon, run.rss, speed])
    table(
        f"Memory, {a.workers} workers",
        ["pair", "rules", "peak RssAnon MiB", "peak RSS MiB", "GB/s (whole command)"],
        rows,
    )


if __name__ == "__main__":
    main()
