"""One and two worker processes of a Dask cluster against our own threads, in one run.

    python bench/cluster.py [--elements 1e9] [--stores 4] [--rounds 5] [--dir DIR] [--quick]

Both clusters are up and have their kernels loaded before the clock starts; their workers have one
thread each. Everything is in the page cache. Every result is held against that of one thread.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import make_pair, median, table, take_turns
from distributed import Client, LocalCluster
from overlap import PER, make_stores

import ckdiff

WORKERS = (1, 2)


def contestants(
    run: Callable[[Any, int], tuple[float, Any]], clients: dict[int, Client]
) -> dict[str, Callable[[], float]]:
    """Threads and clusters, each of as many workers; a wrong result ends the benchmark."""
    expected = run("threads", 1)[1]

    def measured(scheduler: Any, workers: int) -> Callable[[], float]:
        def measure() -> float:
            seconds, found = run(scheduler, workers)
            assert found == expected
            return seconds

        return measure

    found = {f"{n} threads": measured("threads", n) for n in clients}
    return found | {f"{n} workers": measured(client, n) for n, client in clients.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--stores", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    per = 1 << 20 if asked.quick else PER
    tensors = 2 if asked.quick else max(1, round(asked.elements / per))
    rounds = 1 if asked.quick else asked.rounds
    stores_wanted = 2 if asked.quick else asked.stores
    elements = tensors * per
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.dir)))
        stores = make_stores(root / "stores", stores_wanted, tensors, per, 0.1)
        make_pair(root / "pair", elements / 2**29, 0.1)
        clients = {}
        for workers in WORKERS[: 1 if asked.quick else None]:
            cluster = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0")
            )
            clients[workers] = stack.enter_context(Client(cluster, set_as_default=False))

        def overlap(scheduler: Any, workers: int) -> tuple[float, Any]:
            found = ckdiff.overlap(stores, scheduler=scheduler, workers=workers)
            return found.seconds, found.rows()

        def diff(scheduler: Any, workers: int) -> tuple[float, Any]:
            out = root / "masks.zarr"
            sides = root / "pair/base", root / "pair/tuned"
            found = ckdiff.diff(*sides, out, scheduler=scheduler, workers=workers)
            assert found.store is not None
            digest = found.store.manifest_digest()
            shutil.rmtree(out)
            return found.seconds, digest

        rows = []
        for name, run in (("overlap", overlap), ("diff", diff)):
            programs = contestants(run, clients)
            if not asked.quick:
                take_turns(programs, 1)  # kernels are loaded, files are cached
            seconds = {key: median(values) for key, values in take_turns(programs, rounds).items()}
            for key in programs:
                ratio = seconds[key.replace("2", "1")] / seconds[key]
                rows.append((name, key, round(seconds[key], 3), ratio))
    title = (
        f"{elements:.2e} elements at density 0.1: overlap of {stores_wanted} stores with the null "
        f"tensor, diff to a store; medians of {rounds}"
    )
    table(title, ("what", "on", "seconds", "times as fast as one"), rows)


if __name__ == "__main__":
    main()
