"""Counting kernels over masks that lie in a core's own cache, one thread, against loading them.

    python bench/mask_kernels.py [--rounds 9] [--quick]

Each figure is bytes of mask of all stores together, a second. "loading" adds up the same bytes as
64-byte vectors and does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from common import median, table, take_turns, timed
from loading import loading
from numba import cfunc, types

from ckdiff.kernels.abi import SEG_SIZE, SEG_TARGET, SEGMENT_COLUMNS
from ckdiff.kernels.codegen.agree import ones_in_both
from ckdiff.kernels.compiled import c_function

CACHE = 1 << 20  # bytes of mask of all stores together
REPEAT = 400


def both() -> Callable[[int, int, int], int]:
    def count(one: int, other: int, size: int) -> int:
        return ones_in_both(one, other, size)  # type: ignore[no-any-return]

    return count


def kernel(
    name: str, kind: str, masks: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]
) -> Callable[[], None]:
    stores, size = masks.shape
    segment = np.zeros((1, SEGMENT_COLUMNS + stores), np.int64)
    segment[0, SEG_SIZE], segment[0, SEG_TARGET] = size, out.ctypes.data
    segment[0, SEGMENT_COLUMNS:] = [mask.ctypes.data for mask in masks]
    pairs = np.zeros(stores * (stores + 1) // 2, np.int64)
    votes, scratch = np.zeros(stores + 1, np.int64), np.zeros(2 * stores, np.int64)
    function = c_function(name, kind).ctypes

    def run() -> None:
        for _ in range(REPEAT):
            if name == "agree":
                function(
                    segment.ctypes.data, 1, stores, pairs.ctypes.data, votes.ctypes.data,
                    scratch.ctypes.data,
                )  # fmt: skip
            else:
                function(segment.ctypes.data, 1, stores, 2, votes.ctypes.data)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    rounds = 1 if a.quick else a.rounds
    total = loading()
    signature = types.int64(types.int64, types.int64, types.int64)
    intersect = cfunc(signature)(both()).ctypes
    rng = np.random.default_rng(0)
    rows = []
    for stores in (2, 5, 10, 64):
        size = CACHE // stores // 512 * 512
        masks = np.packbits(rng.random((stores, size * 8)) < 0.1, axis=1, bitorder="little")
        out = np.zeros(size, np.uint8)
        planes = str(stores.bit_length())

        def load(masks: npt.NDArray[np.uint8] = masks) -> None:
            for _ in range(REPEAT):
                total(masks.ctypes.data, masks.size)

        runs = {
            "loading": load,
            "agree: all pairs and votes": kernel("agree", planes, masks, out),
            "combine: at least 2": kernel("combine", f"at-least:{planes}", masks, out),
        }
        if stores == 2:

            def count(masks: npt.NDArray[np.uint8] = masks) -> None:
                for _ in range(REPEAT):
                    intersect(masks[0].ctypes.data, masks[1].ctypes.data, masks.shape[1])

            runs["population count of A and B"] = count
            runs["combine: difference"] = kernel("combine", "difference", masks, out)
        for run in runs.values():
            run()
        times = take_turns({name: timed(run) for name, run in runs.items()}, rounds)
        floor = median(times["loading"])
        for name, seconds in times.items():
            speed = masks.size * REPEAT / median(seconds) / 1e9
            rows.append([stores, name, speed, floor / median(seconds)])
    table(
        f"Masks of {CACHE >> 10} KiB together, one thread, median of {rounds}",
        ["stores", "what", "GB/s of mask", "speed / loading"],
        rows,
    )


if __name__ == "__main__":
    main()
