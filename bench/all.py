"""Every benchmark, one after the other; `--quick` for a smoke run. shape70b takes minutes.

python bench/all.py [--quick]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    "casting",
    "codecs",
    "kernels",
    "mask_kernels",
    "many_tensors",
    "memory",
    "monitor",
    "diff",
    "overlap",
    "delta",
    "gpu",
    "hub",
    "cluster",
    "out_of_core",
    "publisher",
    "sparse_step",
    "structure",
    "report",
    "timeline",
    "shape70b",
)


def main() -> None:
    quick = ["--quick"] if "--quick" in sys.argv[1:] else []
    for name in PROGRAMS:
        if quick and name == "shape70b":
            continue
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), *quick]
        print(f"\n$ python bench/{name}.py {' '.join(quick)}", flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
