"""Encoding masks: size and speed of the codecs a Zarr reader has, on 64 KiB inner chunks.

python bench/codecs.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import zstandard
from common import median, table

from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.objects import INNER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    inners, rounds = (4, 1) if a.quick else (64, 7)
    encoder = MaskEncoder()
    codecs: dict[str, Callable[[np.ndarray], int]] = {
        "ckdiff": lambda inner: len(encoder.encode(inner))
    }
    for level in (-1, 1, 3):
        zstd = zstandard.ZstdCompressor(level=level, write_checksum=True)
        codecs[f"zstd level {level}"] = lambda inner, zstd=zstd: len(zstd.compress(inner.data))
    rows = []
    for density in (0.001, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 0.9):
        rng = np.random.default_rng(0)
        mask = np.packbits(rng.random(inners * INNER * 8, dtype=np.float32) < density)
        for name, encode in codecs.items():
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                size = sum(encode(mask[i : i + INNER]) for i in range(0, len(mask), INNER))
                times.append(time.perf_counter() - began)
            speed = len(mask) / median(times) / 1e6
            rows.append([f"{density:g}", name, f"{size / len(mask):.3f}", f"{speed:.0f}"])
    table("Random masks", ["density", "codec", "size / packed", "MB/s of mask, one core"], rows)


if __name__ == "__main__":
    main()
