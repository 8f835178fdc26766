"""Writing a store while everything goes wrong: kills, full disks, locks, failing fsync.

The numbers of the sections are rows of the list of faults that the project keeps.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from disks import tiny_disk
from support import write_index, write_safetensors, write_sparse
from victim import CALLS, EXCHANGE, Case, ForkServer, Meddling, Shim

import ckdiff
from ckdiff.errors import (
    StoreError,
    StoreExists,
    StoreIncomplete,
    StoreLocked,
)
from ckdiff.layout import CHUNK
from ckdiff.outputs import ownership, placing
from ckdiff.outputs.cleaning import clean
from ckdiff.outputs.ownership import SUFFIX
from ckdiff.stores import workdir
from ckdiff.stores.workdir import WorkDir

Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


@dataclass
class Model:
    """A pair of checkpoints, and the store that an undisturbed run makes of them."""

    base: Path
    tuned: Path
    tree: Tree

    def case(self, out: Path, **options: object) -> Case:
        return Case(str(self.base), str(self.tuned), str(out), {"workers": 1, **options})


def _model(folder: Path, server: ForkServer, base: Path, tuned: Path, **options: object) -> Model:
    model = Model(base, tuned, {})
    out = folder / "undisturbed.zarr"
    assert server.run(model.case(out, **options)).ok
    model.tree = read_tree(out)
    shutil.rmtree(out)
    assert sorted(p.name for p in folder.iterdir()) == sorted([base.name, tuned.name])
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Model:
    """One chunk, three tensors, masks that do not compress."""
    folder = tmp_path_factory.mktemp("small")
    random_bytes = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    tensors = {
        "a.0.w": ("U8", (1000, 7), bytes(7000)),
        "a.1.w": ("BF16", (300,), bytes(600)),
        "b": ("U8", (1 << 20,), bytes(1 << 20)),
    }
    base = write_safetensors(folder / "base.safetensors", tensors)
    mixed = bytes(byte & 1 for byte in random_bytes)
    changed = {
        "a.0.w": ("U8", (1000, 7), bytes(3500) + b"\1" * 3500),
        "a.1.w": ("BF16", (300,), b"\x80\x3f" * 300),
        "b": ("U8", (1 << 20,), mixed),
    }
    tuned = write_safetensors(folder / "tuned.safetensors", changed)
    return _model(folder, server, base, tuned)


@pytest.fixture(scope="module")
def other(small: Model, tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Model:
    """The same base, another tuned side."""
    folder = tmp_path_factory.mktemp("other")
    base = Path(shutil.copy(small.base, folder))
    tuned = write_safetensors(
        folder / "tuned2.safetensors", {"a.1.w": ("BF16", (300,), b"\1\1" * 300)}
    )
    return _model(folder, server, base, tuned)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Model:
    """Three chunks of four-bit elements, all holes but for a few."""
    folder = tmp_path_factory.mktemp("big")
    elements = 2 * CHUNK + 100_000
    tensors = {
        "small": ("U8", (5000,), 5000),
        "w": ("F4", (elements,), elements // 2),
    }
    base = write_sparse(folder / "base.safetensors", tensors)
    edits = {
        "small": {17: b"\1\2\3"},
        "w": {0: b"\x10", CHUNK // 2 - 3: b"\1\1\1\1\1", elements // 2 - 1: b"\x11"},
    }
    tuned = write_sparse(folder / "tuned.safetensors", tensors, edits)
    return _model(folder, server, base, tuned)


def read_tree(root: Path) -> Tree:
    """Every file below ``root``, and its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if not p.is_dir()}


def write_tree(root: Path, tree: Tree) -> None:
    """Such files again, as a run would have left them."""
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def partial(out: Path) -> Path:
    return out.with_name(out.name + SUFFIX)


def assert_sound(out: Path, *allowed: Tree) -> bool:
    """The final name holds one of ``allowed`` or, where none is given or allowed, nothing that
    could be taken for a store; gives whether it holds one."""
    assert {p.name for p in out.parent.iterdir()} <= {out.name, partial(out).name}
    for root in (out, partial(out) / "store", partial(out) / "replaced"):
        if (root / "manifest.json").exists():
            assert read_tree(root) in allowed, f"{root} looks finished and is not"
            ckdiff.open_store(root).check()
    if out.exists():
        assert read_tree(out) in allowed
        return True
    with pytest.raises(StoreIncomplete) as caught:
        ckdiff.open_store(out)
    assert (partial(out).exists()) == ("stopped" in str(caught.value))
    return False


def assert_rerun(server: ForkServer, case: Case, tree: Tree) -> None:
    """The same command again gives the undisturbed store and leaves nothing beside it."""
    assert case.out is not None
    out = Path(case.out)
    done = out.exists() and not case.options.get("overwrite")
    again = server.run(replace(case, shim=None, file_size=None))
    if done:
        assert again.error == "StoreExists"
        clean(out.parent)
    else:
        assert again.ok, again
    assert read_tree(out) == tree
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def calls_of(server: ForkServer, case: Case, calls: tuple[str, ...]) -> int:
    """How many of these calls the undisturbed case makes; leaves its output."""
    outcome = server.run(replace(case, shim=Shim(0, calls=calls)))
    assert outcome.ok, outcome
    return int(outcome.report["calls"])


# 22: kill -9 at every step


@pytest.mark.parametrize("do", ["kill", "torn"])
def test_killed_at_every_call(server: ForkServer, small: Model, tmp_path: Path, do: str) -> None:
    finished = 0
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        calls = ("write",) if do == "torn" else (*CALLS, EXCHANGE)
        case = replace(small.case(out), shim=Shim(at, do, calls))
        outcome = server.run(case)
        if outcome.ok:
            break
        assert outcome.signal == signal.SIGKILL
        finished += assert_sound(out, small.tree)
        assert_rerun(server, case, small.tree)
        shutil.rmtree(out.parent)
    assert at > (5 if do == "torn" else 40)
    # from the rename on, the store is complete whatever happens to the clean-up
    assert (finished > 3) == (do == "kill")


def test_killed_while_a_run_is_resumed(server: ForkServer, big: Model, tmp_path: Path) -> None:
    """Killed again and again, each time a little later, until it is done."""
    out = tmp_path / "run.zarr"
    kills = 0
    for at in itertools.count(12, 6):
        outcome = server.run(replace(big.case(out), shim=Shim(at)))
        if outcome.ok:
            break
        kills += 1
        if assert_sound(out, big.tree):
            clean(tmp_path)
            break
    assert kills > 5
    assert read_tree(out) == big.tree
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_killed_in_a_run_of_several_chunks(server: ForkServer, big: Model, tmp_path: Path) -> None:
    total = calls_of(server, big.case(tmp_path / "run.zarr"), (*CALLS, EXCHANGE))
    for at in range(1, total, 9):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        case = replace(big.case(out), shim=Shim(at))
        assert server.run(case).signal == signal.SIGKILL
        assert_sound(out, big.tree)
        case.options["workers"] = 1 + at % 2
        assert_rerun(server, case, big.tree)
        shutil.rmtree(out.parent)


def test_killed_at_random_times(server: ForkServer, big: Model, tmp_path: Path) -> None:
    chance = random.Random(1)
    kills = 0
    for i in range(24):
        out = tmp_path / str(i) / "run.zarr"
        out.parent.mkdir()
        case = big.case(out)
        case.options["workers"] = 2
        pid = server.start(case)
        time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        kills += server.wait(pid).signal == signal.SIGKILL
        assert_sound(out, big.tree)
        assert_rerun(server, case, big.tree)
        shutil.rmtree(out.parent)
    assert kills > 6


def test_resuming_does_not_compute_again(server: ForkServer, big: Model, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    assert server.run(replace(big.case(out), shim=Shim(1, where="journal/2"))).signal
    before = (partial(out) / "store/masks/exact/c/0").stat().st_ino
    outcome = server.run(big.case(out))
    assert "resuming: 2 of 3 chunks" in outcome.report["notes"][0]
    assert (out / "masks/exact/c/0").stat().st_ino == before
    assert read_tree(out) == big.tree


@pytest.mark.parametrize("damage", ["object", "object gone", "record", "record gone", "grown"])
def test_stale_work_is_done_again(
    server: ForkServer, big: Model, tmp_path: Path, damage: str
) -> None:
    """A journal that speaks of bytes that are not there is not believed."""
    out = tmp_path / "run.zarr"
    assert server.run(replace(big.case(out), shim=Shim(1, where="manifest.json"))).signal
    target = partial(out) / ("journal/1" if "record" in damage else "store/masks/exact/c/1")
    data = bytearray(target.read_bytes())
    if "gone" in damage:
        target.unlink()
    elif damage == "grown":
        target.write_bytes(data + b"\0")
    else:
        data[len(data) // 2] ^= 4
        target.write_bytes(data)
    outcome = server.run(big.case(out))
    assert "resuming: 2 of 3 chunks" in outcome.report["notes"][0]
    assert read_tree(out) == big.tree


def test_work_of_another_plan_is_thrown_away(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    other_rules = small.case(out, rules=["exact", "atol=1e-5"])
    assert server.run(replace(other_rules, shim=Shim(1, where="manifest.json"))).signal
    assert list(partial(out).glob("store/masks/atol=*/c/0"))
    # a stranger in the work directory must not get into the store either
    (partial(out) / "store/masks/exact/c/77").write_bytes(b"?")
    outcome = server.run(small.case(out))
    assert "starting again" in outcome.report["notes"][0]
    assert read_tree(out) == small.tree


def test_temporaries_of_killed_writers_do_not_get_into_the_store(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    assert server.run(replace(small.case(out), shim=Shim(1, where="manifest.json"))).signal
    (partial(out) / "store/masks/exact/c/.0.tmp").write_bytes(b"half")
    (partial(out) / "store/masks/exact/c/.8.worker-3.tmp").write_bytes(b"half")
    assert server.run(small.case(out)).ok
    assert read_tree(out) == small.tree


# 23: signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    server: ForkServer, big: Model, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run.zarr"
    slow = Shim(1, "pause", ("replace",), onwards=True, seconds=0.1)
    pid = server.start(replace(big.case(out), shim=slow))
    deadline = time.monotonic() + 20
    while not (partial(out) / "journal/0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(pid, number)
    outcome = server.wait(pid)
    if number == signal.SIGINT:
        assert outcome.error == "Interrupted"
        assert outcome.report["exit_code"] == 130
        assert "resumes" in outcome.message
        assert outcome.report["users"] == 0  # the SIGBUS handler was taken away again
    else:  # nobody catches it in a process that only uses the API
        assert outcome.signal == signal.SIGTERM
    assert not assert_sound(out, big.tree)
    again = server.run(big.case(out))
    assert "resuming" in again.report["notes"][0]
    assert again.report["leaked"] == 0
    assert read_tree(out) == big.tree


def test_interrupted_twice(server: ForkServer, big: Model, tmp_path: Path) -> None:
    """The second Ctrl-C arrives while workers still read what would be unmapped."""
    chance = random.Random(2)
    for i in range(8):
        out = tmp_path / str(i) / "run.zarr"
        out.parent.mkdir()
        case = big.case(out)
        case.options["workers"] = 2
        wait = Meddling("", "wait", seconds=0.02)
        pid = server.start(replace(case, meddling=wait, linger=0.05))
        time.sleep(0.05 + chance.uniform(0, 0.05))
        for _ in range(3):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.004)
        outcome = server.wait(pid)
        assert outcome.signal == 0
        assert outcome.report["error"] in ("Interrupted", "KeyboardInterrupt")
        assert_sound(out, big.tree)


# 24, 25: no room


def test_disk_of_every_size(server: ForkServer, small: Model, tmp_path: Path) -> None:
    need = sum(len(data) + 4096 for data in small.tree.values())
    failed = set()
    for pages in range(2, 2 * need // 4096):
        with tiny_disk(tmp_path / str(pages), pages * 4096) as disk:
            out = disk / "run.zarr"
            outcome = server.run(small.case(out))
            if outcome.ok:
                assert read_tree(out) == small.tree
                break
            failed.add(outcome.error)
            assert str(disk) in outcome.message
            assert not assert_sound(out)
            if pages % 5 == 0:
                command = ["mount", "-o", f"remount,size={4 * need}", str(disk)]
                subprocess.run(command, check=True)
                assert_rerun(server, small.case(out), small.tree)
    else:
        pytest.fail("it never fitted")
    assert failed == {"BudgetError", "StoreError"}


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EDQUOT"])
def test_writing_fails_at_every_call(
    server: ForkServer, small: Model, tmp_path: Path, code: str
) -> None:
    calls = ("write", "mkdir", "rename", "replace")
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        case = replace(small.case(out), shim=Shim(at, code, calls, onwards=at % 2 == 0))
        outcome = server.run(case)
        if outcome.ok:
            break
        assert outcome.error == "StoreError"
        assert str(out.parent) in outcome.message
        assert not assert_sound(out)
        assert_rerun(server, case, small.tree)
        shutil.rmtree(out.parent)
    assert at > 15


def test_cleaning_up_fails(server: ForkServer, small: Model, tmp_path: Path) -> None:
    """What cannot be removed stays for ``clean``; the store is complete all the same."""
    left = 0
    for at in range(1, 15):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        shim = Shim(at, "EIO", ("unlink", "rmdir"), onwards=True)
        outcome = server.run(replace(small.case(out), shim=shim))
        if not outcome.ok:  # not at the clean-up yet
            assert outcome.error == "StoreError"
            assert not assert_sound(out)
            continue
        assert assert_sound(out, small.tree)
        if partial(out).exists():
            left += 1
            assert clean(out.parent) == ([partial(out)], [], [])
        assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert left > 3


def test_file_size_limit(server: ForkServer, small: Model, tmp_path: Path) -> None:
    largest = max(len(data) for data in small.tree.values())
    sizes = [0, 1, 100, 1000, 4096, 20_000, largest // 2, largest - 1]
    for size in sizes:
        out = tmp_path / str(size) / "run.zarr"
        out.parent.mkdir()
        case = replace(small.case(out), file_size=size)
        outcome = server.run(case)
        assert outcome.error == "StoreError"
        assert "ulimit -f" in outcome.message
        assert not assert_sound(out)
        assert_rerun(server, case, small.tree)
    out = tmp_path / "enough.zarr"
    assert server.run(replace(small.case(out), file_size=largest)).ok


# 26: fsync fails


@pytest.mark.parametrize("overwrite", [False, True])
def test_fsync_fails(
    server: ForkServer, small: Model, other: Model, tmp_path: Path, overwrite: bool
) -> None:
    old = [other.tree] if overwrite else []
    total = resumed = 0
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        if overwrite:
            write_tree(out, other.tree)
        case = small.case(out, overwrite=overwrite)
        outcome = server.run(replace(case, shim=Shim(at, "EIO", ("fsync",))))
        if outcome.ok:
            break
        total += 1
        assert outcome.error == "StoreError"
        assert assert_sound(out, *old) == overwrite
        again = server.run(case)
        assert again.ok
        resumed += any("resuming" in note for note in again.report["notes"])
        assert read_tree(out) == small.tree
        shutil.rmtree(out.parent)
    # every file and directory of the store, the plan, the manifest, and the parent directory
    assert total > len(small.tree) + 5
    # After a failed fsync the page cache cannot be trusted, and nothing is taken over by the next
    # run; but when it was the manifest's, all else was safe already.
    assert resumed == 1


# 30: two writers


def test_second_writer_is_turned_away(server: ForkServer, small: Model, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    with WorkDir(out, {}, overwrite=False):
        assert server.run(small.case(out)).error == "StoreLocked"
        linked = tmp_path / "link"
        linked.symlink_to(tmp_path)
        assert server.run(small.case(linked / "run.zarr")).error == "StoreLocked"
        linked.unlink()
        assert clean(tmp_path) == ([], [partial(out)], [])
    assert_rerun(server, small.case(out), small.tree)


@pytest.mark.parametrize("overwrite", [False, True])
def test_many_writers_at_once(
    server: ForkServer, small: Model, tmp_path: Path, overwrite: bool
) -> None:
    winners = 0
    for i in range(12):
        out = tmp_path / str(i) / "run.zarr"
        out.parent.mkdir()
        start = time.time() + 0.03
        case = replace(small.case(out, overwrite=overwrite), start_at=start)
        children = [
            server.start(replace(case, start_at=start + 0.004 * (j // 2))) for j in range(8)
        ]
        outcomes = [server.wait(pid) for pid in children]
        assert any(outcome.ok for outcome in outcomes)
        refused = {outcome.error for outcome in outcomes if not outcome.ok}
        assert refused <= ({"StoreLocked"} if overwrite else {"StoreLocked", "StoreExists"})
        winners += sum(outcome.ok for outcome in outcomes)
        assert read_tree(out) == small.tree
        assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert overwrite or winners == 12


def test_cleaning_while_runs_begin_and_end(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    """``clean`` at any moment takes nothing away from a run; at worst it has the lock just then."""
    finished = 0
    for i in range(60):
        out = tmp_path / str(i) / "run.zarr"
        out.parent.mkdir()
        pid = server.start(small.case(out))
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:
            clean(out.parent)
        outcome = server.wait(pid)
        assert outcome.ok or outcome.error == "StoreLocked"
        if outcome.ok:
            assert read_tree(out) == small.tree
            finished += 1
        clean(out.parent)
        assert [p.name for p in out.parent.iterdir()] == [out.name] * outcome.ok
        if finished == 8:
            break
    assert finished == 8, "hardly a run got the lock"


def test_lock_is_taken_over_while_the_directory_is_removed(tmp_path: Path) -> None:
    """Between the end of the lock file and the end of its directory somebody else moves in."""
    out = tmp_path / "run.zarr"
    first = WorkDir(out, {}, overwrite=False)
    rmdir, second = os.rmdir, WorkDir(out, {}, overwrite=False)

    def late(path: Path, **named: int) -> None:
        if path == first.path:
            patch.undo()
            second.__enter__()
        rmdir(path, **named)

    with pytest.MonkeyPatch.context() as patch, first:
        patch.setattr(os, "rmdir", late)
        first.discard()
    assert second.store.is_dir()
    with pytest.raises(StoreLocked), WorkDir(out, {}, overwrite=False):
        pass
    second.discard()
    second.__exit__()
    assert not list(tmp_path.iterdir())


def test_what_is_written_while_it_is_removed_is_removed_too(tmp_path: Path) -> None:
    """Chunks that a cluster's worker computes when a run fails end unseen, and some write."""
    out, late = tmp_path / "run.zarr", [b"first", b"second"]

    def written_to(path: Path) -> None:
        if late and path.name == "store":
            (path / "c").write_bytes(late.pop())
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        placing.remove(path)

    with pytest.MonkeyPatch.context() as patch, WorkDir(out, {}, overwrite=False) as work:
        patch.setattr(ownership, "remove", written_to)
        work.discard()
    assert not late
    assert not list(tmp_path.iterdir())


def test_output_that_appears_while_waiting_is_not_computed_again(tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    acquire = workdir.acquire

    def slow(path: Path, *, create: bool = True) -> int:
        out.mkdir()  # another process finishes first
        return acquire(path, create=create)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workdir, "acquire", slow)
        with pytest.raises(StoreExists), WorkDir(out, {}, overwrite=False):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


# 31: the output exists


def test_output_exists(server: ForkServer, small: Model, other: Model, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    assert server.run(small.case(out)).ok
    outcome = server.run(other.case(out))
    assert outcome.error == "StoreExists"
    assert "--overwrite" in outcome.message
    assert read_tree(out) == small.tree
    assert server.run(other.case(out, overwrite=True)).ok
    assert read_tree(out) == other.tree
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_overwriting_is_killed_at_every_call(
    server: ForkServer, small: Model, other: Model, tmp_path: Path
) -> None:
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        write_tree(out, other.tree)
        case = replace(small.case(out, overwrite=True), shim=Shim(at))
        outcome = server.run(case)
        if outcome.ok:
            break
        assert outcome.signal == signal.SIGKILL
        assert assert_sound(out, small.tree, other.tree)  # at no moment is there neither
        assert_rerun(server, case, small.tree)
        shutil.rmtree(out.parent)
    assert at > 40


def test_overwriting_that_would_take_two_steps_is_refused_before_the_work(
    server: ForkServer, small: Model, other: Model, tmp_path: Path
) -> None:
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        write_tree(out, other.tree)
        case = replace(small.case(out, overwrite=True), no_exchange=True)
        outcome = server.run(replace(case, shim=Shim(at)))
        assert read_tree(out) == other.tree
        if not outcome.signal:
            break
    assert at > 10
    assert outcome.error == "StoreExists"
    assert "in one step" in outcome.message
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    shutil.rmtree(out)
    assert server.run(case).ok  # nothing to replace, nothing to exchange
    (tmp_path / "empty.zarr").mkdir()
    empty = small.case(tmp_path / "empty.zarr", overwrite=True)
    assert server.run(replace(empty, no_exchange=True)).ok


def test_overwriting_fails(server: ForkServer, small: Model, other: Model, tmp_path: Path) -> None:
    """A rename that fails in the middle is undone."""
    failures = 0
    for at in itertools.count(1):
        out = tmp_path / str(at) / "run.zarr"
        out.parent.mkdir()
        write_tree(out, other.tree)
        case = small.case(out, overwrite=True)
        outcome = server.run(replace(case, shim=Shim(at, "EIO", ("rename", EXCHANGE))))
        if outcome.ok:
            break
        failures += 1
        assert outcome.error == "StoreError"
        assert read_tree(out) == other.tree
        assert_rerun(server, case, small.tree)
    assert failures == 3  # is an exchange possible, out of the way, the exchange


@pytest.mark.parametrize("what", ["file", "link", "directory", "manifest", "checkpoint"])
def test_what_is_not_a_store_is_never_overwritten(
    server: ForkServer, small: Model, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "run.zarr"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        (tmp_path / "target").mkdir()
        out.symlink_to("target")
    else:
        out.mkdir()
        name = {"directory": "notes.txt", "manifest": "manifest.json"}.get(what, "x.safetensors")
        (out / name).write_text('{"name": "a web app"}')
    before = read_tree(tmp_path)
    for overwrite in (False, True):
        outcome = server.run(small.case(out, overwrite=overwrite))
        assert outcome.error == "StoreExists"
        assert str(out) in outcome.message
    assert read_tree(tmp_path) == before
    assert not partial(out).exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_a_damaged_store_can_be_overwritten(
    server: ForkServer, small: Model, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "run.zarr"
    assert server.run(small.case(out)).ok
    manifest = out / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes({"cut": data[:99], "emptied": b"", "flipped": b"?" + data[1:]}[damage])
    assert server.run(small.case(out, overwrite=True)).ok
    assert read_tree(out) == small.tree


def test_an_empty_directory_is_filled_only_when_asked(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    out.mkdir()
    assert server.run(small.case(out)).error == "StoreExists"
    assert server.run(small.case(out, overwrite=True)).ok
    assert read_tree(out) == small.tree


# 32: the output and the sources


def test_output_among_the_sources(server: ForkServer, small: Model, tmp_path: Path) -> None:
    real = tmp_path / "real"
    base, tuned = (
        Path(shutil.copytree(small.base.parent, real / side)) for side in ("base", "tuned")
    )
    (base / "tuned.safetensors").unlink()
    (tuned / "base.safetensors").unlink()
    (base / "sub").mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    into = tmp_path / "into"
    into.symlink_to(tuned)
    before = read_tree(tmp_path)
    for root in (real, link):
        for out in (
            base, tuned, base / "run.zarr", tuned / "run.zarr", base / "sub" / "run.zarr",
            link / "base", link / "tuned" / "run.zarr", into / "run.zarr", into,
            base / "base.safetensors", real, tmp_path,
        ):  # fmt: skip
            case = Case(str(root / "base"), str(root / "tuned"), str(out))
            for overwrite in (False, True):
                case.options = {"overwrite": overwrite}
                outcome = server.run(case)
                assert outcome.error in ("StoreError", "StoreExists"), (root, out, outcome)
                assert str(out) in outcome.message
    assert read_tree(tmp_path) == before
    assert not list(tmp_path.rglob("*" + SUFFIX))


def test_output_among_shards_in_subdirectories(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    (base / "shards").mkdir(parents=True)
    shutil.copy(small.base, base / "shards")
    names = ckdiff.open_checkpoint(small.base).table.names
    index = write_index(base, dict.fromkeys(names, "shards/base.safetensors"))
    for given in (base, index):
        for out in (base / "run.zarr", base / "shards" / "run.zarr", base / "shards"):
            outcome = server.run(Case(str(given), str(small.tuned), str(out)))
            assert outcome.error == "StoreError"
            assert "source" in outcome.message
    assert server.run(Case(str(base), str(small.tuned), str(tmp_path / "run.zarr"))).ok


def test_output_beside_single_files_is_fine(
    server: ForkServer, small: Model, tmp_path: Path
) -> None:
    base, tuned = (Path(shutil.copy(side, tmp_path)) for side in (small.base, small.tuned))
    base = base.rename(tmp_path / tmp_path.name)  # as if it had been opened as its directory
    assert server.run(Case(str(base), str(tuned), str(tmp_path / "run.zarr"))).ok
    assert server.run(Case(str(base), str(tuned), str(base))).error == "StoreError"


# 33: too little memory


@pytest.mark.parametrize("memory", [1, "1MiB", "50MiB"])
def test_too_little_memory(
    server: ForkServer, small: Model, tmp_path: Path, memory: int | str
) -> None:
    outcome = server.run(small.case(tmp_path / "run.zarr", memory=memory))
    assert outcome.error == "BudgetError"
    assert "--memory" in outcome.message
    assert not list(tmp_path.iterdir())


# other places that cannot be written to


def test_no_parent_directory(server: ForkServer, small: Model, tmp_path: Path) -> None:
    outcome = server.run(small.case(tmp_path / "no" / "run.zarr"))
    assert outcome.error == "StoreError"
    assert "no directory" in outcome.message


def test_parent_is_not_writable(server: ForkServer, small: Model, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    for path in (tmp_path, *tmp_path.parents, *small.base.parents):
        if path.stat().st_uid == 0 and len(path.parts) > 2:
            path.chmod(path.stat().st_mode | 0o055)
    outcome = server.run(replace(small.case(folder / "run.zarr"), user=65534))
    assert outcome.error == "StoreError"
    assert "choose another place" in outcome.message
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["/", "x" * 250, "x" * 300])
def test_impossible_names(server: ForkServer, small: Model, tmp_path: Path, name: str) -> None:
    outcome = server.run(small.case(tmp_path / name))
    assert outcome.error in ("StoreError", "StoreExists")


def test_work_directory_is_in_the_way(server: ForkServer, small: Model, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    partial(out).write_text("mine")
    assert server.run(small.case(out)).error == "StoreError"
    assert partial(out).read_text() == "mine"


# clean


def test_clean_leaves_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "data").write_text("mine")
    (tmp_path / f"link{SUFFIX}").symlink_to("target")
    (tmp_path / f"file{SUFFIX}").write_text("mine")
    (tmp_path / f"old.zarr{SUFFIX}").mkdir()
    before = read_tree(tmp_path)
    removed, busy, left = clean(tmp_path)
    assert (removed, busy) == ([], [])
    names = [f"file{SUFFIX}", f"link{SUFFIX}", f"old.zarr{SUFFIX}"]
    assert [path.name for path, _ in left] == names
    assert all(str(path) in why for path, why in left)
    assert read_tree(tmp_path) == before
    with pytest.raises(StoreError, match="cannot look into"):
        clean(tmp_path / "nowhere")
