"""All jobs, two at a time, each in a process with one thread; what is done is not done again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper.build import Build, read_json, write_json
from paper.work import Job, is_done

HERE = Path(__file__).resolve().parent
#: one thread a process: then no sum depends on how work was shared out
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class Mismatch(Exception):
    """What lies in a build folder is of another setting."""


def settle(build: Build, setting: dict[str, Any]) -> None:
    """Note what a build folder is for; a folder that is for something else is refused."""
    path = build.root / "setting.json"
    if path.exists():
        if read_json(path) != setting:
            raise Mismatch(f"{build.root} holds runs of another setting: give another --build")
    else:
        write_json(path, setting)


@dataclasses.dataclass
class Crew:
    """The processes at work."""

    build: Build
    limit: int
    say: Callable[[str], None]
    at_work: dict[str, tuple[subprocess.Popen[bytes], float]] = dataclasses.field(
        default_factory=dict
    )

    def start(self, job: Job) -> None:
        """Begin a job in a process of its own; what it prints goes into its log."""
        log = self.build.root / "logs" / f"{job.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE), "work", job.name, "--build", str(self.build.root)]
        environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.at_work[job.name] = process, time.monotonic()

    def ended(self) -> list[tuple[str, bool, float]]:
        """Those that ended: name, whether well, seconds. Waits for a moment."""
        found = []
        for name, (process, began) in list(self.at_work.items()):
            if process.poll() is not None:
                del self.at_work[name]
                found.append((name, process.returncode == 0, time.monotonic() - began))
        if not found:
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        """End what is still at work; it is taken up again by the same command."""
        for process, _ in self.at_work.values():
            process.terminate()
        for process, _ in self.at_work.values():
            process.wait()


def run_all(
    build: Build, jobs: list[Job], *, processes: int = 2, say: Callable[[str], None] = print
) -> list[str]:
    """Do all jobs that are not done; gives the names of those that failed or could not be begun."""
    done = {job.name for job in jobs if is_done(build, job)}
    left = [job for job in jobs if job.name not in done]
    failed: dict[str, str] = {}
    crew = Crew(build, processes, say)
    say(f"{len(jobs)} jobs, {len(done)} done already; logs are in {build.root / 'logs'}")
    say(f"{'':>9} {'job':34} {'seconds':>7}  accuracy and reward of the stored model, density")
    try:
        while left or crew.at_work:
            for job in list(left):
                lost = [name for name in job.needs if name in failed]
                if lost:
                    failed[job.name] = f"needs {lost[0]}"
                    left.remove(job)
                elif len(crew.at_work) < processes and done.issuperset(job.needs):
                    _forget(build, job)
                    crew.start(job)
                    left.remove(job)
            for name, well, seconds in crew.ended():
                well = well and build.result(name).exists()
                if well:
                    done.add(name)
                else:
                    failed[name] = "failed"
                count = f"{len(done):4}/{len(jobs):<4}"
                say(f"{count} {name:34} {seconds:7.0f}  {_line(build, name, well)}")
    finally:
        crew.stop()
    for name, why in failed.items():
        say(f"not done: {name} ({why}; see {build.root / 'logs' / name}.txt)")
    return list(failed)


def _forget(build: Build, job: Job) -> None:
    """A result that is of another run must not be taken for this one's."""
    build.result(job.name).unlink(missing_ok=True)


def _line(build: Build, name: str, well: bool) -> str:
    """What the table says of a job that ended."""
    if not well:
        return "FAILED"
    result = read_json(build.result(name))
    if "end" not in result:
        return ""
    start, end = result["start"]["stored"], result["end"]["stored"]
    density = result["measured"]["density"]["exact"]
    return (
        f"{start['accuracy']:.3f} {start['reward']:.3f} -> "
        f"{end['accuracy']:.3f} {end['reward']:.3f}  {density:.4f}"
    )


def compare(build: Build, results: Path, jobs: list[Job]) -> list[str]:
    """Hold these jobs against stored results: what differs, a line for each run."""
    asked = {job.name for job in jobs}
    found = []
    for path in sorted(results.glob("*.json")):
        stored, here = read_json(path), build.result(path.stem)
        if "measured" not in stored or path.stem not in asked:
            continue
        if not here.exists():
            found.append(f"{path.stem}: not run here")
            continue
        ours = read_json(here)
        if ours["run"] != stored["run"]:
            found.append(f"{path.stem}: another configuration")
        elif ours["measured"]["digest"] != stored["measured"]["digest"]:
            one, two = (each["end"]["stored"]["reward"] for each in (stored, ours))
            found.append(f"{path.stem}: other weights; reward {one:.4f} there, {two:.4f} here")
    return found
