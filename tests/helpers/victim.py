"""Diffs in processes that may be killed, starved, interrupted or lied to.

A ``ForkServer`` imports everything and compiles the kernels once; each ``Case`` then runs in a
forked child of it, which costs milliseconds instead of seconds. What is to go wrong in the child
is part of the case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from small_process import asked, started

#: what a run does to the file system on its way to a store, in words of the ``os`` module
CALLS = ("open", "write", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
#: the step that is no function of ``os``: exchanging two directories
EXCHANGE = "exchange"


@dataclass
class Shim:
    """What happens at the ``at``-th of the ``calls`` (counted from 1 over all threads).

    ``do``: "kill" (kill -9 instead of the call), "torn" (half of a write, then kill -9), "pause"
    (that many ``seconds``), or an errno name that is raised.
    """

    at: int
    do: str = "kill"
    calls: tuple[str, ...] = (*CALLS, EXCHANGE)
    where: str = ""  #: only calls on paths that end like this
    onwards: bool = False  #: not only at that call but at every one from there
    seconds: float = 0.0


@dataclass
class Meddling:
    """Changes a source file at the ``at``-th time that a reader gets to ``moment``; "wait" only
    waits, at each of them.

    ``moment``: "acquired" (a window was populated, no kernel has read it), "releasing" (the
    kernels are done, nothing is verified), "released".
    """

    path: str
    action: str  #: "truncate", "rewrite", "unlink", "replace", "wait"
    at: int = 1
    moment: str = "acquired"
    size: int = 0  #: for truncate
    offset: int = 0  #: for rewrite
    keep_times: bool = False  #: put the modification time back afterwards
    other: str = ""  #: for replace: a file that is renamed to ``path``
    seconds: float = 0.0  #: for wait


@dataclass
class Case:
    """One diff in a child."""

    base: str
    tuned: str
    out: str | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"workers": 1})
    shim: Shim | None = None
    meddling: Meddling | None = None
    file_size: int | None = None  #: ``ulimit -f`` in bytes
    user: int | None = None  #: effective user
    no_exchange: bool = False  #: as on a file system without RENAME_EXCHANGE
    no_populate: bool = False  #: as on a kernel before 5.14
    blind: bool = False  #: the identity of files never shows that they changed
    start_at: float = 0.0  #: wait for this time.time(), to start several at once
    linger: float = 0.0  #: seconds between an error and the end of the process


@dataclass
class Outcome:
    """How a child ended."""

    signal: int  #: 0 if it ended by itself
    report: dict[str, Any]  #: what it had to say; empty if it was killed

    @property
    def ok(self) -> bool:
        """Whether the diff was finished."""
        return bool(self.report.get("ok"))

    @property
    def error(self) -> str:
        """Class of the CkdiffError it raised; anything else it raised fails here."""
        assert "trace" not in self.report, self.report["trace"]
        return str(self.report.get("error", ""))

    @property
    def message(self) -> str:
        """Message and hint of the error."""
        return f"{self.report['message']} ({self.report['hint']})"

    def changed(self, rule: str = "exact") -> int:
        """Changed elements of the model."""
        assert self.ok, self
        return int(self.report["rules"][rule]["changed"])


class ForkServer:
    """Starts cases; a context manager. One thread at a time may use it."""

    def __init__(self) -> None:
        self._process = started(__file__, text=True)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, case: Case) -> int:
        """The process id of a child that runs the case."""
        return int(self._ask({"start": dataclasses.asdict(case)})["pid"])

    def wait(self, pid: int) -> Outcome:
        """How that child ended."""
        reply = self._ask({"wait": pid})
        return Outcome(reply["signal"], reply["report"])

    def run(self, case: Case) -> Outcome:
        """Run the case to its end."""
        return self.wait(self.start(case))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the fork server has died; what it said is in the captured output"
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply


# in the server


def _serve() -> None:
    os.fsync = asked  # type: ignore[assignment]
    _warm_up()
    pipes: dict[int, int] = {}
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            with open(pipes.pop(pid), "rb") as pipe:
                said = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            reply: dict[str, Any] = {
                "signal": max(0, -status),
                "report": json.loads(said) if said else {},
            }
        else:
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                _child(request["start"], write)
            os.close(write)
            pipes[pid] = read
            reply = {"pid": pid}
        print(json.dumps(reply), flush=True)


def _warm_up() -> None:
    from support import write_safetensors

    import ckdiff

    with tempfile.TemporaryDirectory() as folder:
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
            name: (name, (64,), bytes(64 * size)) for name, size in (("U8", 1), ("BF16", 2))
        }
        tensors["F4"] = ("F4", (64,), bytes(32))
        path = write_safetensors(Path(folder, "base.safetensors"), tensors)
        for out in (None, Path(folder, "out.zarr")):
            ckdiff.diff(path, path, out, workers=1)
            ckdiff.diff(path, path, None, workers=1, stats=True, rules=["exact", "atol=1e-5"])


def _child(request: dict[str, Any], pipe: int) -> None:
    """Run one case, say how it went, and end without any clean-up of Python's."""
    counter = _Counter()
    report: dict[str, Any] = {"error": "KeyboardInterrupt"}  # should one come before all others
    write = os.write  # the real one
    shim, meddling = request.pop("shim"), request.pop("meddling")
    case = Case(**request)
    try:
        case.shim = None if shim is None else Shim(**shim)
        case.meddling = None if meddling is None else Meddling(**meddling)
        report = _run(case, counter)
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(case.linger)
        from ckdiff import CkdiffError

        report = {"error": type(error).__name__}
        if isinstance(error, CkdiffError):
            report |= {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        else:
            report["trace"] = traceback.format_exc()
    finally:
        from ckdiff.kernels import guard

        report |= {"calls": counter.value, "faults": guard.faults(), "users": guard._users}
        write(pipe, json.dumps(report).encode())
        os._exit(0)


def _run(case: Case, counter: _Counter) -> dict[str, Any]:
    import ckdiff
    from ckdiff.checkpoints.places.openfile import OpenFile
    from ckdiff.kernels import guard

    guard._table[0] = 0
    if case.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, resource.RLIM_INFINITY))
    if case.user is not None:
        os.seteuid(case.user)
    if case.no_exchange:
        from ckdiff.outputs import placing

        placing._exchange = lambda one, other: False
    if case.no_populate:
        from ckdiff.checkpoints.places import mapped

        mapped._POPULATE_READ = 9999
    if case.meddling is not None:
        _meddle(case.meddling)
    if case.blind:
        OpenFile.check = OpenFile.check_path = lambda self: None  # type: ignore[method-assign]
    if case.shim is not None:
        _put_shims(case.shim, counter)
    notes: list[str] = []
    from ckdiff.options import Observer

    time.sleep(max(0.0, case.start_at - time.time()))
    fds = len(os.listdir("/proc/self/fd"))
    result = ckdiff.diff(
        case.base, case.tuned, case.out, **case.options, observer=Observer(note=notes.append)
    )
    return {
        "ok": True,
        "rules": result.rules,
        "notes": notes,
        "leaked": len(os.listdir("/proc/self/fd")) - fds,
    }


class _Counter:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def next(self) -> int:
        with self._lock:
            self.value += 1
            return self.value


def _put_shims(shim: Shim, counter: _Counter) -> None:
    from ckdiff.outputs import placing

    for name in CALLS:
        if name in shim.calls:
            setattr(os, name, _shimmed(name, getattr(os, name), shim, counter))
    if EXCHANGE in shim.calls:
        placing._exchange = _shimmed(EXCHANGE, placing._exchange, shim, counter)


def _shimmed(
    name: str, call: Callable[..., Any], shim: Shim, counter: _Counter
) -> Callable[..., Any]:
    def shimmed(*arguments: Any, **named: Any) -> Any:
        if not any(str(argument).endswith(shim.where) for argument in arguments):
            return call(*arguments, **named)
        now = counter.next()
        if now == shim.at or (shim.onwards and now > shim.at):
            if shim.do == "torn" and name == "write":
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if shim.do in ("kill", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # it may arrive in another thread
            elif shim.do == "pause":
                time.sleep(shim.seconds)
            else:
                number = getattr(errno, shim.do)
                first = arguments[0]
                raise OSError(number, os.strerror(number), None if type(first) is int else first)
        return call(*arguments, **named)

    return shimmed


def _meddle(meddling: Meddling) -> None:
    from ckdiff.checkpoints.places.local import LocalPlace

    make = LocalPlace.reader
    counter = _Counter()

    def event(moment: str) -> None:
        if moment != meddling.moment:
            return
        if meddling.action == "wait":
            time.sleep(meddling.seconds)
        elif counter.next() == meddling.at:
            _change(meddling)

    class Reader:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def acquire(self, *spans: Any) -> Any:
            addresses = self._inner.acquire(*spans)
            event("acquired")
            return addresses

        def release(self) -> None:
            event("releasing")
            self._inner.release()
            event("released")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    LocalPlace.reader = lambda self: Reader(make(self))  # type: ignore[method-assign]


def _change(meddling: Meddling) -> None:
    before = os.stat(meddling.path)
    if meddling.action == "truncate":
        os.truncate(meddling.path, meddling.size)
    elif meddling.action == "rewrite":
        fd = os.open(meddling.path, os.O_RDWR)
        old = os.pread(fd, 16, meddling.offset)
        os.pwrite(fd, bytes(255 - byte for byte in old), meddling.offset)
        os.close(fd)
    elif meddling.action == "unlink":
        os.unlink(meddling.path)
    else:
        os.rename(meddling.other, meddling.path)
    if meddling.keep_times:
        os.utime(meddling.path, ns=(before.st_atime_ns, before.st_mtime_ns))


if __name__ == "__main__":
    _serve()
