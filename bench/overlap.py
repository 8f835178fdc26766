"""Overlap of mask stores against numpy, pyroaring, scikit-learn and the floor, in one run.

    python bench/overlap.py [--elements 1e9] [--rounds 5] [--stores 2 5 10] [--dir DIR] [--quick]

The floor decodes the same stored objects and adds up the bytes, on as many threads. numpy has the
packed masks in memory and counts every pair with bitwise_count; what loading them took is a row of
its own. pyroaring and scikit-learn (left out where not installed) work on a part, scaled up.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import bf16_noise, header, median, table, take_turns, timed, watch
from common import ckdiff as ckdiff_command
from numba import cfunc, types

import ckdiff
from ckdiff.kernels.codegen.words import load_word
from ckdiff.layout import Layout
from ckdiff.stores.maskwalk import walk
from ckdiff.stores.matching import match

PER = 1 << 26  # elements of a tensor
THREADS = 2


def write(folder: Path, tensors: int, per: int, data: list[npt.NDArray[np.uint16]]) -> Path:
    """A bf16 checkpoint of ``tensors`` matrices whose bits repeat those of ``data``."""
    folder.mkdir(parents=True)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(tensors)]
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header([(name, "BF16", (per // 4096, 4096)) for name in names])[0])
        for i in range(tensors):
            file.write(data[i % len(data)].data)
    return folder


def make_stores(root: Path, count: int, tensors: int, per: int, density: float) -> list[Path]:
    """Stores of runs that share half of what they change."""
    base = bf16_noise(per)
    write(root / "base", tensors, per, [base])
    rng = np.random.default_rng(1)
    draws = rng.random((2, per), dtype=np.float32)
    stores = []
    for i in range(count):
        common, own = draws[0], np.roll(draws[1], 12345 * i)
        changed = (common < density / 2) | (own < density / 2)
        tuned = [base + np.roll(changed, 64 * turn) for turn in range(2)]
        folder = write(root / "tuned", tensors, per, tuned)
        out = root / f"run{i}.zarr"
        ckdiff.diff(root / "base", folder, out)
        stores.append(out)
        shutil.rmtree(folder)
    return stores


def sum_words() -> Callable[[int, int], int]:
    def total(address: int, words: int) -> int:
        a = b = 0
        for i in range(0, words, 2):
            a += load_word(address + 8 * i)
            b += load_word(address + 8 * i + 8)
        return a + b

    return total


class Floor:
    """Decode what the overlap decodes, and look at every byte once."""

    def __init__(self, stores: list[Path]) -> None:
        matched = match(stores, least=1)
        self.layout: Layout = matched.layout
        self.starts, self.sources = matched.starts, matched.sources()
        self.total = cfunc(types.int64(types.int64, types.int64))(sum_words()).ctypes

    def __call__(self) -> None:
        chunks = iter(range(self.layout.chunks))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                for window in walk(
                    self.layout, self.starts, self.sources, *self.layout.chunk_range(chunk)
                ):
                    size = int(window.sizes.sum())
                    for place in window.places[:, 0].tolist():
                        self.total(window.memory[place:].ctypes.data, size // 8)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def numpy_pairs(packed: list[npt.NDArray[np.uint64]]) -> None:
    for a, b in itertools.combinations(packed, 2):
        # in slices that stay in cache: numpy's best
        for at in range(0, len(a), 1 << 15):
            part = slice(at, at + (1 << 15))
            int(np.bitwise_count(a[part] & b[part]).sum(dtype=np.int64))


def others(stores: list[Path], elements: int) -> list[tuple[str, float]]:
    """(name, seconds for all pairs, scaled up from a part) of packages that work on sets."""
    found: list[tuple[str, float]] = []
    opened = [ckdiff.open_store(store) for store in stores]
    name = opened[0].tensors[0].name
    part = min(1 << 22, opened[0].tensors[0].elements)
    masks = [store.mask(name, start=0, stop=part) for store in opened]
    pairs = list(itertools.combinations(range(len(stores)), 2))
    try:
        from pyroaring import BitMap
    except ImportError:
        pass
    else:
        began = time.perf_counter()
        sets = [BitMap(np.flatnonzero(mask).astype(np.uint32)) for mask in masks]
        built = time.perf_counter() - began
        began = time.perf_counter()
        for a, b in pairs:
            sets[a].intersection_cardinality(sets[b])
        took = time.perf_counter() - began
        found.append(("pyroaring, sets built before", took * elements / part))
        found.append(("pyroaring, building the sets", built * elements / part))
    try:
        from sklearn.metrics import jaccard_score
    except ImportError:
        pass
    else:
        began = time.perf_counter()
        jaccard_score(masks[0], masks[1])
        took = time.perf_counter() - began
        found.append(("sklearn jaccard_score", took * len(pairs) * elements / part))
    return found


def measure(stores: list[Path], base: Path, rounds: int, density: float) -> list[list[Any]]:
    count = len(stores)
    floor = Floor(stores)
    packed: list[npt.NDArray[np.uint64]] = []

    def load() -> None:
        packed.clear()
        packed.extend(ckdiff.open_store(s).array()[:].view(np.uint64) for s in stores)  # type: ignore[union-attr]

    def overlap(*nulls: str) -> Callable[[], object]:
        wanted: dict[str, Any] = {"nulls": nulls, "workers": THREADS, "by": "layer"}
        return lambda: ckdiff.overlap(stores, base=base, memory="1GiB", **wanted)

    load()
    contestants = {
        "the floor": timed(floor),
        "ckdiff overlap, null tensor": timed(overlap("tensor")),
        "numpy, packed masks in memory": timed(lambda: numpy_pairs(packed)),
        "numpy, loading the masks": timed(load),
    }
    for run in contestants.values():
        run()
    found = {name: median(s) for name, s in take_turns(contestants, rounds).items()}
    packed.clear()
    for null in ("magnitude", "rowcol"):
        found[f"ckdiff overlap, nulls tensor and {null}"] = timed(overlap("tensor", null))()
    elements = floor.layout.total
    found |= {f"{name} (part, scaled)": seconds for name, seconds in others(stores, elements)}
    read = count * elements / 8e9
    least = found["the floor"]
    return [
        [f"{density:g}", count, name, seconds, read / seconds, seconds / least]
        for name, seconds in found.items()
    ]


def memory(stores: list[Path], base: Path, elements: int) -> list[list[Any]]:
    """Peak memory of the command, by nulls."""
    rows = []
    for nulls in ([], ["magnitude"], ["rowcol"]):
        options = ["--base", base] if "magnitude" in nulls else []
        names = [word for null in ["tensor", *nulls] for word in ("--null", null)]
        run = watch(ckdiff_command("overlap", *stores, *names, *options, "--workers", "2"))
        what = ", ".join(["tensor", *nulls])
        rows.append([f"{elements:,}", len(stores), what, run.rss_anon, run.rss])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--stores", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where checkpoints and stores go")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    if a.quick:
        a.elements, a.stores, a.density, a.rounds = 1 << 20, [2, 3], [0.1], 1
    per = min(PER, int(a.elements))
    tensors = max(1, round(a.elements / per))
    rows = []
    peaks = []
    for density in a.density:
        with tempfile.TemporaryDirectory(dir=a.dir) as folder:
            root = Path(folder)
            stores = make_stores(root, max(a.stores), tensors, per, density)
            for count in a.stores:
                rows += measure(stores[:count], root / "base", a.rounds, density)
            if density == max(a.density):
                peaks += memory(stores, root / "base", tensors * per)
        if density == max(a.density) and tensors > 3:  # a quarter of the size needs as much
            with tempfile.TemporaryDirectory(dir=a.dir) as folder:
                root = Path(folder)
                stores = make_stores(root, max(a.stores), tensors // 4, per, density)
                peaks += memory(stores, root / "base", tensors // 4 * per)
    table(
        f"Overlap of masks of {tensors * per:,} elements, {THREADS} threads, median of {a.rounds}",
        ["density", "stores", "what", "s", "GB/s of mask", "time / floor"],
        [[*row[:3], f"{row[3]:.3f}", *row[4:]] for row in rows],
    )
    columns = ["elements", "stores", "nulls", "peak RssAnon MiB", "peak RSS MiB"]
    table("Memory of ckdiff overlap, 2 workers", columns, peaks)


if __name__ == "__main__":
    main()
