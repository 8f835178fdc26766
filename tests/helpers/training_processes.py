"""Several processes that train together, for the tests of sharded training.

``python training_processes.py WORKER WHAT PROCESSES FOLDER`` imports what a worker imports, which
takes seconds, and only then becomes several: each runs ``WORKER WHAT RANK PROCESSES FOLDER``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 300  # much more than it takes: other work may be beside


def run_together(worker: str, what: str, processes: int, folder: Path) -> None:
    """Run ``worker WHAT RANK PROCESSES FOLDER`` once for each rank; all must end well."""
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    command = [sys.executable, __file__, worker, what, str(processes), str(folder)]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = running.communicate(timeout=SECONDS)
    finally:
        if running.poll() is None:  # where one failed the others wait for it
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    said = [log.read_text(errors="replace")[-3000:] for log in logs if log.exists()]
    assert running.returncode == 0, "\n".join([out[-3000:], *said])


def rank_(worker: str, arguments: list[str], log: Path) -> None:
    """One of the processes."""
    with log.open("wb") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    sys.argv = [worker, *arguments]
    runpy.run_path(str(HERE / worker), run_name="__main__")


def main() -> None:
    worker, what, processes, folder = sys.argv[1:]
    importlib.import_module(worker.removesuffix(".py"))
    importlib.import_module("torch._dynamo")  # by every optimizer, the first time
    assert len(os.listdir("/proc/self/task")) == 1, "threads would be missing in the others"
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(
            target=rank_,
            args=(worker, [what, str(n), processes, folder], Path(folder, f"rank{n}.log")),
        )
        for n in range(int(processes))
    ]
    for process in running:
        process.start()
    left = list(running)
    while left and not any(process.exitcode for process in running):
        wait([process.sentinel for process in left])
        left = [process for process in left if process.exitcode is None]
    for process in left:  # they wait for the one that failed
        process.kill()
    sys.exit(any(process.exitcode for process in running))


if __name__ == "__main__":
    main()
