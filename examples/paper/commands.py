"""What the subcommands do."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paper import work as working
from paper.build import Build, read_json, write_json
from paper.runs import of
from paper.schedule import Mismatch, compare, run_all, settle

if TYPE_CHECKING:
    from paper.train import Setting

#: what is smaller in the matrix for tests
SMALL: dict[str, Any] = {"scale": "tiny", "often": 64, "ends": 128, "pool": 128}
SMALL_RECIPE = {"steps": 200, "batch": 64, "lr": 5e-3, "warmup": 20, "seed": 0}
USUAL: dict[str, Any] = {"often": 512, "ends": 4096, "pool": 4096}
USUAL_RECIPE = {"steps": 600, "batch": 256, "lr": 2e-3, "warmup": 50, "seed": 0}


def say(text: str) -> None:
    print(text, flush=True)


def run(options: argparse.Namespace) -> int:
    """Do all jobs; then hold them against stored results, where asked to."""
    jobs = working.jobs_of(options.matrix, options.only)
    if options.list:
        for job in jobs:
            say(job.name)
        return 0
    build = Build(options.build.resolve())
    small = options.matrix == "small"
    setting = {
        "matrix": options.matrix,
        "device": options.device,
        **({"scale": options.scale, **USUAL} if not small else SMALL),
        "recipe": SMALL_RECIPE if small else USUAL_RECIPE,
    }
    try:
        settle(build, setting)
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes are stopped too
    try:
        failed = run_all(build, jobs, processes=options.processes, say=say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    differing = compare(build, options.compare, jobs) if options.compare else []
    for line in differing:
        say(f"differs: {line}")
    if options.compare and not differing:
        say(f"the same masks, bit for bit, as in {options.compare}")
    return 1 if failed or differing else 0


def setting_of(build: Build) -> Setting:
    """What a build folder is for."""
    from paper.base import Recipe
    from paper.train import Setting

    stored = read_json(build.root / "setting.json")
    return Setting(build, **{**stored, "recipe": Recipe(**stored["recipe"])})


def work(options: argparse.Namespace) -> int:
    """Do one job of the matrix that the build folder is for."""
    build = Build(options.build.resolve())
    setting = setting_of(build)
    found = [each for each in working.jobs_of(setting.matrix) if each.name == options.job]
    if not found:
        print(f"error: no job is called {options.job}: see run --list", file=sys.stderr)
        return 2
    # where a scheduler was killed its processes go on: the next one waits for them
    with working.alone(build, options.job):
        if options.job == working.AGREEMENT or not working.is_done(build, found[0]):
            working.work(setting, found[0])
    return 0


def check_trl(options: argparse.Namespace) -> int:
    """Train SFT, DPO, KTO and GRPO with TRL too, and hold them against ours, which must be done."""
    from paper.trl_check import NAME, ROWS, check_all

    build = Build(options.build.resolve())
    lost = [name for name in ROWS if not build.result(of(name, "main").name).exists()]
    if lost:
        only = of(lost[0], "main").name
        print(f"error: {only} is not done: run --only {only} first", file=sys.stderr)
        return 2
    write_json(build.result(NAME), check_all(setting_of(build), say))
    return 0


def collect(options: argparse.Namespace) -> int:
    """Copy results, and the masks of the main runs, to where they are kept."""
    import ckdiff

    build = Build(options.build.resolve())
    masks: Path = options.to / "masks"
    masks.mkdir(parents=True, exist_ok=True)
    for path in sorted((build.root / "results").glob("*.json")):
        shutil.copyfile(path, options.to / path.name)
        result = read_json(path)
        if result.get("run", {}).get("group") == "main":
            out = masks / f"{path.stem}.safetensors"
            store = build.store(path.stem)
            ckdiff.export_masks(store, out, packed=True, rule="exact", overwrite=True)
    shutil.copyfile(build.root / "setting.json", options.to / "setting.json")
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the page and its figures."""
    from paper.report import write_report

    write_report(options.results, options.out)
    return 0
