"""What the benchmarks share: making checkpoints, watching memory, taking turns, saying where."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

QUICK = 1 / 256  # GiB of a side in smoke runs
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
COLUMNS = 4096
PER_TENSOR = 1 << 25  # elements of a large matrix: 64 MiB of bf16


def version_options(*, gib: float, changed: str, rounds: int) -> argparse.ArgumentParser:
    """What the benchmarks of weight versions can be told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=gib)
    parser.add_argument("--changed", default=changed, help="per cent, with commas between")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--encoding", choices=["xor", "overwrite"], default="xor")
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    return parser


def tensors_of(options: argparse.Namespace) -> tuple[int, int, list[float]]:
    """Of such options: how many matrices, elements of each, and shares that change."""
    if options.quick:
        options.gib, options.changed, options.rounds = 1 / 64, "1", 1
    count = max(2, round(options.gib * 2**30 / (2 * PER_TENSOR)))
    each = int(options.gib * 2**29 / count) // COLUMNS * COLUMNS
    return count, each, [float(text) / 100 for text in options.changed.split(",")]


def percent(share: float) -> str:
    """As tables have it."""
    return f"{100 * share:.2f} %"


def machine() -> str:
    """The machine and the day, for the head of every table."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    day = datetime.date.today().isoformat()
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {system}, {day}"


def header(tensors: Sequence[Tensor]) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """(bytes of a safetensors header, name -> (first byte, last byte) in the file, file size)."""
    entries: dict[str, Any] = {}
    at = 0
    spans = {}
    for name, dtype, shape in tensors:
        size = WIDTH[dtype] * int(np.prod(shape, dtype=object))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        spans[name] = at, at + size
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    where = {name: (start + a, start + b) for name, (a, b) in spans.items()}
    return struct.pack("<Q", len(text)) + text, where, start + at


def write_index(folder: Path, shards: dict[str, Sequence[Tensor]]) -> None:
    """``model.safetensors.index.json`` for shard file -> its tensors."""
    weight_map = {name: file for file, tensors in shards.items() for name, _, _ in tensors}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def bf16_noise(elements: int, seed: int = 0) -> npt.NDArray[np.uint16]:
    """bfloat16 bits of N(0, 0.02): what weights look like."""
    values = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def changed(
    base: npt.NDArray[np.uint16], share: float, kind: str, seed: int
) -> npt.NDArray[np.uint16]:
    """A share of the elements changed: ``steps`` of one unit in the last place, or ``any`` bits."""
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(len(base), dtype=np.float32) < np.float32(share))
    tuned = base.copy()
    if kind == "any":
        tuned[places] ^= rng.integers(1, 1 << 16, len(places), dtype=np.uint16)
    else:
        tuned[places] += rng.choice(np.array([1, 0xFFFF], np.uint16), len(places))
    return tuned


def make_pair(
    root: Path, gib: float, density: float, *, shards: int = 4, per: int = 1 << 26
) -> int:
    """A bf16 pair of ``gib`` GiB a side under root/base and root/tuned; gives changed elements.

    Tensors hold the same ``per`` random elements over and over, or there is a smaller one: random
    enough for any compressor that looks back less than 8 MiB of mask, and quick to make.
    """
    per = min(per, max(1, round(gib * 2**29) // COLUMNS) * COLUMNS)
    tensors = max(1, round(gib * 2**29 / per))
    rng = np.random.default_rng(1)
    base = bf16_noise(per)
    change = rng.random(per, dtype=np.float32) < density
    tuned = base + change
    each = -(-tensors // shards)
    names = [f"model.layers.{t}.mlp.up_proj.weight" for t in range(tensors)]
    for side, data in (("base", base), ("tuned", tuned)):
        folder = root / side
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Sequence[Tensor]] = {}
        for s in range(0, tensors, each):
            file = f"model-{s // each + 1:05d}.safetensors"
            files[file] = [
                (name, "BF16", (per // COLUMNS, COLUMNS)) for name in names[s : s + each]
            ]
            head, _, _ = header(files[file])
            with open(folder / file, "wb") as f:
                f.write(head)
                for _ in files[file]:
                    f.write(data.data)
        write_index(folder, files)
    return int(change.sum()) * tensors


@dataclass
class Watched:
    """A finished command and the most memory it had."""

    seconds: float
    stdout: str
    rss_anon: int  #: MiB, peak seen
    rss: int  #: MiB, peak
    probed: int = 0  #: the largest that the caller's own probe gave


def watch(
    command: Sequence[str], *, interval: float = 0.005, probe: Callable[[int], int] | None = None
) -> Watched:
    """Run a command, sampling /proc/PID/status for peak RssAnon and RSS; it must succeed.

    ``probe`` is called with the process's id as often.
    """
    peaks = {"RssAnon": 0, "VmHWM": 0}
    probed = [0]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def sample() -> None:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in text.splitlines():
                key, _, value = line.partition(":")
                if key in peaks and value:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
            if probe is not None:
                probed.append(probe(process.pid))
            time.sleep(interval)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - began
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    anon, most = peaks["RssAnon"] // 1024, peaks["VmHWM"] // 1024
    return Watched(seconds, out, anon, most, max(probed))


def ckdiff(*arguments: str | Path) -> list[str]:
    """The ckdiff command of this interpreter."""
    return [sys.executable, "-m", "ckdiff", *map(str, arguments)]


def watched_diff(
    root: Path, *options: str, workers: int = 2
) -> tuple[Watched, dict[str, Any], Path]:
    """`ckdiff diff -o` of root/base and root/tuned: (the run, its JSON, the store it wrote)."""
    out = root / "masks.zarr"
    where = (root / "base", root / "tuned", "-o", out)
    run = watch(ckdiff("diff", *where, "--json", "--workers", str(workers), *options))
    return run, json.loads(run.stdout), out


def take_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each contestant once a round, in turn; each gives its seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(run())
    return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """``run`` as a contestant measured by the wall clock."""

    def measure() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return measure


def shell(command: str) -> Callable[[], object]:
    """A shell command as something to time."""
    return lambda: subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table under its title; and the machine's name, but for all.py's page."""
    print(f"\n**{title}**\n")
    if "CKDIFF_BENCH_PAGE" not in os.environ:
        print(f"{machine()}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row) + " |")
    sys.stdout.flush()
