"""Publishing from a process: versions made of tensors in memory, the snapshot advanced.

    python bench/publisher.py [--gib 1] [--changed 1,2,5] [--rounds 5] [--workers N] [--dir DIR]
                              [--encoding xor] [--json] [--quick]

Beside it, in the same run: the same by whoever has no snapshot, which is ``write_version`` of the
same two sides in memory; a copy of the model by numpy on one thread, which anybody needs who keeps
the values of a step; and the processor's time, as other work may be on the machine. GB/s are of
model. ``call`` is what a step waits with ``background=True``, the rest is brought to the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from common import (
    COLUMNS,
    bf16_noise,
    changed,
    median,
    percent,
    table,
    tensors_of,
    version_options,
)

from ckdiff.deltas.versions.writing import write_version
from ckdiff.sync import Publisher

Bits = npt.NDArray[np.uint16]


def state(data: list[Bits]) -> dict[str, Any]:
    """As a process has its weights."""
    return {
        f"layers.{i}.weight": bits.view(ml_dtypes.bfloat16).reshape(-1, COLUMNS)
        for i, bits in enumerate(data)
    }


def measured(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - used


def run(root: Path, base: list[Bits], share: float, options: argparse.Namespace) -> dict[str, Any]:
    """One density."""
    # each step goes from one of these to the other
    two = [[changed(b, share / 2, "steps", 100 * k + i) for i, b in enumerate(base)]
           for k in range(2)]  # fmt: skip
    copies = [np.empty_like(bits) for bits in base]
    seconds: dict[str, list[float]] = {}
    said: dict[str, Any] = {}

    def note(name: str, what: Callable[[], object]) -> None:
        wall, used = measured(what)
        seconds.setdefault(name, []).append(wall)
        seconds.setdefault(f"{name}, processor", []).append(used)

    with tempfile.TemporaryDirectory(dir=root) as folder:
        settings: dict[str, Any] = {"encoding": options.encoding, "workers": options.workers}
        with (
            Publisher(f"{folder}/here", state(two[0]), **settings) as here,
            Publisher(f"{folder}/thread", state(two[0]), background=True, **settings) as thread,
        ):
            here.publish(state(base))  # what is made only once is made
            here.publish(state(two[0]))
            for i in range(options.rounds):
                old, new = state(two[i % 2]), state(two[1 - i % 2])

                def publish(new: dict[str, Any] = new) -> None:
                    said["here"] = here.publish(new)

                def publish_aside(new: dict[str, Any] = new) -> None:
                    thread.publish(new)

                note("publish", publish)
                note("call", publish_aside)
                note("rest", thread.wait)
                stream = f"{folder}/plain{i}"

                def plain(old: Any = old, new: Any = new, stream: str = stream) -> None:
                    write_version(old, new, stream, **settings)

                note("write_version", plain)
                note("copy", lambda: [np.copyto(a, b) for a, b in zip(copies, base, strict=True)])
    found = said["here"]
    return {
        "changed": share,
        "density": found.density,
        "bytes": sum(bits.nbytes for bits in base),
        "size": found.bytes,
        "seconds": {name: median(values) for name, values in seconds.items()},
    }


def main() -> None:
    options = version_options(gib=1, changed="1,2,5", rounds=5).parse_args()
    count, each, shares = tensors_of(options)
    base = [bf16_noise(each, seed) for seed in range(count)]
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        rows = [run(Path(folder), base, share, options) for share in shares]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    names = ["publish", "call", "rest", "write_version", "copy"]
    cells = []
    for row in rows:
        rates = [row["bytes"] / row["seconds"][name] / 1e9 for name in names]
        used = row["bytes"] / row["seconds"]["publish, processor"] / 1e9
        cells.append([percent(row["density"]), *rates, used, percent(row["size"] / row["bytes"])])
    title = (
        f"Publishing {options.gib:g} GiB of bf16 from memory, {options.encoding}, "
        f"{options.workers} threads; GB/s of model, medians of {options.rounds}"
    )
    table(title, ["changed", *names, "publish, a second of a core", "size"], cells)


if __name__ == "__main__":
    main()
