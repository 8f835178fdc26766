"""The shape of an update against decoding its masks, in one run.

    python bench/structure.py [--elements 1e9] [--rounds 5] [--density 0.1] [--dir DIR] [--quick]

Decoding is what any reader of the store has to do: the same stored objects, decoded and added up,
on as many threads. Matrices are of three shapes: of a common model, of a width that is no whole
number of words, and one that is much wider than a window.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import median, table, take_turns, timed
from overlap import Floor

import ckdiff
from ckdiff.layout import Layout, Spans
from ckdiff.stores.building import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.stores.table import IntArray

SHAPES = {
    "4096 x 4096": (4096, 4096),
    "5632 x 2880": (5632, 2880),
    "4001 x 5001": (4001, 5001),
    "128 x 1,572,864": (128, 1_572_864),
}


class Noise(Maker):
    """Random bits of one density, repeated: what they are does not matter, only how dense."""

    total = 1

    def __init__(self, density: float) -> None:
        rng = np.random.default_rng(0)
        flags = rng.random(1 << 26, dtype=np.float32) < density
        self._bits = np.packbits(flags, bitorder="little")

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        columns = spans.starts, spans.elements, spans.addresses
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (_, elements, address) in enumerate(rows):
            at, size = (address - first) // 8, -(-elements // 8)
            mask[at : at + size] = self._bits[:size]
            if elements % 8:
                mask[at + size - 1] &= (1 << elements % 8) - 1
            changed[row] = int(np.bitwise_count(mask[at : at + size]).sum())
        yield 0


def make_store(out: Path, shape: tuple[int, int], elements: int, density: float) -> Path:
    """A store of matrices of one shape, as many as it takes."""
    count = max(1, round(elements / (shape[0] * shape[1])))
    sizes = np.full(count, shape[0] * shape[1], np.int64)
    derived = Derived(
        [f"layers.{i}.weight" for i in range(count)], ["BF16"] * count, [shape] * count,
        Layout(sizes), [""] * count, "exact", {"operation": "benchmark"},
    )  # fmt: skip
    Target(out, overwrite=False, workers=None, observer=None).write(derived, Noise(density))
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.elements, asked.rounds = 2e7, 1
    rows = []
    with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
        for name, shape in SHAPES.items():
            if asked.quick and shape[1] > 1 << 20:
                continue
            store = make_store(Path(folder) / name, shape, int(asked.elements), asked.density)
            floor = Floor([store])
            ckdiff.structure(store)  # kernels are made
            times = take_turns(
                {
                    "decode": timed(floor),
                    "structure": timed(lambda store=store: ckdiff.structure(store)),
                },
                asked.rounds,
            )
            decode, structure = (median(times[key]) for key in ("decode", "structure"))
            rows.append([name, f"{decode:.3f}", f"{structure:.3f}", f"{structure / decode:.2f}"])
    threads = threading.active_count()
    assert threads == 1, "nothing is left behind"
    table(
        f"Structure of {asked.elements:.0e} elements, {100 * asked.density:.0f} % changed",
        ["matrices", "decode, s", "structure, s", "ratio"],
        rows,
    )


if __name__ == "__main__":
    main()
