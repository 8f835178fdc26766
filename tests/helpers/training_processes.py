"""Several processes that train together, for the tests of sharded training."""

from __future__ import annotations

import os
import subprocess
import sys
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
    running = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, HERE / worker, what, str(rank), str(processes), folder]
            with log.open("wb") as output:
                running.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=subprocess.STDOUT, env=environment
                    )
                )
        codes = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:  # where one failed the others wait for it
            process.kill()
            process.wait()
    said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert codes == [0] * processes, said
