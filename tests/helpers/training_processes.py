"""Several processes that train together, for the tests of sharded training.

Importing what they need takes seconds. So one process imports what all of them do, once for all
tests, and its copies import the rest and become several: each runs ``WORKER WHAT RANK PROCESSES
FOLDER``.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

from small_process import started

HERE = Path(__file__).parent
SECONDS = 300  # much more than it takes: other work may be beside
#: what all workers import, and what every optimizer does, the first time
SHARED = ("pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "training_support")


def run_together(worker: str, what: str, processes: int, folder: Path) -> None:
    """Run ``worker WHAT RANK PROCESSES FOLDER`` once for each rank; all must end well."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = [dict(os.environ) | _environment(), worker, what, str(processes), str(folder)]
    server.stdin.write(json.dumps(request).encode() + b"\n")
    server.stdin.flush()
    group = int(server.stdout.readline())
    ended, _, _ = select.select([server.stdout], [], [], SECONDS)
    if not ended:  # where one failed the others wait for it
        os.killpg(group, signal.SIGKILL)
    status = int(server.stdout.readline())
    logs = [folder / "together.log", *(folder / f"rank{rank}.log" for rank in range(processes))]
    said = [log.read_text(errors="replace")[-3000:] for log in logs if log.exists()]
    assert status == 0, "\n".join(said)


def _environment() -> dict[str, str]:
    return {
        "PYTHONPATH": str(HERE.parents[1]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


@cache
def _server() -> subprocess.Popen[bytes]:
    server = started(__file__, _environment(), bufsize=0)
    atexit.register(server.communicate)  # it ends where nobody asks any more
    return server


# in the server


def serve() -> None:
    """Copies of this process do what is asked for, one after the other."""
    replies = os.dup(1)
    os.dup2(2, 1)
    for module in SHARED:
        importlib.import_module(module)
    while request := sys.stdin.buffer.readline():
        environment, *arguments = json.loads(request)
        pid = os.fork()
        if pid == 0:
            os.close(replies)
            status = 1
            try:
                os.setsid()
                os.environ.clear()
                os.environ.update(environment)
                _into(Path(arguments[-1], "together.log"))
                status = together(*arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.write(replies, b"%d\n" % pid)
        os.write(replies, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _into(log: Path) -> None:
    with log.open("wb") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)


def together(worker: str, what: str, processes: str, folder: str) -> int:
    """Whether one of the processes failed."""
    importlib.import_module(worker.removesuffix(".py"))
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
    return int(any(process.exitcode for process in running))


def rank_(worker: str, arguments: list[str], log: Path) -> None:
    """One of the processes."""
    _into(log)
    sys.argv = [worker, *arguments]
    runpy.run_path(str(HERE / worker), run_name="__main__")


if __name__ == "__main__":
    serve()
