"""Warm cache: ckdiff beside `cat`, chunked numpy and torch, all in one run, in turn.

    python bench/diff.py [--gib 4] [--density 0.1] [--rounds 5] [--dir DIR] [--quick]

`engine` is `seconds` of the JSON; everything else is the wall time of a whole command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import QUICK, ckdiff, make_pair, median, shell, table, take_turns, timed
from rivals import RIVALS

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=4, help="size of each side")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the pair goes (default: a temporary directory)")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    gib, rounds = (QUICK, 1) if a.quick else (a.gib, a.rounds)
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        changed = make_pair(root, gib, a.density)
        base, tuned, out = root / "base", root / "tuned", root / "masks.zarr"
        seconds: dict[str, list[float]] = {
            "engine": [],
            "engine, no store": [],
            "engine, two rules": [],
        }

        def ours(name: str, *options: str | Path) -> Callable[[], float]:
            def run() -> float:
                shutil.rmtree(out, ignore_errors=True)
                command = ckdiff("diff", base, tuned, "--workers", "2", "--json", *options)
                began = time.perf_counter()
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                wall = time.perf_counter() - began
                result = json.loads(text)
                assert result["rules"]["exact"]["changed"] == changed, "WRONG COUNT"
                seconds[name].append(result["seconds"])
                return wall

            return run

        def rival(kind: str) -> Callable[[], object]:
            command = [sys.executable, str(HERE / "rivals.py"), kind, str(base), str(tuned)]

            def run() -> None:
                if a.quick:  # all they import is there
                    text = str(RIVALS[kind](str(base), str(tuned)))
                else:
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    text = done.stdout
                assert int(text) == changed, f"{kind} counted {text}, not {changed}"

            return run

        contestants = {
            "cat base/* tuned/* > /dev/null": timed(
                shell(f"cat {base}/*.safetensors {tuned}/*.safetensors > /dev/null")
            ),
            "ckdiff diff -o": ours("engine", "-o", out),
            "ckdiff diff": ours("engine, no store"),
            "ckdiff diff -o, exact and atol=1e-5": ours(
                "engine, two rules", "-o", out, "--rule", "exact", "--rule", "atol=1e-5"
            ),
            "numpy, chunked, count only": timed(rival("numpy")),
            "torch exact, count only": timed(rival("torch")),
            "torch exact + isclose, count only": timed(rival("isclose")),
        }
        for warm in ("cat base/* tuned/* > /dev/null", "ckdiff diff -o, exact and atol=1e-5"):
            if not a.quick:
                contestants[warm]()  # page cache and kernel cache, not counted
        seconds = {name: [] for name in seconds}
        slow = {
            "torch exact + isclose, count only": contestants.pop(
                "torch exact + isclose, count only"
            )
        }
        walls = take_turns(contestants, rounds) | take_turns(slow, 1)  # a minute or more: once
    cat = median(walls["cat base/* tuned/* > /dev/null"])
    size = 2 * gib * 2**30 / 1e9
    rows = [
        [name, f"{median(t):.2f}", f"{size / median(t):.2f}", f"{cat / median(t):.2f}"]
        for name, t in {**seconds, **walls}.items()
    ]
    table(
        f"2 x {gib:g} GiB bf16, density {a.density:g}, warm, 2 workers, "
        f"median of {rounds}; isclose once",
        ["what", "s", "GB/s", "speed / cat"],
        rows,
    )
    exact = median(walls["torch exact, count only"]) / median(walls["ckdiff diff -o"])
    two = median(walls["torch exact + isclose, count only"]) / median(
        walls["ckdiff diff -o, exact and atol=1e-5"]
    )
    print(
        f"\nwhole command against torch exact: {exact:.1f}x; "
        f"against exact + isclose, two rules: {two:.1f}x"
    )


if __name__ == "__main__":
    main()
