"""Deltas between two checkpoints: ckdiff against what else makes them, and against the floor.

    python bench/delta.py [--gib 1] [--density 0.1 0.01] [--kind steps rl] [--rounds 1]
                          [--only TOOL ...] [--python PYTHON ...] [--dir DIR] [--json] [--quick]

Each pair is two bf16 checkpoints of --gib GiB, weights drawn from N(0, 0.02), never repeating.
"steps" changes elements anywhere: half of them by one representable step, half by
1 + geometric(1/2), either way. "rl" adds an update of equal size everywhere to float32 weights and
rounds both.
Every delta is applied and what comes out is compared with the tuned side, byte for byte.

The floor is the empirical entropy of the positions and steps, once given nothing and once given the
binade of the base. Tools are taken from the first --python that has them; one that is in none is
named with how to install it. Two processes or threads each.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Watched, ckdiff, machine, median, table
from delta_pair import KINDS, Floor, floor, same_tensors, write_pair
from delta_rivals import REMINIS, RIVALS, WORKERS

HERE = Path(__file__).parent
OURS = ("packed", "indices")
Command = Sequence[str | Path]


class Failed(Exception):
    """A tool that did not do it."""


@dataclass(frozen=True)
class Places:
    """Where a tool finds and puts things; all but base and tuned are removed after each turn."""

    base: Path
    tuned: Path
    delta: Path
    out: Path
    spare: Path


@dataclass(frozen=True)
class Tool:
    """A contestant as commands; ``before`` and ``after`` are timed apart from the rest."""

    title: str
    create: Callable[[Places], list[Command]]
    apply: Callable[[Places], list[Command]]
    before: Callable[[Places], list[Command]] = lambda _: []
    after: Callable[[Places], list[Command]] = lambda _: []


def ours(encoding: str) -> Tool:
    workers = ("--workers", str(WORKERS))
    return Tool(
        f"ckdiff, {encoding}",
        lambda p: [
            ckdiff("delta", p.base, p.tuned, "-o", p.delta, "--encoding", encoding, *workers)
        ],
        lambda p: [ckdiff("apply", p.base, p.delta, "-o", p.out, *workers)],
    )


def rival(key: str, python: str) -> Tool:
    program: list[str | Path] = [python, HERE / "delta_rivals.py", key]
    return Tool(
        RIVALS[key].title,
        lambda p: [[*program, "create", p.base, p.tuned, p.delta]],
        lambda p: [[*program, "apply", p.base, p.delta, p.out]],
    )


def reminis(python: str) -> Tool:
    """It works on databases, so checkpoints are converted first and the result is exported last."""
    program: list[str | Path] = [python, "-c", "from reminis.cli import main; main()"]
    return Tool(
        "reminis",
        lambda p: [
            [*program, "diff", p.spare / "base.db", p.spare / "tuned.db", "-o", p.delta, "-q"]
        ],
        lambda p: [
            [*program, "apply", p.spare / "base.db", p.delta, "-o", p.spare / "out.db", "-q"]
        ],
        lambda p: [
            [*program, "convert", p.base, "-o", p.spare / "base.db", "-q"],
            [*program, "convert", p.tuned, "-o", p.spare / "tuned.db", "-q"],
        ],
        lambda p: [
            ["mkdir", p.out],
            [*program, "export", p.spare / "out.db", "-o", p.out / "model.safetensors", "-q"],
        ],
    )


def copying() -> Tool:
    """No delta at all: what reading both sides and writing one of them take here at least."""
    return Tool(
        "no delta: cat both; cp and sync",
        lambda p: [
            ["sh", "-c", f"cat {p.base}/* {p.tuned}/* > /dev/null && cp -rl {p.tuned} {p.delta}"]
        ],
        lambda p: [["sh", "-c", f"cp -r {p.tuned} {p.out} && sync {p.out}/*"]],
    )


def having(module: str, pythons: Sequence[str]) -> str | None:
    """The first interpreter that can import a module."""
    for python in pythons:
        found = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
        if not subprocess.run([python, "-c", found]).returncode:
            return python
    return None


def tools(only: Sequence[str], pythons: Sequence[str]) -> tuple[dict[str, Tool], list[str]]:
    """(the contestants that are here, a line for each that is not)."""
    there = {encoding: ours(encoding) for encoding in OURS} | {"copy": copying()}
    missing = []
    for key, known in {"reminis": REMINIS, **RIVALS}.items():
        python = having(known.module, pythons) if known.module else pythons[0]
        if python and (shutil.which(known.program) if known.program else True):
            there[key] = reminis(python) if key == "reminis" else rival(key, python)
        elif not only or key in only:
            missing.append(f"{known.title}: not installed: {known.install}")
    return {key: tool for key, tool in there.items() if not only or key in only}, missing


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    found = [process]
    for member in found:
        try:
            for task in os.scandir(f"/proc/{member}/task"):
                found += map(int, Path(task.path, "children").read_text().split())
        except OSError:  # it ended meanwhile
            continue
    return found


def memory(process: int) -> tuple[int, int]:
    """(RssAnon, RSS) of a process in KiB; zeros once it has ended."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0])
    except OSError:
        pass
    return found["RssAnon"], found["VmRSS"]


def watch_family(command: Command, limit: float, interval: float = 0.01) -> Watched:
    """`common.watch` for a command that starts others: the peak of all of them together."""
    anon = rss = 0
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            list(map(str, command)), stdout=said, stderr=said, start_new_session=True
        )
        stop = threading.Event()

        def sample() -> None:
            nonlocal anon, rss
            while not stop.wait(interval):
                each = [memory(member) for member in family(process.pid)]
                anon = max(anon, sum(a for a, _ in each))
                rss = max(rss, sum(r for _, r in each))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            process.wait(limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failed(f"stopped after {limit:.0f} s") from None
            raise
        finally:
            stop.set()
            sampler.join()
        seconds = time.perf_counter() - began
        said.seek(0)
        text = said.read().strip()
    if process.returncode:
        raise Failed(text.splitlines()[-1] if text else f"exit code {process.returncode}")
    return Watched(seconds, text, anon // 1024, rss // 1024)


@dataclass
class Stage:
    """Commands that ran one after the other."""

    seconds: float = 0.0
    rss_anon: int = 0  #: MiB, peak of all processes together
    rss: int = 0

    def run(self, commands: list[Command], limit: float) -> None:
        for command in commands:
            os.sync()  # so that nobody pays for what others have written
            ran = watch_family(command, limit)
            self.seconds += ran.seconds
            self.rss_anon = max(self.rss_anon, ran.rss_anon)
            self.rss = max(self.rss, ran.rss)


@dataclass
class Turn:
    """What one tool did with one pair, once."""

    create: Stage
    apply: Stage
    around: float  #: seconds of `before` and `after`
    size: int
    rebuilt: str


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def verdict(tuned: Path, out: Path) -> str:
    """What of the tuned side came out bit for bit."""
    shards = sorted(tuned.glob("*.safetensors"))
    if all((out / f.name).exists() and filecmp.cmp(f, out / f.name, False) for f in shards):
        return "files"
    return "tensors" if same_tensors(tuned, out) else "NOT EXACT"


def turn(tool: Tool, root: Path, limit: float) -> Turn:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        spare = Path(folder)
        places = Places(root / "base", root / "tuned", spare / "delta", spare / "out", spare)
        create, apply, around = Stage(), Stage(), Stage()
        around.run(tool.before(places), limit)
        create.run(tool.create(places), limit)
        apply.run(tool.apply(places), limit)
        around.run(tool.after(places), limit)
        rebuilt = verdict(places.tuned, places.out)
        return Turn(create, apply, around.seconds, size_of(places.delta), rebuilt)


def compete(
    contestants: dict[str, Tool], root: Path, rounds: int, limit: float
) -> dict[str, list[Turn] | str]:
    """Each tool's turns, in turn; of one that fails, what it said."""
    done: dict[str, list[Turn] | str] = {}
    for _ in range(rounds):
        for key, tool in contestants.items():
            before = done.setdefault(key, [])
            if isinstance(before, str):
                continue
            try:
                before.append(turn(tool, root, limit))
            except Failed as error:
                if key in OURS:
                    raise SystemExit(f"{tool.title}: {error}") from None
                done[key] = str(error)
                print(f"{tool.title}: {error}", file=sys.stderr, flush=True)
    return done


def middle(turns: list[Turn]) -> dict[str, Any]:
    """The medians of a tool's turns."""
    stages = {
        name: {
            "seconds": median([getattr(t, name).seconds for t in turns]),
            "rss_anon_mib": max(getattr(t, name).rss_anon for t in turns),
            "rss_mib": max(getattr(t, name).rss for t in turns),
        }
        for name in ("create", "apply")
    }
    rebuilt = {t.rebuilt for t in turns}
    return {
        **stages,
        "around_seconds": median([t.around for t in turns]),
        "bytes": median([t.size for t in turns]),
        "rebuilt": rebuilt.pop() if len(rebuilt) == 1 else "NOT EXACT",
    }


def warm(contestants: dict[str, Tool], a: argparse.Namespace) -> None:
    """Have ckdiff compile its kernels, once and for all, before anything is timed."""
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        write_pair(root, 1 / 64, 0.1, "rl", WORKERS)
        compete({key: contestants[key] for key in OURS if key in contestants}, root, 1, a.limit)


COLUMNS = [
    "tool", "MB", "size ×", "above floor", "create s", "×", "apply s", "×",
    "RssAnon MiB, create / apply", "exact",
]  # fmt: skip


def ratio(value: float, ours: float | None) -> str:
    return f"{value / ours:.2f}" if ours else ""


def row(title: str, got: dict[str, Any], us: dict[str, Any] | None, low: float) -> list[object]:
    cells: list[object] = [
        title,
        got["bytes"] / 1e6,
        ratio(got["bytes"], us and us["bytes"]),
        f"{got['bytes'] / low - 1:.1%}",
    ]
    for stage in ("create", "apply"):
        seconds = got[stage]["seconds"]
        cells += [seconds, ratio(seconds, us and us[stage]["seconds"])]
    peaks = [got[stage]["rss_anon_mib"] for stage in ("create", "apply")]
    return [*cells, f"{peaks[0]} / {peaks[1]}", got["rebuilt"]]


def describe(low: Floor) -> None:
    """The floor in words, under the table it belongs to."""
    print(f"\n{low.changed:,} of {low.elements:,} elements differ, {low.one_step:.1%} by one step.")
    print("\n| floor, MB | positions | steps | together |\n|---|---|---|---|")
    for name, where, by, both in (
        ("given nothing", low.positions, low.steps, low.plain),
        ("given the base's binade", low.positions_given, low.steps_given, low.given),
    ):
        print(f"| {name} | {where / 1e6:.2f} | {by / 1e6:.2f} | {both / 1e6:.2f} |")


def one_pair(a: argparse.Namespace, kind: str, density: float) -> dict[str, Any]:
    """Make a pair, let all compete, print (unless --json) and give what was found."""
    contestants, missing = tools(a.only, a.python)
    if not a.quick:
        warm(contestants, a)
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        write_pair(root, a.gib, density, kind, WORKERS)
        side = size_of(root / "tuned")
        low = floor(root / "base", root / "tuned")
        done = compete(contestants, root, a.rounds, a.limit)
    found = {key: middle(turns) for key, turns in done.items() if not isinstance(turns, str)}
    failed = {key: text for key, text in done.items() if isinstance(text, str)}
    if not a.json:
        what = "updates of equal size, rounded" if kind == "rl" else "steps of changed elements"
        times = f"median of {a.rounds}" if a.rounds > 1 else "once"
        table(
            f"Deltas, 2 x {a.gib:g} GiB bf16, density {density:g}, {what}, {times}",
            COLUMNS,
            [
                row(contestants[key].title, got, found.get("packed"), low.given)
                for key, got in found.items()
            ],
        )
        for key, text in failed.items():
            print(f"\n{contestants[key].title}: failed: {text}")
        for line in missing:
            print(f"\n{line}")
        describe(low)
        sys.stdout.flush()
    entropy = {**dataclasses.asdict(low), "plain": low.plain, "given": low.given}
    return {
        "kind": kind, "density": density, "gib": a.gib, "bytes_a_side": side, "floor": entropy,
        "tools": found, "failed": failed, "missing": missing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=1.0, help="size of a side")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=1)
    choices = [*OURS, "copy", "reminis", *RIVALS]
    parser.add_argument("--only", nargs="+", choices=choices, default=[])
    default = os.environ.get("CKDIFF_BENCH_PYTHON", "").split(os.pathsep)
    parser.add_argument(
        "--python",
        nargs="+",
        default=[sys.executable, *filter(None, default)],
        help="interpreters that may have the rivals (or CKDIFF_BENCH_PYTHON)",
    )
    parser.add_argument("--limit", type=float, default=1800, help="seconds a command may take")
    parser.add_argument("--dir")
    parser.add_argument("--json", action="store_true", help="print JSON and no tables")
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    if a.quick:
        a.gib, a.density, a.only = 1 / 64, a.density[:1], a.only or ["packed", "indices", "xor1"]
    if a.only and (missing := tools(a.only, a.python)[1]):
        print("\n".join(missing))
        return
    pairs = [one_pair(a, kind, density) for kind in a.kind for density in a.density]
    if a.json:
        print(json.dumps({"machine": machine(), "pairs": pairs}, indent=1))


if __name__ == "__main__":
    main()
