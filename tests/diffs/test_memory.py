"""Memory as the system sees it, while checkpoints much larger than the limit are compared.

The numbers of the sections are rows of the list of faults that the project keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import write_sparse

from ckdiff.budget import cgroup_limit

MIB = 1 << 20
GIB = 1 << 30
_SAMPLE = 0.003  # seconds
_SCRIPT = """
import json, sys
import ckdiff
arguments = json.loads(sys.argv[1])
result = ckdiff.diff(arguments.pop("base"), arguments.pop("tuned"), **arguments)
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM"))
print(json.dumps([result.rules, int(peak.split()[1]) << 10]))
"""


@dataclass
class Usage:
    """The largest values seen, in bytes."""

    anonymous: int = 0
    resident: int = 0  #: mapped files included
    peak: int = 0  #: resident, as the system kept track of it
    samples: int = 0
    rules: dict[str, Any] | None = None


def write_pair(folder: Path, size: int, changed: int) -> dict[str, Any]:
    """Two checkpoints of ``size`` bytes of holes, with that many changed elements."""
    folder.mkdir(exist_ok=True)
    each = size // 8
    tensors = {f"layers.{i}.w": ("BF16", (each // 2,), each) for i in range(8)}
    step = size // changed
    edits: dict[str, dict[int, bytes]] = {name: {} for name in tensors}
    for at in range(changed):
        tensor, offset = divmod(at * step, each)
        edits[f"layers.{tensor}.w"][offset // 2 * 2] = b"\x80\x3f"
    return {
        "base": str(write_sparse(folder / "base.safetensors", tensors)),
        "tuned": str(write_sparse(folder / "tuned.safetensors", tensors, edits)),
    }


def measure(arguments: dict[str, Any], group: Path | None = None) -> Usage:
    """Run a diff in a process of its own and watch its memory."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=join,
    )
    usage = Usage()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        values = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in values:
            usage.anonymous = max(usage.anonymous, int(values["RssAnon"].split()[0]) << 10)
            usage.resident = max(usage.resident, int(values["VmRSS"].split()[0]) << 10)
            usage.samples += 1
        time.sleep(_SAMPLE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, err[-2000:])
    usage.rules, usage.peak = json.loads(out)
    return usage


@pytest.fixture(scope="module")
def pair_of_1_gib(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_pair(tmp_path_factory.mktemp("one"), GIB, 1000)


def test_peak_does_not_depend_on_the_size(pair_of_1_gib: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 2}
    measure(pair_of_1_gib)  # compiles the kernels where no earlier run has
    small = measure(pair_of_1_gib | options | {"out": str(tmp_path / "small.zarr")})
    pair = write_pair(tmp_path / "four", 4 * GIB, 1000)
    large = measure(pair | options | {"out": str(tmp_path / "large.zarr")})
    for path in pair.values():
        os.unlink(path)  # gives the page cache back
    for usage in (small, large):
        assert usage.rules is not None
        assert usage.rules["exact"]["changed"] == 1000
        assert usage.samples > 20
        assert usage.anonymous <= 256 * MIB
        assert max(usage.resident, usage.peak) <= 512 * MIB
    assert abs(large.anonymous - small.anonymous) < 32 * MIB
    assert abs(large.peak - small.peak) < 64 * MIB


@pytest.mark.parametrize("memory", [160, 512])
def test_memory_option_is_kept(pair_of_1_gib: dict[str, Any], tmp_path: Path, memory: int) -> None:
    """With several rules, statistics and four workers: what costs most."""
    usage = measure(
        pair_of_1_gib
        | {"rules": ["exact", "atol=1e-5", "ulp=1"], "stats": True, "workers": 4}
        | {"memory": f"{memory}MiB", "out": str(tmp_path / "run.zarr")}
    )
    assert usage.rules is not None
    assert usage.rules["atol=1e-5"]["changed"] == 1000
    assert usage.anonymous <= memory * MIB


# 34: a small control group


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A child of our own memory group with that limit; skips where that is not permitted."""
    mine: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mine |= dict.fromkeys(controllers.split(","), path)
    candidates = [(Path("/sys/fs/cgroup"), mine.get(""), "memory.max")]
    if "memory" in mine:
        root = Path("/sys/fs/cgroup/memory")
        candidates.insert(0, (root, mine["memory"], "memory.limit_in_bytes"))
    for root, path, name in candidates:
        if path is None:
            continue
        parent = root / path.lstrip("/")
        group = (parent if parent.is_dir() else root) / f"ckdiff-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            try:
                (group / name).write_text(str(limit))
            except OSError:
                continue
            yield group
            return
        finally:
            _remove(group)
    pytest.skip("making a memory control group is not permitted here")


def _remove(group: Path) -> None:
    for _ in range(100):  # the group is busy until its last process is gone for good
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return


def test_control_group_of_384_megabytes(pair_of_1_gib: dict[str, Any], tmp_path: Path) -> None:
    limit = 384_000_000
    for path in pair_of_1_gib.values():  # what others have put into the page cache is on their bill
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    with control_group(limit) as group:
        usage = measure(pair_of_1_gib | {"out": str(tmp_path / "run.zarr")}, group)
        peak = group / "memory.max_usage_in_bytes"
        if peak.exists():  # it really was squeezed
            assert limit // 2 < int(peak.read_text()) <= limit
    assert usage.rules is not None
    assert usage.rules["exact"]["changed"] == 1000
    assert usage.anonymous <= limit // 2


def test_default_budget_follows_the_control_group(pair_of_1_gib: dict[str, Any]) -> None:
    script = "from ckdiff import budget; print(budget.cgroup_limit(), budget.default_memory(2))"
    before = cgroup_limit()
    limit = 300 * MIB
    with control_group(limit) as group:
        command = f"echo $$ > {group}/cgroup.procs; exec {sys.executable} -c '{script}'"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, env=environment, check=True
        )
    assert before is None or before >= limit
    assert run.stdout.split() == [str(limit), str(limit // 2)]


def test_control_group_that_is_too_small(pair_of_1_gib: dict[str, Any]) -> None:
    """Refused before any work, instead of being killed in the middle of it."""
    with (
        control_group(100 * MIB) as group,
        pytest.raises(AssertionError, match="too little"),
    ):
        measure(pair_of_1_gib, group)
