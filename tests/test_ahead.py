"""Advice to the disk is only advice: whatever the path is, nothing happens."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ckdiff import ahead


def settled() -> None:
    for thread in threading.enumerate():
        if thread.name == "ckdiff-ahead":
            thread.join(10)
            assert not thread.is_alive()


def test_asks_for_the_first_shard_of_each_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    for name in ("model-10.safetensors", "model-2.safetensors", "notes.txt"):
        (tmp_path / "base" / name).write_bytes(b"x" * 100)
    (tmp_path / "tuned.safetensors").write_bytes(b"y" * 100)
    asked = []

    def advise(fd: int, start: int, size: int, advice: int) -> None:
        asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), start))
        assert advice == os.POSIX_FADV_WILLNEED

    monkeypatch.setattr(os, "posix_fadvise", advise)
    ahead.start_reading(str(tmp_path / "base"), str(tmp_path / "tuned.safetensors"))
    settled()
    assert asked[:3] == [
        ("model-2.safetensors", 0),
        ("tuned.safetensors", 0),
        ("model-2.safetensors", 16 << 20),
    ]


@pytest.mark.parametrize("kind", ["missing", "empty folder", "fifo", "device", "null"])
def test_odd_places_are_left_alone(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    if kind == "empty folder":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "null":
        path = "a\0b"
    before = len(os.listdir("/proc/self/fd"))
    ahead.start_reading(path, path)
    settled()
    assert len(os.listdir("/proc/self/fd")) == before
