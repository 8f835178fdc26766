"""Floats as floats of another dtype, and quantised elements by value: ours, torch's and numpy's.

    python bench/casting.py [--rounds 9] [--quick]

One thread, on data that lies in a core's own cache. Each figure is bytes written a second. numpy's
is ml_dtypes' where numpy has no such dtype. For scales torch does what a reader of such files does:
both to float32, the scales repeated over their blocks, one product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from common import median, table, take_turns, timed

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.casting import narrow, widen
from ckdiff.kernels.scaling import Scaling, scale

CACHE = 1 << 18  # bytes of what is written
REPEAT = 200
Bytes = npt.NDArray[np.uint8]

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
}  # fmt: skip
NUMPY: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
WIDENED = [("BF16", "F32"), ("F16", "F32"), ("F8_E4M3", "F16"), ("F8_E4M3", "BF16"),
           ("F8_E4M3", "F32"), ("F8_E5M2", "F16"), ("F32", "F64")]  # fmt: skip
NARROWED = [("F32", "BF16"), ("F32", "F16"), ("F16", "BF16"), ("F64", "BF16"), ("F64", "F32"),
            ("F32", "F8_E4M3")]  # fmt: skip
#: what is scaled, and the rows and columns of a block
SCALED = {
    "F8_E4M3, 128 x 128": ("F8_E4M3", "F32", (128, 128)),
    "F8_E4M3, a row": ("F8_E4M3", "BF16", (1, 1024)),
    "I8, a column": ("I8", "F32", (64, 1)),
    "F8_E4M3, 32 in a row (MX)": ("F8_E4M3", "F8_E8M0", (1, 32)),
    "F4, 32 in a row (MX)": ("F4", "F8_E8M0", (1, 32)),
}


def weights(dtype: str, elements: int) -> Bytes:
    """N(0, 0.02) in a dtype."""
    noise = np.random.default_rng(0).standard_normal(elements) * 0.02
    held: Bytes = torch.from_numpy(noise).to(TORCH[dtype]).view(torch.uint8).numpy()
    return held


def casts(source: str, target: str) -> tuple[int, dict[str, Callable[[], object]]]:
    """Bytes written, and who writes them."""
    elements = CACHE * 8 // DTYPES[target].bits
    data, out = weights(source, elements), np.zeros(CACHE, np.uint8)
    function = widen if DTYPES[target].holds(DTYPES[source]) else narrow
    theirs = torch.from_numpy(data).view(TORCH[source])
    there = torch.from_numpy(np.zeros(CACHE, np.uint8)).view(TORCH[target])
    numbers, wanted = data.view(NUMPY[source]), np.zeros(CACHE, np.uint8).view(NUMPY[target])

    def by_numpy() -> None:
        np.copyto(wanted, numbers, casting="unsafe")

    by: dict[str, Callable[[], object]] = {
        "ours": lambda: function(data, source, target, out),
        "torch": lambda: there.copy_(theirs),
        "numpy": by_numpy,
    }
    for run in by.values():
        run()
    if (source, target) != ("F64", "BF16"):  # they go through F32 and round twice
        assert out.tobytes() == there.view(torch.uint8).numpy().tobytes()
        assert out.tobytes() == wanted.tobytes()
    return CACHE, by


def scalings(
    dtype: str, of: str, block: tuple[int, int]
) -> tuple[int, dict[str, Callable[[], object]]]:
    rows, columns = CACHE // 4 // 1024, 1024
    scaling = Scaling(dtype, of, rows, columns, block)
    rng = np.random.default_rng(1)
    data = rng.integers(0, 120, rows * columns * DTYPES[dtype].bits // 8, np.uint8)
    scales = weights(of, scaling.scales)
    if of == "F8_E8M0":
        scales = rng.integers(110, 130, scaling.scales, np.uint8)
    out = np.zeros(CACHE, np.uint8)
    by: dict[str, Callable[[], object]] = {"ours": lambda: scale(data, scaling, 0, scales, 0, out)}
    by["ours"]()
    if dtype != "F4":  # torch has no numbers of half a byte
        shape = -(-rows // block[0]), -(-columns // block[1])
        factors = torch.from_numpy(scales).view(TORCH[of]).view(shape)
        elements = torch.from_numpy(data).view(TORCH[dtype]).view(rows, columns)

        def by_torch() -> Any:
            wide = factors.float().repeat_interleave(block[0], 0)[:rows]
            return elements.float() * wide.repeat_interleave(block[1], 1)[:, :columns]

        assert out.tobytes() == by_torch().contiguous().view(torch.uint8).numpy().tobytes()
        by["torch"] = by_torch
    return CACHE, by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    rounds, repeat = (1, 1) if a.quick else (a.rounds, REPEAT)
    torch.set_num_threads(1)
    work = {f"{source} to {target}": casts(source, target) for source, target in WIDENED}
    work |= {f"{source} rounded to {target}": casts(source, target) for source, target in NARROWED}
    work |= {name: scalings(*how) for name, how in SCALED.items()}
    rows = []
    for name, (size, by) in work.items():

        def often(run: Callable[[], object]) -> Callable[[], None]:
            def repeated() -> None:
                for _ in range(repeat):
                    run()

            return repeated

        turns = {who: timed(often(run)) for who, run in by.items()}
        times = {who: median(seconds) for who, seconds in take_turns(turns, rounds).items()}
        ratios = [times[who] / times["ours"] if who in times else "" for who in ("torch", "numpy")]
        rows.append([name, size * repeat / times["ours"] / 1e9, *ratios])
    table(
        f"{CACHE >> 10} KiB written, one thread, median of {rounds}",
        ["what", "ours, GB/s written", "ours / torch", "ours / numpy"],
        rows,
    )


if __name__ == "__main__":
    main()
