"""Cold: `ckdiff diff` against `cat` of the same files, paired, page cache dropped before each.

    python bench/out_of_core.py [--gib 4] [--rounds 7] [--fio] [--dir DIR] [--quick]

Dropping the caches needs root; without it the files must be larger than the memory (--gib).
With --fio the best of several fio runs (direct and buffered) says what the disk can do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from common import QUICK, ckdiff, make_pair, median, shell, table, timed


def drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        print("cannot drop caches: figures are cold only if the files exceed the memory")


def fio_best(files: list[Path]) -> tuple[float, str]:
    """(GB/s, how) of the best fio run over the files."""
    best = (0.0, "none")
    names = ":".join(map(str, files))
    for engine, jobs, depth, block, direct in (
        ("psync", 1, 1, "1M", 0), ("psync", 2, 1, "1M", 0), ("psync", 4, 1, "4M", 0),
        ("libaio", 1, 16, "1M", 1), ("libaio", 2, 16, "2M", 1), ("libaio", 4, 32, "2M", 1),
    ):  # fmt: skip
        drop_caches()
        command = ["fio", "--name=read", f"--filename={names}", "--rw=read", f"--bs={block}",
                   f"--ioengine={engine}", f"--numjobs={jobs}", f"--iodepth={depth}",
                   f"--direct={direct}", "--readonly", "--group_reporting", "--output-format=json",
                   f"--offset_increment={100 // jobs}%", f"--size={100 // jobs}%"]  # fmt: skip
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        speed = json.loads(text)["jobs"][0]["read"]["bw_bytes"] / 1e9
        how = f"{engine}, {jobs} jobs, depth {depth}, {block}, {'direct' if direct else 'buffered'}"
        print(f"fio {how}: {speed:.2f} GB/s", flush=True)
        best = max(best, (speed, how))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4, help="size of each side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where the pair goes; a real disk, not a tmpfs")
    parser.add_argument("--fio", action="store_true")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    gib, rounds = (QUICK, 1) if a.quick else (a.gib, a.rounds)
    drop = (lambda: None) if a.quick else drop_caches  # all that runs here would read again
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        make_pair(root, gib, 0.1)
        base, tuned, out = root / "base", root / "tuned", root / "masks.zarr"
        cat = timed(shell(f"cat {base}/*.safetensors {tuned}/*.safetensors > /dev/null"))
        command = ckdiff("diff", base, tuned, "--workers", "2", "--json", "-o", out)
        ours = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        ours()
        ratios, cats, walls = [], [], []
        for _ in range(rounds):
            shutil.rmtree(out)
            drop()
            cats.append(cat())
            drop()
            walls.append(ours())
            ratios.append(walls[-1] / cats[-1])
        size = 2 * gib * 2**30 / 1e9
        rows = [
            ["cold cat", f"{median(cats):.2f} s", f"{size / median(cats):.2f}"],
            [
                "ckdiff diff -o, whole command",
                f"{median(walls):.2f} s",
                f"{size / median(walls):.2f}",
            ],
        ]
        if a.fio:
            best, how = fio_best(sorted(root.glob("*/*.safetensors")))
            rows.append([f"fio at its best ({how})", "", f"{best:.2f}"])
    table(f"Cold, 2 x {gib:g} GiB, paired, median of {rounds}", ["what", "time", "GB/s"], rows)
    print(
        f"\nwall time of ckdiff / cat: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
