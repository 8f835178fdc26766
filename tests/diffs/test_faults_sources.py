"""Sources that are cut, rewritten, removed or unreadable while they are being read.

The numbers of the sections are rows of the list of faults that the project keeps.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import write_safetensors, write_sparse
from victim import Case, ForkServer, Meddling, Outcome, Shim

import ckdiff
from ckdiff.checkpoints import open_checkpoint
from ckdiff.diffs.task import LARGEST_WINDOW
from ckdiff.errors import SourceChanged
from ckdiff.kernels import guard
from ckdiff.outputs.ownership import SUFFIX

PAGE = mmap.PAGESIZE
ELEMENTS = 8 * LARGEST_WINDOW + 1234  #: of the tensor ``w``: 9 windows, the last one ragged
CHANGED = 5


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as running:
        yield running


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A pair of sparse files with CHANGED changed elements, and a store to be written."""
    tensors = {"a": ("U8", (100,), 100), "w": ("U8", (ELEMENTS,), ELEMENTS)}
    edits = {"a": {3: b"\1\1"}, "w": {0: b"\1", ELEMENTS // 2: b"\2", ELEMENTS - 1: b"\3"}}
    base = write_sparse(tmp_path / "base.safetensors", tensors)
    tuned = write_sparse(tmp_path / "tuned.safetensors", tensors, edits)
    return Case(str(base), str(tuned), str(tmp_path / "run.zarr"))


def assert_refused(outcome: Outcome, case: Case, file: str) -> None:
    """An error that names the file, and nothing of the run left."""
    assert outcome.signal == 0
    assert outcome.error == "SourceChanged", outcome
    assert file in outcome.message
    assert "run again" in outcome.message
    assert outcome.report["users"] == 0  # the SIGBUS handler was taken away again
    if case.out is not None:
        assert not Path(case.out).exists()
        assert not Path(case.out + SUFFIX).exists()


def assert_next_run_is_right(server: ForkServer, case: Case) -> None:
    base, tuned = (np.fromfile(side, np.uint8) for side in (case.base, case.tuned))
    outcome = server.run(replace(case, meddling=None))
    assert outcome.changed() == np.count_nonzero(base != tuned)  # their headers are the same
    assert outcome.report["leaked"] == 0


def size_of(path: str) -> int:
    return os.stat(path).st_size


# 17: truncated to a page boundary while mapped


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("no_populate", [False, True])
def test_cut_while_kernels_read(
    server: ForkServer, case: Case, side: str, workers: int, no_populate: bool
) -> None:
    """The window was populated, then its pages go away under the kernels: a real SIGBUS."""
    path = getattr(case, side)
    # after both sides of the second window were acquired; before any of it is read
    case.meddling = Meddling(path, "truncate", at=4, size=PAGE)
    case.options = {"workers": workers}
    case.no_populate = no_populate
    outcome = server.run(case)
    assert_refused(outcome, case, path)
    assert "truncated from" in outcome.message
    assert outcome.report["faults"] > 0
    gone = server.run(replace(case, meddling=None))
    assert gone.error == "HeaderError"


@pytest.mark.parametrize("at", [1, 2, 3, 8])
@pytest.mark.parametrize("out", [True, False])
def test_cut_before_a_window_is_populated(
    server: ForkServer, case: Case, at: int, out: bool
) -> None:
    case.meddling = Meddling(case.tuned, "truncate", at=at, moment="released", size=PAGE)
    if not out:
        case.out = None
    outcome = server.run(case)
    assert_refused(outcome, case, case.tuned)
    assert outcome.report["faults"] == 0


def test_cut_does_not_count_as_zeros_even_where_nothing_shows_it(
    server: ForkServer, case: Case
) -> None:
    """Pages that could not be loaded are an error by themselves."""
    case.meddling = Meddling(case.tuned, "truncate", at=4, size=PAGE)
    outcome = server.run(replace(case, blind=True))
    assert outcome.error == "CheckpointError"
    assert case.tuned in outcome.message
    assert not Path(str(case.out)).exists()


# 18: cut inside the last page


@pytest.mark.parametrize("moment", ["acquired", "releasing", "released"])
@pytest.mark.parametrize("at", [2, 17, 18])
def test_cut_inside_the_last_page(server: ForkServer, case: Case, moment: str, at: int) -> None:
    """The kernel then reads zeros without any fault; also after the last window was released."""
    case.meddling = Meddling(
        case.tuned, "truncate", at=at, moment=moment, size=size_of(case.tuned) - 1
    )
    outcome = server.run(case)
    assert_refused(outcome, case, case.tuned)
    assert outcome.report["faults"] == 0


def test_grown(server: ForkServer, case: Case) -> None:
    case.meddling = Meddling(case.base, "truncate", at=5, size=size_of(case.base) + 1)
    outcome = server.run(case)
    assert_refused(outcome, case, case.base)
    assert "grew" in outcome.message


# 19: rewritten in place


@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("moment", ["acquired", "released"])
@pytest.mark.parametrize("place", ["seen", "coming"])
def test_rewritten_with_the_same_size(
    server: ForkServer, case: Case, moment: str, place: str, keep_times: bool
) -> None:
    offset = 1000 if place == "seen" else size_of(case.tuned) - 1000
    case.meddling = Meddling(
        case.tuned, "rewrite", at=6, moment=moment, offset=offset, keep_times=keep_times
    )
    outcome = server.run(case)
    assert_refused(outcome, case, case.tuned)
    assert_next_run_is_right(server, case)


def test_rewritten_after_a_run_was_killed(server: ForkServer, case: Case, tmp_path: Path) -> None:
    """Earlier work is about other bytes: it is thrown away."""
    assert server.run(replace(case, shim=Shim(1, where="manifest.json"))).signal
    with open(case.tuned, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\7\7")
    outcome = server.run(case)
    assert "starting again" in outcome.report["notes"][0]
    assert outcome.changed() == CHANGED + 2
    assert not Path(str(case.out) + SUFFIX).exists()


# 20: unlinked or replaced


@pytest.mark.parametrize("action", ["unlink", "replace"])
@pytest.mark.parametrize("at", [1, 6, 16])
def test_removed_or_replaced(
    server: ForkServer, case: Case, tmp_path: Path, action: str, at: int
) -> None:
    other = tmp_path / "other"
    shutil.copy(case.base, other)
    case.meddling = Meddling(case.tuned, action, at=at, moment="released", other=str(other))
    outcome = server.run(case)
    assert_refused(outcome, case, case.tuned)
    if action == "replace":
        assert_next_run_is_right(server, case)


def test_replaced_behind_a_link(server: ForkServer, case: Case, tmp_path: Path) -> None:
    """As a hub cache does when a snapshot is updated: the open file itself stays as it was."""
    link = tmp_path / "model.safetensors"
    link.symlink_to(case.tuned)
    other = tmp_path / "new-link"
    other.symlink_to(case.base)
    case.meddling = Meddling(str(link), "replace", at=3, other=str(other))
    case.tuned = str(link)
    outcome = server.run(case)
    assert_refused(outcome, case, str(link))


# 21: EIO and short reads


def test_short_reads_go_on(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    reads = []

    def short(fd: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return pread(fd, min(size, 37), offset)

    monkeypatch.setattr(os, "pread", short)
    result = ckdiff.diff(case.base, case.tuned, case.out, workers=1)
    assert result.rules["exact"]["changed"] == CHANGED
    assert result.store is not None
    assert result.store.mask("w").sum() == CHANGED - 2
    result.store.check()
    assert len(reads) > 100


def strace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code under strace with faults injected."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("there is no strace here")
    command = [tracer, "-f", "-qq", "-o", "/dev/null", *arguments, sys.executable, "-c", script]
    probe = [tracer, "-qq", "-o", "/dev/null", "-e", "inject=getppid:error=EPERM", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("ptrace or fault injection is not permitted here")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("when", ["1", "2"])
@pytest.mark.parametrize("index", [False, True])
def test_header_cannot_be_read(case: Case, tmp_path: Path, when: str, index: bool) -> None:
    path = case.tuned
    if index:
        path = str(tmp_path / "model.safetensors.index.json")
        Path(path).write_text(
            '{"weight_map": {"a": "tuned.safetensors", "w": "tuned.safetensors"}}'
        )
        when = "1"
    script = f"""
import ckdiff
try:
    ckdiff.open_checkpoint({path!r})
except ckdiff.CheckpointError as error:
    print(error)
"""
    read = strace(
        script, "-P", path, "-e", "trace=pread64,preadv2,read",
        "-e", f"inject=pread64,preadv2,read:error=EIO:when={when}",
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    assert path in read.stdout
    assert "Input/output error" in read.stdout


@pytest.mark.parametrize("call", ["pread64", "madvise"])
def test_interrupted_system_calls_go_on(case: Case, call: str) -> None:
    script = f"""
import ckdiff
print(ckdiff.diff({case.base!r}, {case.tuned!r}, workers=2).rules["exact"]["changed"])
"""
    only = ["-P", case.base] if call == "pread64" else []
    run = strace(script, *only, "-e", f"inject={call}:error=EINTR:when=1+3")
    assert run.stdout == f"{CHANGED}\n", run.stderr


def test_file_can_no_longer_be_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a network file system whose server has forgotten the file."""
    checkpoint = ckdiff.open_checkpoint(case.base)
    fstat = os.fstat

    def stale(fd: int) -> os.stat_result:
        if fd == checkpoint.open_files[0].fd:  # type: ignore[attr-defined]
            raise OSError(116, "Stale file handle")
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", stale)
    with pytest.raises(SourceChanged, match=r"base\.safetensors.*Stale file handle"):
        ckdiff.diff(checkpoint, case.tuned, case.out)
    monkeypatch.undo()
    checkpoint.close()


@contextmanager
def failing_disk(folder: Path, file: Path) -> Iterator[Path]:
    """A file system that holds a copy of ``file`` and cannot read the end of it any more.

    A loop device gives EIO for what its image no longer has. Skips where it cannot be had.
    """
    image, disk = folder / "image", folder / "disk"
    disk.mkdir()
    size = file.stat().st_size
    with open(image, "wb") as empty:
        empty.truncate(2 * size + (8 << 20))
    mount = ["mount", "-o", "loop", str(image), str(disk)]
    try:
        # few inodes and no journal: the data lies in one piece behind the metadata
        make = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-N", "16", "-O", "^has_journal", str(image)]
        subprocess.run(make, check=True, capture_output=True)
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a loop device is not permitted here")
    try:
        copy = disk / file.name
        with open(file, "rb") as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target)  # no holes: they would be read without the disk
        subprocess.run(["umount", str(disk)], check=True)
        subprocess.run(mount, check=True)
        os.truncate(image, _last_block(copy) * 4096 - size // 4)
        yield copy
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _last_block(path: Path) -> int:
    """The physical block behind the last one of a file."""
    listing = subprocess.run(["filefrag", "-v", str(path)], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("there is no filefrag here")
    rows = [line.split(":") for line in listing.stdout.splitlines()]
    rows = [row for row in rows if row[0].strip().isdigit()]
    return int(rows[-1][2].partition("..")[2]) + 1


@pytest.mark.parametrize("no_populate", [False, True])
def test_disk_fails(server: ForkServer, tmp_path: Path, no_populate: bool) -> None:
    """Real EIO, where the kernels read the mapping; nothing about the file tells that it failed."""
    data = bytes(range(1, 256)) * (1 << 15)
    base = write_safetensors(tmp_path / "base.safetensors", {"w": ("U8", (len(data),), data)})
    (tmp_path / "out").mkdir()
    with failing_disk(tmp_path, base) as copy:
        with pytest.raises(OSError, match="Input/output error"):
            copy.read_bytes()
        case = Case(str(base), str(copy), str(tmp_path / "out" / "run.zarr"))
        outcome = server.run(replace(case, no_populate=no_populate))
        assert outcome.error == "CheckpointError", outcome
        assert str(copy) in outcome.message
        assert "disk" in outcome.message
        assert (outcome.report["faults"] > 0) == no_populate
        if not no_populate:
            assert "at bytes" in outcome.message
        assert not Path(str(case.out)).exists()


# the SIGBUS guard and other people's faults

_FOREIGN = """
import mmap, os, signal, sys
{before}
import ckdiff
from ckdiff.kernels import guard

ckdiff.diff(sys.argv[1], sys.argv[2])  # it was installed and removed once
guard.install()
{after}
with open(sys.argv[3], "w+b") as file:
    file.truncate(8 * mmap.PAGESIZE)
    mapped = mmap.mmap(file.fileno(), 0)
    os.ftruncate(file.fileno(), 0)
    print("reading", flush=True)
    print(mapped[5 * mmap.PAGESIZE])
"""


def _foreign(case: Case, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    script = _FOREIGN.format(before=before, after=after)
    mine = str(Path(case.base).with_name("mine"))
    return subprocess.run(
        [sys.executable, "-c", script, case.base, case.tuned, mine],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=60,
    )


def test_foreign_fault_ends_the_process(case: Case) -> None:
    run = _foreign(case)
    assert run.returncode == -signal.SIGBUS, run
    assert run.stdout == "reading\n"


def test_foreign_fault_reaches_the_handler_before(case: Case) -> None:
    run = _foreign(case, before="import faulthandler; faulthandler.enable()")
    assert run.returncode == -signal.SIGBUS, run
    assert "Fatal Python error: Bus error" in run.stderr
    assert 'File "<string>", line' in run.stderr


def test_foreign_fault_after_the_guard_is_gone(case: Case) -> None:
    run = _foreign(
        case, before="import faulthandler; faulthandler.enable()", after="guard.remove()"
    )
    assert run.returncode == -signal.SIGBUS, run
    assert "Fatal Python error: Bus error" in run.stderr


def test_whoever_reads_a_mapping_is_guarded(case: Case) -> None:
    with closing(open_checkpoint(case.base)) as opened:
        first, second = opened.reader(), opened.reader()
        span = np.array([0], np.int64), np.array([0], np.int64), np.array([1], np.int64)
        found = []
        for step in (first.acquire, second.acquire, first.acquire):
            step(*span)
            found.append(guard._users)
        for close in (first.close, first.close, second.close):
            close()
            found.append(guard._users)
    assert found == [1, 2, 2, 1, 1, 0]


def test_handler_that_python_code_had_is_back_after_a_run(case: Case) -> None:
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGBUS, mine)
    try:
        ckdiff.diff(case.base, case.tuned)
        assert signal.getsignal(signal.SIGBUS) is mine
        with pytest.raises(AssertionError):
            signal.raise_signal(signal.SIGBUS)
    finally:
        signal.signal(signal.SIGBUS, before)
