"""Local checkpoints: what a path means, what must not be opened, and files that change."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write_index, write_raw, write_safetensors
from torch_files import saved

import ckdiff
from ckdiff.checkpoints import open_checkpoint
from ckdiff.checkpoints.formats import safefiles
from ckdiff.checkpoints.formats.safetensors import header_from
from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.places.openfile import OpenFile, make_room
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, HeaderError, SourceChanged, UsageError

X = ("U8", (2,), b"xx")


@pytest.fixture(autouse=True)
def _no_descriptor_is_lost_and_nothing_blocks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    assert set(os.listdir("/proc/self/fd")) <= before


def refused(path: Path | str, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_local(path)
    line = caught.value.one_line()
    assert "\n" not in line
    for word in words:
        assert word in line
    return caught.value


def shards(directory: Path, *tensors: str) -> list[str]:
    """Shard ``i`` holds the tensors named in ``tensors[i]``, separated by blanks."""
    files = [f"model-{i + 1}-of-{len(tensors)}.safetensors" for i in range(len(tensors))]
    for file, names in zip(files, tensors, strict=True):
        write_safetensors(directory / file, dict.fromkeys(names.split(), X))
    return files


# -- what a path means -----------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"w": ("F32", (2,), b"12345678"), "x": X})
    with open_local(path) as got:
        assert got.label == "a.safetensors"
        assert got.table.names == ["w", "x"]
        assert got.table.nbytes.tolist() == [8, 2]
        assert [(f.name, f.size) for f in got.files] == [("a.safetensors", path.stat().st_size)]
        assert got.file_index.dtype == np.int32
        assert got.offset.dtype == np.int64
        file = got.open_files[0]
        assert os.pread(file.fd, 8, int(got.offset[0])) == b"12345678"
        assert not os.get_inheritable(file.fd)
        status = path.stat()
        assert file.identity == (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        assert json.loads(json.dumps(got.fingerprint())) == [["a.safetensors", *file.identity]]
        got.verify()
    got.close()


def test_a_directory_without_an_index_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        write_safetensors(tmp_path / f"m-{number}.safetensors", {f"w{number}": X})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._m-1.safetensors").write_bytes(b"left by another system")
    with open_local(tmp_path) as got:
        assert [file.name for file in got.files] == [f"m-{n}.safetensors" for n in (1, 9, 10)]
        assert got.table.names == ["w1", "w9", "w10"]
        assert got.file_index.tolist() == [0, 1, 2]
        assert got.label == tmp_path.name


def test_the_index_wins(tmp_path: Path) -> None:
    files = shards(tmp_path, "a b", "c")
    write_safetensors(tmp_path / "consolidated.safetensors", {"a": X, "b": X, "c": X})
    index = write_index(tmp_path, {"a": files[0], "b": files[0], "c": files[1]})
    for path in (tmp_path, index):
        with open_local(path) as got:
            assert [file.name for file in got.files] == files
            assert got.table.names == ["a", "b", "c"]


def test_an_index_of_another_name(tmp_path: Path) -> None:
    files = shards(tmp_path, "a", "b")
    first = write_index(tmp_path, {"a": files[0]}, "diffusion.safetensors.index.json")
    with open_local(tmp_path) as got:
        assert got.table.names == ["a"]
    write_index(tmp_path, {"b": files[1]}, "other.safetensors.index.json")
    refused(tmp_path, "2 indexes", "diffusion.safetensors.index.json, other")
    with open_local(first) as got:
        assert got.table.names == ["a"]
    write_index(tmp_path, {"b": files[1]})
    with open_local(tmp_path) as got:
        assert got.table.names == ["b"]


def test_shards_in_a_directory_below(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "sub" / "a.safetensors", {"a": X})
    write_index(tmp_path, {"a": "sub/a.safetensors"})
    with open_local(tmp_path) as got:
        assert [file.name for file in got.files] == ["sub/a.safetensors"]


def test_links_into_a_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_safetensors(blobs / "0123", {"a": X})
    write_safetensors(blobs / "4567", {"b": X})
    write_index(blobs, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, "89ab")
    for name, blob in (
        ("m-1.safetensors", "0123"),
        ("m-2.safetensors", "4567"),
        ("model.safetensors.index.json", "89ab"),
    ):
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    with open_local(snapshot) as got:
        assert got.table.names == ["a", "b"]
        assert [file.name for file in got.files] == ["m-1.safetensors", "m-2.safetensors"]
        got.verify()
    (blobs / "4567").unlink()
    refused(snapshot, "m-2.safetensors", "link to a file that does not exist")


def test_relative_paths_survive_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "here" / "a.safetensors", {"a": X})
    monkeypatch.chdir(tmp_path / "here")
    with open_local(".") as got:
        monkeypatch.chdir(tmp_path)
        assert got.label == "here"
        got.verify()


def test_nothing_to_open(tmp_path: Path) -> None:
    refused(tmp_path / "no", "does not exist")
    refused("", "does not exist")
    refused(tmp_path / "a\0b", "does not exist")
    refused(tmp_path / ("n" * 300), "does not exist")
    refused(tmp_path, "empty directory")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "old.pt").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin", "it is empty")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "old.pt").unlink()
    (tmp_path / "README.md").write_text("")
    refused(tmp_path, "holds no weights, only README.md")


def test_a_pickle_as_a_shard(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the pickle was executed",))

    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    bad = tmp_path / "b.safetensors"
    bad.write_bytes(pickle.dumps([Bomb(), 1]))
    error = refused(tmp_path, "b.safetensors", "pickle")
    assert isinstance(error, HeaderError)


# -- row 14: what is not a regular file ------------------------------------------------------------


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.mkdir()


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def put_empty(path: Path) -> None:
    path.write_bytes(b"")


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


ODD = [
    (put_fifo, "named pipe"),
    (put_directory, "directory"),
    (put_device, "device"),
    (put_socket, "socket"),
    (put_empty, "too short"),
    (put_loop, "bad.safetensors"),
]


@pytest.mark.parametrize(("put", "word"), ODD)
def test_a_shard_that_is_no_regular_file(tmp_path: Path, put: Any, word: str) -> None:
    bad = tmp_path / "bad.safetensors"
    put(bad)
    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    if put is put_directory:  # a folder of that name is no file that is left out
        with open_local(tmp_path) as got:
            assert len(got.files) == 1
        word = "not there"
    else:
        refused(bad, word)
        refused(tmp_path, "bad.safetensors", word)
    write_index(tmp_path, {"w": "bad.safetensors"})
    refused(tmp_path, "bad.safetensors", word)


@pytest.mark.parametrize(("put", "word"), [ODD[0], *ODD[2:4]])
def test_an_index_that_is_no_regular_file(tmp_path: Path, put: Any, word: str) -> None:
    shards(tmp_path, "a")
    put(tmp_path / "model.safetensors.index.json")
    refused(tmp_path, "index.json", word)


# -- row 11: the index is untrusted ----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "../a.safetensors",
        "sub/../../a.safetensors",
        "..",
        ".",
        "",
        "a//b",
        "/etc/passwd",
        "a\0.safetensors",
        "\ud800.safetensors",
        1,
        None,
        True,
        ["a.safetensors"],
        {"file": "a.safetensors"},
    ],
)
def test_file_names_that_must_not_be_opened(
    tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    directory = tmp_path / "model"
    write_safetensors(directory / "a.safetensors", {"a": X})
    write_index(directory, {"a": "a.safetensors", "b": value})
    opened: list[str] = []
    real = OpenFile.open

    def noted(path: str) -> OpenFile:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(OpenFile, "open", noted)
    refused(directory, "model.safetensors.index.json")
    assert [os.path.basename(path) for path in opened] == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map":{}}',
        b'{"weight_map":[]}',
        b'{"weight_map":null}',
        b'{"weight_map":{"a":"a.safetensors"}',
        b'{"weight_map":{"a":"a.safetensors"}}x',
        b'{"weight_map":{"a":"a.safetensors"},}',
        b'{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}',
        b'{"weight_map":{"a":"a.safetensors"},"weight_map":{"a":"a.safetensors"}}',
        b'{"metadata":{"x":1,"x":1},"weight_map":{"a":"a.safetensors"}}',
        b'{"metadata":{"x":NaN},"weight_map":{"a":"a.safetensors"}}',
        b'{"metadata":' + b"[" * 200_000 + b',"weight_map":{"a":"a.safetensors"}}',
        b'{"metadata":' + b"9" * 5000 + b',"weight_map":{"a":"a.safetensors"}}',
        b'{"metadata":"\xff","weight_map":{"a":"a.safetensors"}}',
        b'{"weight_map":{"\xff":"a.safetensors"}}',
        b'\xef\xbb\xbf{"weight_map":{"a":"a.safetensors"}}',
        '{"weight_map":{"a":"a.safetensors"}}'.encode("utf-16"),
    ],
)
def test_an_index_that_is_not_strict_json(tmp_path: Path, text: bytes) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    refused(tmp_path, "model.safetensors.index.json")


def test_an_index_with_blanks_and_other_keys(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    text = (
        ' \n{ "metadata": {"total_size": 1e9, "n": [-1, null]} ,'
        '"weight_map" : {"a": "a.safetensors"} , "x": ""}\n'
    )
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with open_local(tmp_path) as got:
        assert got.table.names == ["a"]


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    path = write_index(tmp_path, {"a": "a.safetensors"})
    os.truncate(path, 2**40)
    refused(tmp_path, "1,099,511,627,776 bytes")


# -- row 13: index and shards disagree -------------------------------------------------------------


def test_an_index_is_the_list(tmp_path: Path) -> None:
    shards(tmp_path, "a twice extra", "b twice moved")
    one, two = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
    weight_map = {"a": one, "b": two, "twice": two, "moved": one, "gone": two}
    write_index(tmp_path, weight_map)
    with open_local(tmp_path) as got:
        assert got.table.names == ["a", "b", "twice"]
        assert [got.files[i].name for i in got.file_index] == [one, two, two]
        assert sorted(got.table.absent) == ["gone", "moved"]
        left, lacking = got.notes
        assert "left out 1 tensor that the index does not list, 'extra' of" in left
        assert "lists 2 tensors that its files lack, such as 'moved'" in lacking
        assert "it is in model-2-of-2.safetensors" in lacking
        # what is in the files is all there for whoever makes them again
        assert got.as_stored().table.names == ["a", "twice", "extra", "b", "twice", "moved"]
        assert got.as_stored().in_files


def test_a_key_that_is_of_no_use_is_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, {"w": ("F32", (1,), bytes(4))})
    (tmp_path / "c.pt").write_bytes(saved({"x": {"w": torch.zeros(1)}, "y": {"w": torch.ones(1)}}))
    with open_local(tmp_path / "a", key="x") as got:
        assert got.notes == ("warning: --key x is not used: a is no torch file",)
    with open_local(tmp_path / "c.pt", key="x") as got:
        assert got.notes == ()
    said: list[str] = []
    for tuned in ("b", "c.pt"):
        observer = ckdiff.Observer(note=said.append)
        ckdiff.diff(tmp_path / "a", tmp_path / tuned, key="x", observer=observer)
    about = [note for note in said if "key" in note]
    assert about == ["warning: --key x is not used: neither side is a torch file"]


def test_a_file_that_an_index_lists_and_that_is_not_there(tmp_path: Path) -> None:
    files = shards(tmp_path, "a", "b")
    write_index(tmp_path, {"a": files[0], "c": "model-3.safetensors"})
    said = "lists 2 files, and 1 of them is not there: model-3.safetensors; 1 is: "
    refused(tmp_path, f"{said}{files[0]} (")
    write_index(tmp_path, {"c": "model-3.safetensors"})
    refused(tmp_path, "lists one file, which is not there: model-3.safetensors; there lie ")
    write_index(tmp_path, {"c": "model-3.safetensors", "d": "model-4.safetensors"})
    refused(tmp_path, "lists 2 files, and none of them exists: model-3.safetensors, model-4.")


def test_of_a_numbered_set_that_lacks_one_the_others_are_named_one_by_one(tmp_path: Path) -> None:
    names = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    write_index(tmp_path, {str(i): name for i, name in enumerate(names)})
    for name in names:
        if name != names[2]:
            write_safetensors(tmp_path / name, {"w": ("F32", (1,), bytes(4))})
    there = f"{names[0]}, {names[1]}, {names[3]} and 1 more"
    refused(tmp_path, f"lists 5 files, and 1 of them is not there: {names[2]}; 4 are: {there}")


def test_a_shard_that_the_index_does_not_name_does_not_count(tmp_path: Path) -> None:
    files = shards(tmp_path, "a", "a b")
    write_index(tmp_path, {"a": files[0]})
    with open_local(tmp_path) as got:
        assert [file.name for file in got.files] == files[:1]


def test_a_tensor_in_two_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path, "a b", "b c", "c")
    refused(tmp_path, "is not one model", "'b' is in both", "no index says which counts")


def test_many_broken_headers_are_cut(tmp_path: Path) -> None:
    for i in range(1000):
        write_raw(tmp_path / f"{i}.safetensors", b"{,}")
    error = refused(tmp_path, "1,000 problems", "2.safetensors", "and 997 more")
    assert "3.safetensors" not in str(error)


def test_a_long_list_of_file_names_is_cut(tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{i}": f"/{i}.safetensors" for i in range(1000)})
    error = refused(tmp_path, "'/2.safetensors'", "and 997 more")
    assert "'/3.safetensors'" not in str(error)


def test_several_broken_headers(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", b"{,}")
    write_raw(tmp_path / "b.safetensors", b"{,}")
    assert isinstance(refused(tmp_path, "a.safetensors", "b.safetensors"), HeaderError)


# -- files that change -----------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Checkpoint]:
    write_safetensors(tmp_path / "a.safetensors", {"a": X})
    with open_local(tmp_path / "a.safetensors") as checkpoint:
        yield checkpoint


def changed(checkpoint: Checkpoint, word: str) -> None:
    for _ in range(2):
        with pytest.raises(SourceChanged, match=word) as caught:
            checkpoint.verify()
        assert checkpoint.open_files[0].path in str(caught.value)
        assert caught.value.hint


def test_truncated(opened: Checkpoint) -> None:
    os.truncate(opened.open_files[0].path, 20)
    changed(opened, "truncated from .* to 20 bytes")


def test_grown(opened: Checkpoint) -> None:
    with open(opened.open_files[0].path, "ab") as file:
        file.write(b"more")
    changed(opened, "grew")


def test_rewritten_in_place(opened: Checkpoint) -> None:
    path = Path(opened.open_files[0].path)
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)
    later = opened.open_files[0].identity[3] + 10**9
    os.utime(path, ns=(later, later))
    changed(opened, "rewritten")


def test_rewritten_with_its_old_time(opened: Checkpoint) -> None:
    file = opened.open_files[0]
    os.utime(file.path, ns=(1, 1))
    os.utime(file.path, ns=(1, file.identity[3]))
    changed(opened, "touched")


def test_removed(opened: Checkpoint) -> None:
    os.unlink(opened.open_files[0].path)
    changed(opened, "removed")


def test_replaced(opened: Checkpoint, tmp_path: Path) -> None:
    other = write_safetensors(tmp_path / "new", {"a": X})
    os.replace(other, opened.open_files[0].path)
    changed(opened, "replaced")


def test_a_link_that_leads_elsewhere(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one", {"a": X})
    write_safetensors(tmp_path / "two", {"a": X})
    link = tmp_path / "a.safetensors"
    link.symlink_to("one")
    with open_local(link) as got:
        link.unlink()
        link.symlink_to("two")
        changed(got, "replaced")
        link.unlink()
        changed(got, "removed")


def test_a_change_while_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"a": X})

    def slow(read: Any, size: int, file: str) -> Any:
        header = header_from(read, size, file)
        os.truncate(path, size - 1)
        return header

    monkeypatch.setattr(safefiles, "header_from", slow)
    with pytest.raises(SourceChanged, match="truncated"):
        open_local(path)


# -- many shards -----------------------------------------------------------------------------------


def test_the_soft_limit_on_open_files_is_raised(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(300):
        write_safetensors(tmp_path / f"{i}.safetensors", {f"w{i}": X})
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with open_local(tmp_path) as got:
            assert len(got.open_files) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hard_limit_is_a_clear_error(tmp_path: Path) -> None:
    for i in range(300):
        write_safetensors(tmp_path / f"{i}.safetensors", {f"w{i}": X})
    code = (
        "import resource, sys\n"
        "from ckdiff.checkpoints import open_checkpoint\n"
        "from ckdiff.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "try:\n"
        "    open_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error:\n"
        "    print(error.one_line())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert "300 shards" in done.stdout
    assert "ulimit" in done.stdout


def test_no_limit_is_touched_without_need() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    make_room(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


# -- the one door ----------------------------------------------------------------------------------


def test_open_checkpoint(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"a": X})
    for way in (path, str(path)):
        checkpoint = open_checkpoint(way)
        assert open_checkpoint(checkpoint) is checkpoint
        checkpoint.close()


@pytest.mark.parametrize("value", [None, 3, b"path", ["a"]])
def test_what_is_no_path(value: Any) -> None:
    with pytest.raises(UsageError):
        open_checkpoint(value)


def test_a_checkpoint_that_is_half_way_between_two_versions(tmp_path: Path) -> None:
    shards(tmp_path, "a")
    sync = tmp_path / ".weight_sync"
    sync.mkdir()
    (sync / "ckdiff-journal").write_bytes(b"x")
    refused(tmp_path, "halfway between two versions", "--in-place finishes that")
    (sync / "state.json").write_text('{"version": "000001"}')
    with open_local(tmp_path) as got:  # the marker says that it is whole
        assert len(got.table) == 1
