"""A timeline of a run against a diff of each two neighbours: speed, bytes read, memory.

python bench/timeline.py [--gib 0.5] [--checkpoints 10] [--density 0.01] [--rounds 5] [--quick]

Each checkpoint changes some of the weights of the one before it, most by a step and some back to
what they were. A timeline reads each checkpoint once, and compares it with the first and with the
one before; the diffs read all but two of them twice. Both write a mask for each step; those of a
timeline are denser, as changes add up. Seconds are those that the commands report, from opened
sources to what is in its place; CPU seconds are of the whole processes, their start included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import bf16_noise, ckdiff, header, median, table, watch

PER = 1 << 24  # elements of a tensor; all of a checkpoint have the same


def make_run(root: Path, gib: float, checkpoints: int, density: float) -> list[Path]:
    """Directories of bf16 checkpoints of ``gib`` GiB."""
    tensors, per = max(1, round(gib * 2**29 / PER)), PER
    if gib * 2**29 < PER:
        per = max(4096, round(gib * 2**29) // 4096 * 4096)
    rng = np.random.default_rng(2)
    first = bf16_noise(per)
    now, found = first.copy(), []
    names = [(f"model.layers.{t}.mlp.up_proj.weight", "BF16", (per // 4096, 4096))
             for t in range(tensors)]  # fmt: skip
    for i in range(checkpoints):
        if i:
            drawn: npt.NDArray[np.float32] = rng.random(per, dtype=np.float32)
            now = np.where(drawn < density, now + 1, now).astype(np.uint16)
            now = np.where(drawn > 1 - density / 10, first, now)
        folder = root / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        with open(folder / "model.safetensors", "wb") as file:
            file.write(header(names)[0])
            for t in range(len(names)):  # no two are tied
                file.write(np.uint16(t).tobytes() + now[1:].tobytes())
        found.append(folder)
    return found


class Contest:
    """Runs both, in turn; what they found is held against each other."""

    def __init__(self, root: Path, paths: list[Path], workers: int) -> None:
        self._root, self._paths, self._workers = root, paths, workers
        self.seconds: dict[str, list[float]] = {}
        self.busy: dict[str, list[float]] = {}  #: CPU seconds
        self.anon: dict[str, int] = {}
        self.read: dict[str, int] = {}

    def round(self) -> None:
        """Each once."""
        pairs = list(pairwise(self._paths))
        diffs = self._run("diffs of neighbours", [("diff", *pair) for pair in pairs])
        counts = [found["rules"]["exact"]["changed"] for found in diffs]
        for name, options in (("timeline", ("--no-first-moves",)), ("and first moves", ())):
            (found,) = self._run(name, [("timeline", *self._paths, *options)])
            steps = [step["changed_since_previous"] for step in found["steps"]]
            assert steps == counts, "both count the same"
        watch(ckdiff("timeline", *self._paths[:-1], "-o", self._root / "out", "--json"))
        self._run("one appended", [("timeline", *self._paths)])

    def _run(self, name: str, commands: Sequence[tuple[str | Path, ...]]) -> list[dict[str, Any]]:
        """Run commands one after the other; their JSON. What they took counts as one."""
        out, before = self._root / "out", _busy()
        every, anon = [], 0
        for command in commands:
            run = watch(ckdiff(*command, "-o", out, "--json", "--workers", str(self._workers)))
            every.append(json.loads(run.stdout))
            anon = max(anon, run.rss_anon)
            shutil.rmtree(out)
        self.busy.setdefault(name, []).append(_busy() - before)
        self.seconds.setdefault(name, []).append(sum(found["seconds"] for found in every))
        self.read[name] = sum(found["bytes_read"] for found in every)
        self.anon[name] = max(self.anon.get(name, 0), anon)
        return every


def _busy() -> float:
    """CPU seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=0.5, help="of a checkpoint")
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--density", type=float, default=0.01, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to make the checkpoints")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    if a.quick:
        a.gib, a.checkpoints, a.rounds = 0.002, 3, 1
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        paths = make_run(root, a.gib, a.checkpoints, a.density)
        weights = sum((path / "model.safetensors").stat().st_size for path in paths)
        contest = Contest(root, paths, a.workers)
        if not a.quick:
            contest.round()  # kernels are made, files are in the cache
            contest.seconds.clear()
            contest.busy.clear()
        for _ in range(a.rounds):
            contest.round()
    base, busy = (median(every["diffs of neighbours"]) for every in (contest.seconds, contest.busy))
    table(
        f"A run of {a.checkpoints} checkpoints of {a.gib} GiB of bf16, {a.density:g} of a step, "
        f"{a.workers} workers, median of {a.rounds}",
        ["what", "s", "x the diffs", "CPU s", "x", "read, of all checkpoints", "RssAnon, MiB"],
        [
            [
                name, median(seconds), base / median(seconds), median(contest.busy[name]),
                busy / median(contest.busy[name]),
                f"{contest.read[name] / weights:.3f}", contest.anon[name],
            ]
            for name, seconds in contest.seconds.items()
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
