"""Reports of 300 and of 90,000 tensors: time, size, and in Chromium first paint and filtering.

python bench/report.py [--quick]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ckdiff, header, median, table, watch

KINDS = ("gate_proj", "up_proj", "down_proj")
NAMES = ("chromium", "chromium-browser", "google-chrome")


def make(root: Path, layers: int, experts: int) -> int:
    """Two checkpoints of a mixture of experts, of which each tensor is tiny; how many tensors."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
        for layer in range(layers)
        for expert in range(experts)
        for kind in KINDS
    ]
    head, _, _ = header([(name, "BF16", (8, 8)) for name in names])
    rng = np.random.default_rng(0)
    data = rng.integers(0x3C00, 0x3F80, len(names) * 64, dtype=np.uint16)
    for side in ("base", "tuned"):
        (root / side).mkdir(parents=True)
        if side == "tuned":
            data[rng.random(data.size) < 0.1] ^= 1
        (root / side / "model.safetensors").write_bytes(head + data.tobytes())
    return len(names)


def in_browser(page: Path) -> tuple[float, float] | None:
    """Milliseconds to the first paint, and of one filtering; None where there is no Chromium."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if browser is None:
        return None
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page()
        tab.goto(page.as_uri())
        tab.wait_for_selector("#every-tensor[data-ready]", timeout=60_000)
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        filtering = """() => {
            const box = document.getElementById("filter");
            box.value = "layers.1. up";
            const began = performance.now();
            box.dispatchEvent(new Event("input"));
            document.getElementById("every-tensor").getBoundingClientRect();
            return performance.now() - began;
        }"""
        found: Any = tab.evaluate(paint), median([tab.evaluate(filtering) for _ in range(5)])
        chromium.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    sizes, rounds = ([(4, 2)], 1) if a.quick else ([(10, 10), (60, 500)], 5)
    rows: list[list[object]] = []
    for layers, experts in sizes:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            count = make(root, layers, experts)
            store, page = root / "run.zarr", root / "report.html"
            watch(ckdiff("diff", root / "base", root / "tuned", "-o", store))
            command = ckdiff("report", store, "-o", page)
            began = time.perf_counter()
            watch(command)  # keeps the drawing library, if this is the first report here
            first = time.perf_counter() - began
            runs = [watch(command) for _ in range(rounds)]
            size = page.stat().st_size / 1e6
            seen = in_browser(page)
            rows.append(
                [
                    f"{count:,}",
                    f"{first:.2f}",
                    f"{median([run.seconds for run in runs]):.2f}",
                    f"{max(run.rss_anon for run in runs)}",
                    f"{size:.2f}",
                    *(("", "") if seen is None else (f"{ms:.0f}" for ms in seen)),
                ]
            )
    heads = ["tensors", "the first, s", "s", "RssAnon MiB", "MB", "first paint ms", "filter ms"]
    table("A report of one store", heads, rows)


if __name__ == "__main__":
    main()
