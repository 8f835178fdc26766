"""What is brought to the disk before an output gets its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckdiff.outputs.placing import sync_tree


def some_tree(root: Path) -> set[int]:
    """Files in folders, and one that is empty; the inodes of all, the root included."""
    for name in ("manifest", "masks/exact/c/0", "masks/exact/c/1", "masks/exact/zarr.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "empty").mkdir()
    return {path.stat().st_ino for path in (root, *root.rglob("*"))}


def test_every_file_and_folder_is_brought_to_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, asked = some_tree(tmp_path), list[int]()
    monkeypatch.setattr(os, "fsync", lambda fd: asked.append(os.fstat(fd).st_ino))
    sync_tree(tmp_path)
    assert sorted(asked) == sorted(there)


def test_a_disk_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_tree(tmp_path)
    broken = (tmp_path / "masks/exact/c/1").stat().st_ino

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_ino == broken:
            raise OSError(errno.EIO, "it broke")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="it broke"):
        sync_tree(tmp_path)
