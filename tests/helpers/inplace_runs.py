"""Changes in place in forked children that are killed, or run out of disk, at a chosen call."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import small_process
import weight_streams
from small_process import asked
from support import Tensor, write_safetensors
from weight_streams import Model

#: what a change in place does to the file system
CALLS = (
    "pwrite",
    "fsync",
    "fdatasync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "mkdir",
    "open",
    "write",
)


Work = Callable[[], object]  #: what is pickled: no closure, and nothing of a test's module


def ready(work: Work) -> None:
    """Do it once where nothing is killed: what it imports and loads, copies have."""
    _small().ask("ready", work)


def calls_of(work: Work, fresh: Callable[[], object] | None = None) -> int:
    """How many such calls ``work`` makes, in a child. With ``fresh``, which makes what it works on,
    it is ``ready`` before.
    """
    if fresh is not None:
        fresh()
        ready(work)
        fresh()
    code, count = _small().ask("calls", work)
    assert code == 0
    return count


def killed(work: Work, at: int, *, torn: bool = False) -> bool:
    """Run ``work`` in a child that dies at its ``at``-th call, or half way through a write; whether
    it did.
    """
    return _ended(_small().ask("die", work, at, torn))


def killed_after(work: Work, seconds: float) -> bool:
    """Run ``work`` in a child that is killed by the clock; whether it was."""
    return _ended(_small().ask("late", work, seconds))


def _ended(reply: tuple[int, int]) -> bool:
    assert reply[0] in (0, -signal.SIGKILL)
    return reply[0] != 0


@contextmanager
def full_disk(name: str) -> Iterator[None]:
    """No call of this name succeeds on this process' files."""
    real = getattr(os, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(os, name, fail)
    try:
        yield
    finally:
        setattr(os, name, real)


def bf16_model(tensors: int = 4, rows: int = 300, seed: int = 0) -> dict[str, Tensor]:
    """Matrices of several pages, and a scalar; one has an odd number of bytes."""
    rng = np.random.default_rng(seed)
    found: dict[str, Tensor] = {
        f"layers.{i}.weight": ("BF16", (rows, 64), rng.bytes(rows * 128)) for i in range(tensors)
    }
    found["odd"] = ("U8", (20_001,), rng.bytes(20_001))
    found["scalar"] = ("F32", (), rng.bytes(4))
    found["same"] = ("BF16", (64,), rng.bytes(128))
    return found


def stepped(model: Model, share: float, seed: int) -> dict[str, Tensor]:
    """Some bytes of all tensors but ``same`` are others."""
    rng, found = np.random.default_rng(seed), dict(model)
    for name, (dtype, shape, data) in model.items():
        if name == "same":
            continue
        changed = np.frombuffer(data, np.uint8).copy()
        places = np.flatnonzero(rng.random(len(changed)) < share)
        places = places if len(places) else np.zeros(1, np.int64)
        changed[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        found[name] = dtype, shape, changed.tobytes()
    return found


def write_local(folder: Path, model: Model, version: int | None = None) -> Path:
    """A local checkpoint in two files and an index, with what is not of it beside them."""
    folder.mkdir(parents=True)
    names = list(model)
    files = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, mine in files.items():
        write_safetensors(folder / file, {name: model[name] for name in mine})
    weight_map = {name: file for file, mine in files.items() for name in mine}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("mine")
    if version is not None:
        (folder / ".weight_sync").mkdir()
        write_marker(folder, version)
    return folder


def write_marker(local: Path, version: int) -> None:
    """As an engine does: aside, and renamed."""
    folder = local / ".weight_sync"
    (folder / "aside").write_text(json.dumps({"version": f"{version:06d}"}))
    (folder / "aside").rename(folder / "state.json")


def marker_of(local: Path) -> int | None:
    """What an engine takes the checkpoint for."""
    path = local / ".weight_sync" / "state.json"
    return int(json.loads(path.read_text())["version"]) if path.exists() else None


@contextmanager
def engine_lock(local: Path) -> Iterator[None]:
    """The lock as an engine takes it."""
    (local / ".weight_sync").mkdir(exist_ok=True)
    with open(local / ".weight_sync" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def engine_pull(local: Path, version: Path, number: int) -> None:
    """One delta, as an engine applies it: in place, the marker last."""
    with engine_lock(local):
        places = {}
        for path in sorted(local.glob("*.safetensors")):
            raw = path.read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            for name, entry in json.loads(raw[8:start]).items():
                if name != "__metadata__":
                    low, high = entry["data_offsets"]
                    places[name] = path, start + low, start + high, entry
        model = {
            name: (entry["dtype"], tuple(entry["shape"]), path.read_bytes()[low:high])
            for name, (path, low, high, entry) in places.items()
        }
        metadata = json.loads((version / "model.safetensors.index.json").read_text())["metadata"]
        weight_streams._apply(model, version, metadata)
        for name, (path, low, _, _) in places.items():
            with open(path, "r+b") as file:
                file.seek(low)
                file.write(model[name][2])
        write_marker(local, number)


# the process that is copied


class _Small:
    """The children are copies of this process."""

    def __init__(self) -> None:
        self._process = small_process.started(__file__)
        atexit.register(self.end)

    def ask(self, *request: Any) -> tuple[int, int]:
        """How a child ended, and how many calls it counted."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        code, count = pickle.load(self._process.stdout)
        return int(code), int(count)

    def end(self) -> None:
        """It ends where nobody asks any more."""
        self._process.communicate()


@cache
def _small() -> _Small:
    return _Small()


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _real.update(dict.fromkeys(("fsync", "fdatasync"), asked))
    os.fsync = os.fdatasync = asked  # type: ignore[assignment]
    while True:
        try:
            what, work, *how = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if what == "ready":
            work()
        reply = (0, 0) if what == "ready" else _child(what, work, *how)
        pickle.dump(reply, replies)
        replies.flush()


def _child(what: str, work: Work, at: float = 0, torn: bool = False) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if what == "die":
            count = _shim(lambda number: _die() if number == at else None, int(at) if torn else 0)
        else:
            count = [0] if what == "late" else _shim(lambda _: None)
        status = 1
        try:
            work()
            _real["write"](write, str(count[0]).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    if what == "late":
        time.sleep(at)
        os.kill(pid, signal.SIGKILL)
    with open(read, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(said or 0)


# in the child

_real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _shim(event: Callable[[int], None], torn: int = 0) -> list[int]:
    """Call ``event`` with the number of each call; of call ``torn`` half is written before."""
    count, lock = [0], threading.Lock()

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                count[0] += 1
                number = count[0]
                if number == torn and name == "pwrite":
                    fd, data, at = args
                    _real[name](fd, memoryview(data)[: len(data) // 2], at)
                event(number)
            return _real[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    return count


if __name__ == "__main__":
    _serve()
