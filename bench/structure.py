"""The shape of an update against decoding its masks, and its spectrum against the decompositions.

    python bench/structure.py [--elements 1e9] [--rounds 5] [--density 0.1] [--side 1024]
                              [--dir DIR] [--quick]

Decoding is what any reader of the store has to do: the same stored objects, decoded and added up,
on as many threads. Matrices are of three shapes: of a common model, of a width that is no whole
number of words, and one that is much wider than a window. The decompositions are numpy's, of the
same differences, which are in memory already.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line has it

import numpy as np
from common import bf16_noise, header, median, table, take_turns, timed
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
    """Random bits of one density, for tensors of so many elements, repeated: what they are does not
    matter, only how dense.
    """

    total = 1

    def __init__(self, density: float, elements: int) -> None:
        rng = np.random.default_rng(0)
        flags = rng.random(elements, dtype=np.float32) < density
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
    Target(out, overwrite=False, workers=None, observer=None).write(
        derived, Noise(density, shape[0] * shape[1])
    )
    return out


def spectra(folder: Path, side: int, rounds: int) -> None:
    """Spectrum of four bf16 matrices against their singular values."""
    names = [f"layers.{i}.weight" for i in range(4)]
    bits = [bf16_noise(side * side, seed) for seed in range(8)]
    paths = []
    for k in range(2):
        path = folder / f"{k}.safetensors"
        head = header([(name, "BF16", (side, side)) for name in names])[0]
        path.write_bytes(head + b"".join(b.tobytes() for b in bits[4 * k : 4 * k + 4]))
        paths.append(path)
    values = [(b.astype(np.uint32) << 16).view(np.float32).reshape(side, side) for b in bits]
    deltas = [values[i + 4] - values[i] for i in range(4)]

    def decompose() -> None:
        for delta in deltas:
            np.linalg.svd(delta, compute_uv=False)

    found = take_turns(
        {
            "svd": timed(decompose),
            "spectrum": timed(lambda: ckdiff.spectrum(*paths, all=True)),
        },
        rounds,
    )
    svd, ours = median(found["svd"]), median(found["spectrum"])
    table(
        f"Spectrum of four {side} x {side} matrices",
        ["singular values alone, s", "spectrum, s", "ratio"],
        [[f"{svd:.2f}", f"{ours:.2f}", f"{ours / svd:.2f}"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.elements, asked.rounds, asked.side = 2e7, 1, 256
    rows: list[list[str]] = []
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
    table(
        f"Structure of {asked.elements:.0e} elements, {100 * asked.density:.0f} % changed",
        ["matrices", "decode, s", "structure, s", "ratio"],
        rows,
    )
    with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
        spectra(Path(folder), asked.side, asked.rounds)


if __name__ == "__main__":
    main()
