"""A timeline that is killed on the way: nothing of it shows, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_pairs import files_of, write_sparse
from timelines import some_run, write_run

from ckdiff.layout import CHUNK
from ckdiff.outputs.cleaning import clean
from ckdiff.runs.timeline import timeline

KILLED = """
import os, signal, sys
from ckdiff.runs.timelines import run
from ckdiff.stores.workdir import WorkDir
from ckdiff.runs.timeline import timeline

where, stats, *paths = sys.argv[1:]
if where == "chunk":
    record = WorkDir.record
    def recorded(self, chunk, payload):
        record(self, chunk, payload)
        os.kill(os.getpid(), signal.SIGKILL)
    WorkDir.record = recorded
elif where == "tables":
    run.write_tables = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
else:
    WorkDir.commit = lambda self, manifest: os.kill(os.getpid(), signal.SIGKILL)
timeline(paths[:-1], paths[-1], workers=1, stats=stats == "True")
"""


def killed(where: str, paths: list[Path], out: Path, *, stats: bool = False) -> None:
    arguments = [where, str(stats), *map(str, paths), str(out)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("where", ["chunk", "tables", "commit"])
def test_killed_and_resumed(where: str, tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(1, 4))
    timeline(paths, tmp_path / "whole")
    killed(where, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.ckdiff-partial").is_dir()
    found = timeline(paths, tmp_path / "out")
    assert found.to_dict()["bytes_resumed"] == found.to_dict()["bytes_read"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def test_killed_while_it_is_continued(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(2, 5))
    timeline(paths, tmp_path / "whole")
    timeline(paths[:4], tmp_path / "out")
    before = files_of(tmp_path / "out")
    killed("commit", paths, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    timeline(paths, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_is_left_is_cleaned(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(3, 3))
    for where in ("chunk", "tables", "commit"):
        killed(where, paths, tmp_path / where, stats=where == "commit")
    clean(tmp_path)
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def test_objects_that_are_damaged_meanwhile_are_made_again(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(4, 3))
    timeline(paths, tmp_path / "whole")
    killed("commit", paths, tmp_path / "out")
    made = tmp_path / "out.ckdiff-partial" / "store" / "first_moves" / "c" / "0"
    made.write_bytes(bytes(os.path.getsize(made)))
    found = timeline(paths, tmp_path / "out")
    assert found.to_dict()["bytes_resumed"] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_several_chunks(tmp_path: Path) -> None:
    """Tensors over the borders of chunks and of objects of first moves; mostly holes."""
    size = CHUNK + (1 << 21)
    paths = []
    for i in range(3):
        at = [CHUNK - 3, CHUNK + 5, (1 << 23) - 1, 1 << 23][: i + 1] if i else []
        pieces = {"w": [(place, bytes([i])) for place in at]}
        file = tmp_path / f"c{i}.safetensors"
        paths.append(write_sparse(file, {"w": ("I8", (size,))}, pieces))
    found = timeline(paths, tmp_path / "out")
    assert [step["changed_since_first"] for step in found.steps] == [2, 3]
    moves = found.first_moves("w")
    assert {int(at): int(moves[at]) for at in moves.nonzero()[0]} == {
        CHUNK - 3: 1, CHUNK + 5: 1, (1 << 23) - 1: 2,
    }  # fmt: skip
