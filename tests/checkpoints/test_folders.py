"""Every folder keeps its promises, wherever its files are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from folders import PLACES, Files, local

from ckdiff.checkpoints.folders import Folder
from ckdiff.errors import CheckpointError

FILES: Files = {
    "a.safetensors": b"0123456789",
    ".metadata": b"m",
    "b/c/d.bin": b"deep",
    "b/e": b"",
    "b\nx": b"odd",
}


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    made: Folder = request.param(tmp_path / "f", FILES)
    return made


def test_names(folder: Folder) -> None:
    assert sorted(folder.names()) == [".metadata", "a.safetensors", "b\nx", "b/"]
    assert sorted(folder.names("b")) == ["c/", "e"]
    assert list(folder.names("b/c")) == ["d.bin"]
    for wrong in ("nothing", "b/nothing", "a.safetensors"):
        with pytest.raises(CheckpointError) as raised:
            folder.names(wrong)
        assert "\n" not in raised.value.one_line()


def test_reading(folder: Folder) -> None:
    assert folder.read("a.safetensors", 10) == b"0123456789"
    assert folder.read("b/e", 0) == b""
    with pytest.raises(ValueError, match="10 bytes, more than 9"):
        folder.read("a.safetensors", 9)
    assert folder.head("a.safetensors", 4) == b"0123"
    assert folder.head("a.safetensors", 1 << 40) == b"0123456789"
    assert [folder.size(name) for name in FILES] == [10, 1, 4, 0, 3]
    for act in (folder.size, lambda name: folder.head(name, 1), lambda name: folder.read(name, 1)):
        with pytest.raises(CheckpointError):
            act("b/nothing")


def test_links_are_followed_and_pipes_are_not_waited_for(tmp_path: Path) -> None:
    folder = local(tmp_path / "f", {"blobs/x": b"data", "real/y": b"z"})
    root = tmp_path / "f"
    (root / "link.safetensors").symlink_to("blobs/x")
    (root / "dir").symlink_to("real")
    (root / "gone").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    assert sorted(folder.names()) == ["blobs/", "dir/", "gone", "link.safetensors", "pipe", "real/"]
    assert folder.read("link.safetensors", 9) == b"data"
    assert list(folder.names("dir")) == ["y"]
    for name in ("gone", "pipe", "dir"):
        with pytest.raises(CheckpointError):
            folder.head(name, 1)


def test_what_cannot_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        local(tmp_path, {}).names("a\0b")
    with pytest.raises(CheckpointError):
        local(tmp_path, {}).read("a\0b", 1)
