"""Diffs and overlaps on Dask clusters: the same results, and what happens when processes die.

Schedulers and workers are real processes on the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_pairs import files_of, write_sparse
from cli_support import error, ok
from distributed import Client, LocalCluster

import ckdiff
from ckdiff import errors
from ckdiff.errors import (
    CkdiffError,
    ClusterError,
    Interrupted,
    SourceChanged,
    StoreCorrupt,
    UsageError,
)
from ckdiff.layout import CHUNK
from ckdiff.options import Observer, Progress
from ckdiff.overlaps.task import OverlapRecipe
from ckdiff.running import dask as daskrun
from ckdiff.running import remote
from ckdiff.stores.objects import INNER, ObjectWriter

ROOT = Path(__file__).parents[2]
#: where a worker finds what tests define
PATHS = f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests' / 'helpers'}"
TENSORS = {
    "model.embed.weight": ("BF16", (4096, 25000)),
    "model.layers.0.norm.weight": ("BF16", (1000,)),
    "model.layers.1.up.weight": ("BF16", (6500, 16384)),
}
RULES = ["exact", "atol=1e-5"]
NULLS = ["tensor", "magnitude", "rowcol", "model"]


class Cluster:
    """A scheduler and worker processes that nobody starts again."""

    def __init__(self, folder: Path, workers: int, **environment: str) -> None:
        self._folder = folder
        self._environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        folder.mkdir()
        address = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard", "--no-show",
            f"--scheduler-file={address}",
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not (address.exists() and address.stat().st_size):
            assert time.monotonic() < deadline
            assert self.scheduler.poll() is None
            time.sleep(0.05)
        self.address = json.loads(address.read_text())["address"]
        self.workers: list[subprocess.Popen[bytes]] = []
        self.have(workers)

    def have(self, workers: int) -> None:
        """So many workers, which live, whatever became of those that were there."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for worker in self.workers[workers:]:
            worker.kill()
            worker.wait()
        self.workers = self.workers[:workers]
        while len(self.workers) < workers:
            self.add()
        deadline = time.monotonic() + 30
        with Client(self.address, set_as_default=False) as client:
            while len(client.scheduler_info(n_workers=-1)["workers"]) != workers:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self._folder / f"log-{len(self.processes)}", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments],
                cwd=self._folder, env=self._environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def add(self) -> None:
        worker = self._start(
            "worker", self.address, "--no-nanny", "--nthreads=1", "--no-dashboard",
            "--host=127.0.0.1", f"--local-directory={self._folder}",
        )  # fmt: skip
        self.workers.append(worker)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster_of(folder: Path, workers: int, **environment: str) -> Iterator[Cluster]:
    cluster = Cluster(folder, workers, **environment)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("cluster") / "work", 2) as found:
        yield found


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler for tests that kill workers; it knows what is defined here."""
    with cluster_of(tmp_path_factory.mktemp("mortal") / "work", 0, PYTHONPATH=PATHS) as found:
        yield found


class Model:
    """Checkpoints of four chunks, nearly all zeros, and what a run here makes of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = self.side("base", 0, b"\x80\x3c")
        self.tuned = [self.side(f"tuned{i}", i + 1, b"\xc0\x3d") for i in range(3)]
        self.stores = [root / f"run{i}.zarr" for i in range(3)]
        for tuned, store in zip(self.tuned, self.stores, strict=True):
            ckdiff.diff(self.base, tuned, store, rules=RULES, stats=True, scheduler="threads")
        self.local = self.overlap(scheduler="threads")

    def side(self, name: str, seed: int, value: bytes) -> Path:
        rng = np.random.default_rng(seed)
        common = np.random.default_rng(99)
        written = {}
        for tensor, (_, shape) in TENSORS.items():
            size = int(np.prod(shape))
            places = {0, size - 1, *rng.integers(0, size, 500).tolist()}
            places |= set(common.integers(0, size, 300).tolist())
            written[tensor] = [(2 * place, value) for place in sorted(places)]
        return write_sparse(self.root / name / "model.safetensors", TENSORS, written).parent

    def diff(self, out: Path | None, **more: Any) -> ckdiff.DiffResult:
        return ckdiff.diff(self.base, self.tuned[0], out, rules=RULES, stats=True, **more)

    def overlap(self, **more: Any) -> dict[str, Any]:
        found = ckdiff.overlap(self.stores, nulls=NULLS, base=self.base, by="tensor", **more)
        return found.to_dict() | {"seconds": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    found = Model(tmp_path_factory.mktemp("model"))
    assert sum(int(np.prod(shape)) for _, shape in TENSORS.values()) > 3 * CHUNK
    return found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daskrun, "_PATIENCE", 2.0)
    monkeypatch.setattr(daskrun, "_CONNECTING", 1.5)
    monkeypatch.setattr(daskrun, "_LOOK", 0.3)


def once(action: Callable[[], object]) -> Observer:
    """Acts when the first chunk is done."""
    acted = False

    def progress(state: Progress) -> None:
        nonlocal acted
        if state.done and not acted:
            acted = True
            action()

    return Observer(progress=progress)


# the same whatever runs it


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cluster_says_and_writes_what_a_run_here_does(
    model: Model, mortal: Cluster, tmp_path: Path, workers: int
) -> None:
    mortal.have(workers)
    address = mortal.address
    result = model.diff(tmp_path / "run.zarr", scheduler=address)
    assert files_of(tmp_path / "run.zarr") == files_of(model.stores[0])
    assert result.rules == ckdiff.open_store(model.stores[0]).summary("model")[0]["rules"]
    assert model.overlap(scheduler=address) == model.local
    assert model.diff(None, scheduler=address).rules == result.rules  # nothing is stored
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def test_an_active_client_is_used(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    submit = daskrun._submit
    monkeypatch.setattr(daskrun, "_submit", lambda *all: used.append(1) or submit(*all))
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", host="127.0.0.1"
        ) as processes,
        Client(processes) as client,
    ):
        model.diff(tmp_path / "run.zarr")
        assert files_of(tmp_path / "run.zarr") == files_of(model.stores[0])
        assert model.overlap() == model.local
        assert len(used) == 2
        assert model.overlap(scheduler=client) == model.local
        assert len(used) == 3
        assert model.overlap(scheduler="threads") == model.local
        model.diff(None, scheduler="threads")
        assert len(used) == 3
        # a nanny starts another worker in the place of one that was killed
        victim = next(iter(client.run(os.getpid).values()))
        observer = once(lambda: os.kill(victim, signal.SIGKILL))
        model.diff(tmp_path / "again.zarr", observer=observer)
        assert files_of(tmp_path / "again.zarr") == files_of(model.stores[0])


def test_inside_a_task_threads_are_used(model: Model) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as one,
        Client(one) as client,
    ):
        # its only thread would wait for itself
        rules = client.submit(lambda: model.diff(None).rules).result(timeout=60)
    assert rules == model.diff(None).rules


def test_the_command_line_runs_on_a_cluster(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    sides = str(model.base), str(model.tuned[0])
    rules = ["--rule", RULES[0], "--rule", RULES[1], "--stats"]
    ok("diff", *sides, "-o", str(out), *rules, "--scheduler", cluster.address, "--json")
    assert files_of(out) == files_of(model.stores[0])
    stores = [str(store) for store in model.stores]
    there = ok("overlap", *stores, "--scheduler", cluster.address, "--json").stdout
    here = ok("overlap", *stores, "--json").stdout
    assert there.split('"seconds"')[0] == here.split('"seconds"')[0]


def test_a_dry_run_asks_the_cluster_how_many_run_at_a_time(model: Model, cluster: Cluster) -> None:
    found = ok(
        "diff", str(model.base), str(model.tuned[0]), "--dry-run", "--scheduler", cluster.address
    )
    assert "workers     2, for 4 chunks" in found.output


# processes that die


@pytest.fixture
def frail(mortal: Cluster) -> Cluster:
    """Two workers that may be killed; the scheduler may not."""
    mortal.have(2)
    return mortal


def test_a_killed_worker_costs_a_retry(model: Model, frail: Cluster, tmp_path: Path) -> None:
    model.diff(tmp_path / "run.zarr", scheduler=frail.address, observer=once(frail.workers[0].kill))
    assert files_of(tmp_path / "run.zarr") == files_of(model.stores[0])
    frail.have(2)
    found = model.overlap(scheduler=frail.address, observer=once(frail.workers[0].kill))
    assert found == model.local


def test_without_any_worker_it_ends(model: Model, frail: Cluster, tmp_path: Path) -> None:
    def kill() -> None:
        for worker in frail.workers:
            worker.kill()

    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"has had no worker for 2 seconds") as caught:
        model.diff(tmp_path / "run.zarr", scheduler=frail.address, observer=once(kill))
    assert "dask worker" in str(caught.value.hint)
    with pytest.raises(ClusterError, match=r"no worker for 2 seconds"):
        model.overlap(scheduler=frail.address)
    assert time.monotonic() - began < 20
    frail.have(1)  # and what was done is kept
    notes: list[str] = []
    model.diff(tmp_path / "run.zarr", scheduler=frail.address, observer=Observer(note=notes.append))
    assert any(note.startswith("resuming: ") for note in notes)
    assert files_of(tmp_path / "run.zarr") == files_of(model.stores[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_scheduler_that_dies_or_hangs(
    model: Model, tmp_path: Path, number: signal.Signals
) -> None:
    with cluster_of(tmp_path / "frail", 1) as frail:
        began = time.monotonic()
        stop = once(lambda: frail.scheduler.send_signal(number))
        with pytest.raises(ClusterError, match=r"the cluster was lost|does not answer any more"):
            model.diff(tmp_path / "run.zarr", scheduler=frail.address, observer=stop)
        assert time.monotonic() - began < 20
    result = model.diff(tmp_path / "run.zarr")
    assert result.bytes_resumed > 0
    assert files_of(tmp_path / "run.zarr") == files_of(model.stores[0])


@dataclass(frozen=True)
class Deadly:
    """A task that takes its worker with it. Only the classes of modules can be pickled by name."""

    def make(self, stack: contextlib.ExitStack) -> Callable[..., None]:
        return lambda chunk, stop: os._exit(1)


def test_a_task_that_kills_every_worker_ends(mortal: Cluster) -> None:
    mortal.have(4)
    with Client(mortal.address, set_as_default=False) as client:
        deadly: remote.Remote[Any] = remote.Remote(Deadly())
        with pytest.raises(ClusterError, match="died again and again"):
            daskrun.run_cluster([0], deadly, client, done=lambda chunk, result: None)


def test_ctrl_c_takes_back_what_has_not_begun(
    model: Model, cluster: Cluster, tmp_path: Path
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run.zarr"
    with Client(cluster.address, set_as_default=False) as client:
        for run in (lambda **more: model.diff(out, **more), model.overlap):
            with pytest.raises(Interrupted):
                run(scheduler=client, observer=once(interrupt))
            deadline = time.monotonic() + 10
            while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert model.diff(out, scheduler=client).bytes_resumed > 0
    assert files_of(out) == files_of(model.stores[0])


# schedulers that do not answer


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A port that takes connections and says nothing, or something that is not Dask."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer or b"")

        thread = threading.Thread(target=talk if answer else lambda: None, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10])
def test_a_scheduler_that_does_not_answer(model: Model, answer: bytes | None) -> None:
    sides = str(model.base), str(model.tuned[0])
    began = time.monotonic()
    with listening(answer) as address:
        assert "does not answer" in error("diff", *sides, "--scheduler", address)
        assert "does not answer" in error(
            "overlap", *map(str, model.stores), "--scheduler", address
        )
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "", "tcp://127.0.0.1"])
def test_addresses_of_nothing(model: Model, address: str) -> None:
    line = error("diff", str(model.base), str(model.tuned[0]), "--scheduler", address)
    assert "the scheduler" in line
    assert "dask scheduler" in line


def test_wrong_schedulers(model: Model) -> None:
    with pytest.raises(UsageError, match="an address or a Dask client, not int"):
        model.diff(None, scheduler=3)

    async def run(address: str) -> None:
        async with Client(address, asynchronous=True) as client:
            with pytest.raises(ClusterError, match="asynchronous"):
                model.overlap(scheduler=client)

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp",
        host="127.0.0.1",
    ) as one:  # fmt: skip
        asyncio.run(run(one.scheduler_address))


# workers that see something else


def test_what_workers_do_not_see(
    model: Model, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/cwd is another directory in every process."""
    here = Path("/proc/self/cwd")
    monkeypatch.chdir(model.root)
    tuned, hint = model.tuned[0], "every worker must see the same files at the same paths"
    with pytest.raises(ClusterError, match=r"cannot start: .*does not exist") as caught:
        ckdiff.diff(here / "base", tuned, tmp_path / "a.zarr", scheduler=cluster.address)
    assert caught.value.hint == hint
    with pytest.raises(ClusterError, match=r"cannot start: .*run0.zarr"):
        ckdiff.overlap([here / "run0.zarr", model.stores[1]], scheduler=cluster.address)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match="does not see the work directory"):
        ckdiff.diff(model.base, tuned, here / "b.zarr", scheduler=cluster.address)
    there = Path(os.readlink(f"/proc/{cluster.workers[0].pid}/cwd"))
    shutil.copytree(model.base, there / "base", copy_function=shutil.copyfile)  # new times
    monkeypatch.chdir(model.root)
    with pytest.raises(ClusterError, match="a worker sees different files") as caught:
        ckdiff.diff(here / "base", tuned, scheduler=cluster.address)
    assert caught.value.hint == hint
    shutil.rmtree(there / "base")


def test_open_checkpoints_do_not_travel(model: Model, cluster: Cluster) -> None:
    with ckdiff.open_checkpoint(model.base) as base:
        with pytest.raises(UsageError, match="one was given open"):
            ckdiff.diff(base, model.tuned[0], scheduler=cluster.address)
        with pytest.raises(UsageError, match="one was given open"):
            ckdiff.overlap(model.stores, nulls=["magnitude"], base=base, scheduler=cluster.address)


def test_another_version_and_no_ckdiff_at_all(
    model: Model, cluster: Cluster, tmp_path: Path
) -> None:
    old: remote.Remote[Any] = remote.Remote(
        OverlapRecipe((), "exact", "layer", (), None), version="0.0.1"
    )
    with (
        Client(cluster.address, set_as_default=False) as client,
        pytest.raises(ClusterError, match=r"has ckdiff .*, and this run needs 0\.0\.1"),
    ):
        daskrun.run_cluster([0], old, client, done=lambda chunk, result: None)
    hidden = tmp_path / "hidden"  # before whatever is installed
    hidden.mkdir()
    (hidden / "ckdiff.py").write_text("raise ModuleNotFoundError(\"No module named 'ckdiff'\")\n")
    with (
        cluster_of(tmp_path / "bare", 1, PYTHONPATH=str(hidden)) as bare,
        pytest.raises(ClusterError, match=r"does not know this ckdiff: .*ckdiff"),
    ):
        model.diff(None, scheduler=bare.address)


# errors of tasks


def test_errors_of_tasks_arrive_as_they_are(model: Model, cluster: Cluster, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(model.stores[0], damaged)
    target = damaged / "masks/exact/c/2"
    data = bytearray(target.read_bytes())
    data[len(data) // 3] ^= 1
    target.write_bytes(data)
    stores = [damaged, model.stores[1]]
    with pytest.raises(StoreCorrupt) as here:
        ckdiff.overlap(stores, scheduler="threads")
    with pytest.raises(StoreCorrupt) as there:
        ckdiff.overlap(stores, scheduler=cluster.address)
    assert str(there.value) == str(here.value)

    base = shutil.copytree(model.base, tmp_path / "base")

    def rewrite() -> None:
        with open(base / "model.safetensors", "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\1\1")

    with pytest.raises(SourceChanged, match="was rewritten") as changed:
        ckdiff.diff(
            base, model.tuned[0], tmp_path / "run.zarr", scheduler=cluster.address,
            observer=once(rewrite),
        )  # fmt: skip
    assert changed.value.hint
    assert not list(tmp_path.glob("*.ckdiff-partial"))  # nothing of it can be resumed


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, CkdiffError)]
)
def test_errors_can_be_pickled(kind: type[CkdiffError]) -> None:
    found = pickle.loads(pickle.dumps(kind("what is wrong", hint="what to do")))
    assert type(found) is kind
    assert (found.message, found.hint) == ("what is wrong", "what to do")
    assert found.exit_code == kind("x").exit_code


# two attempts at one chunk


def test_two_writers_of_one_object_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "c" / "0"
    frames = [os.urandom(INNER) for _ in range(3)]
    one = ObjectWriter(path)
    other = ObjectWriter(path, elsewhere=True)
    third = ObjectWriter(path)
    one.add(frames[:1])
    other.add(frames[:2])
    third.add(frames[:1])
    other.add(frames[2:])
    one.add(frames[1:])
    assert one.finish() == other.finish()
    assert path.read_bytes().startswith(b"".join(frames))
    third.abandon()
    one.abandon()
    assert [p.name for p in path.parent.iterdir()] == ["0"]


def test_a_late_writer_elsewhere_makes_no_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ObjectWriter(tmp_path / "c" / "0", elsewhere=True)
    assert not list(tmp_path.iterdir())


# tasks kept in a process


class Recipe:
    """Counts what is made and closed."""

    def __init__(self) -> None:
        self.made = self.closed = 0

    def make(self, stack: contextlib.ExitStack) -> str:
        self.made += 1
        stack.callback(lambda: setattr(self, "closed", self.closed + 1))
        return "task"


def test_a_task_is_made_once_and_closed_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_KEEP", 0.2)
    recipe = Recipe()
    task: remote.Remote[str] = remote.Remote(recipe)
    with task.task(), task.task() as same:
        assert same == "task"
        time.sleep(0.3)
    assert (recipe.made, recipe.closed) == (1, 0)
    with task.task():  # within the time
        pass
    assert recipe.made == 1
    deadline = time.monotonic() + 5
    while not recipe.closed:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with task.task():
        pass
    assert recipe.made == 2
    assert task != remote.Remote(recipe), "another run opens its files anew"
