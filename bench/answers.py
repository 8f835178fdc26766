"""How long, how much memory, how large a delta, for models of four sizes: rates times bytes.

    python bench/answers.py [--gib 2] [--rounds 3] [--dir DIR] [--quick]

Rates are measured here, with the files in the page cache and one worker for each core; what a disk
gives is not: a diff takes as long as the slower of the two. Memory is the most that was seen.
Changed elements are one representable step away, as a small learning rate leaves them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from common import QUICK, ckdiff, make_pair, median, table, watch, watched_diff

MODELS = {"8B": 8.03e9, "70B": 70.6e9, "405B": 405.9e9, "671B": 671.0e9}  # elements
DISKS = (0.5, 3.0, 7.0)  # GB/s: a SATA disk or a network's, an NVMe disk, a fast one
DENSITIES = (0.01, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=2, help="size of each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where the pairs go (default: a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    gib, rounds = (QUICK, 1) if a.quick else (a.gib, a.rounds)
    side, workers = gib * 2**30, len(os.sched_getaffinity(0))
    rates, peaks = list[float](), list[int]()
    shares: dict[str, float] = {}  # of a side
    for density in DENSITIES[: 1 if a.quick else None]:
        with tempfile.TemporaryDirectory(dir=a.dir) as folder:
            root = Path(folder)
            make_pair(root, gib, density)
            for _ in range(rounds if a.quick else rounds + 1):  # the first one makes kernels
                run, result, out = watched_diff(root, "--overwrite", "-q", workers=workers)
                rates.append(result["bytes_read"] / result["seconds"] / 1e9)
                peaks.append(run.rss_anon)
            shares[f"masks, {100 * density:g} % changed"] = size_of(out) / side
            for encoding, name in (("packed", "delta"), ("xor", "weight version")):
                made = root / encoding
                command = ckdiff("delta", root / "base", root / "tuned", "-o", made)
                peaks.append(watch([*command, "--encoding", encoding, "-q"]).rss_anon)
                shares[f"{name}, {100 * density:g} % changed"] = size_of(made) / side
    rate = median(rates)
    rows = [["bytes to read: both sides, bf16", *(shown(4 * n) for n in MODELS.values())]]
    for disk in DISKS:
        times = (duration(4e-9 * n / min(disk, rate)) for n in MODELS.values())
        rows.append([f"diff, from a disk of {disk:g} GB/s", *times])
    times = (duration(4e-9 * n / rate) for n in MODELS.values())
    rows.append([f"diff, from memory, {rate:.1f} GB/s measured", *times])
    rows.append(["memory, the most seen", *[f"{max(peaks)} MiB"] * len(MODELS)])
    for what, share in shares.items():
        rows.append([what, *(shown(2 * n * share) for n in MODELS.values())])
    table(f"Computed from what 2 x {gib:g} GiB took with {workers} workers", ["", *MODELS], rows)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def shown(nbytes: float) -> str:
    """A size in units that are read at a glance."""
    for unit in ("MB", "GB"):
        nbytes /= 1000 if unit == "GB" else 1e6
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
    return f"{nbytes / 1000:.3g} TB"


def duration(seconds: float) -> str:
    """A time in units that are read at a glance."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
