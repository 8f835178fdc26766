"""Local checkpoints taken to a version where they lie: what comes out, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inplace_runs import (
    bf16_model,
    engine_lock,
    engine_pull,
    full_disk,
    marker_of,
    stepped,
    write_local,
)
from support import Tensor, write_safetensors
from weight_streams import read_model, read_stream, tree_digest, write_version

import ckdiff
from ckdiff.checkpoints.halfway import is_half_way
from ckdiff.deltas.versions.inplace import apply_in_place, recover
from ckdiff.deltas.versions.lock import locked
from ckdiff.errors import CheckpointError, CkdiffError, DeltaError, OutputError

Models = list[dict[str, Tensor]]


@pytest.fixture
def models() -> Models:
    """A model at versions 0 to 3."""
    found = [bf16_model()]
    for seed, share in enumerate((0.01, 0.2, 0.002)):
        found.append(stepped(found[-1], share, seed))
    return found


@pytest.fixture
def stream(tmp_path: Path, models: Models) -> Path:
    """Three deltas, of all encodings and digests."""
    path = tmp_path / "stream"
    kinds = (("xor", "xxh3-128"), ("overwrite", "adler32"), ("xor", "blake3"))
    for i, (encoding, checksum) in enumerate(kinds):
        if checksum == "blake3":
            pytest.importorskip("blake3")
        write_version(path, i + 1, models[i], models[i + 1], encoding=encoding, checksum=checksum,
                      shards=2)  # fmt: skip
    return path


def contents(local: Path) -> dict[str, str]:
    """All but what engines and ckdiff share."""
    return {k: v for k, v in tree_digest(local).items() if not k.startswith(".weight_sync")}


def refused(local: Path, stream: Path, match: str, kind: type[CkdiffError] = DeltaError) -> None:
    """The chain is refused, and nothing at all changes."""
    before, there = tree_digest(local), (local / ".weight_sync").exists()
    with pytest.raises(kind, match=match):
        apply_in_place(local, stream, workers=1)
    after = tree_digest(local)
    assert (local / ".weight_sync").exists() == there
    after.pop(".weight_sync/lock", None)
    before.pop(".weight_sync/lock", None)
    assert after == before


@pytest.mark.parametrize("target", [None, 1, 2, 3])
def test_it_is_what_an_engine_makes(
    tmp_path: Path, models: Models, stream: Path, target: int | None
) -> None:
    local = write_local(tmp_path / "local", models[0])
    plain = write_local(tmp_path / "plain", models[target or 3])
    done = apply_in_place(local, stream, target=target)
    assert read_model(local) == read_stream(models[0], stream, target or 3)
    assert contents(local) == contents(plain)
    assert marker_of(local) == done.version == (target or 3)
    assert done.before is None
    assert done.versions == list(range(1, (target or 3) + 1))
    assert done.tensors == 6
    assert sorted(os.listdir(local / ".weight_sync")) == ["lock", "state.json"]
    json.dumps(done.to_dict())


def test_step_by_step_and_nothing_to_do(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    for number in (1, 2, 3):
        apply_in_place(local, stream, target=number)
        assert read_model(local) == models[number]
        times = [path.stat().st_mtime_ns for path in sorted(local.iterdir())]
        again = apply_in_place(local, stream, target=number)
        assert (again.versions, again.tensors, again.before) == ([], 0, number)
        assert [path.stat().st_mtime_ns for path in sorted(local.iterdir())] == times
    refused_target = 2
    with pytest.raises(DeltaError, match="newer than 2"):
        apply_in_place(local, stream, target=refused_target)


def test_versions_one_by_one(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    paths = sorted(stream.iterdir())
    with pytest.raises(DeltaError, match="twice"):
        apply_in_place(local, [paths[0], paths[0]])
    with pytest.raises(DeltaError, match="made from"):
        apply_in_place(local, paths[1:])
    assert apply_in_place(local, paths[:2]).version == 2
    assert read_model(local) == models[2]


def test_only_touched_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bf16_model(rows=3000)
    tuned = dict(model)
    dtype, shape, data = model["layers.1.weight"]
    tuned["layers.1.weight"] = dtype, shape, data[:100_000] + b"\0\1\2" + data[100_003:]
    write_version(tmp_path / "s", 1, model, tuned)
    local = write_local(tmp_path / "local", model)
    written = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            written.append(len(data))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    apply_in_place(local, tmp_path / "s")
    assert 0 < sum(written) <= 2 * 4096
    assert read_model(local) == tuned


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_change(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    sizes = data.draw(st.lists(st.integers(0, 9000), min_size=1, max_size=5))
    seed = data.draw(st.integers(0, 1000))
    base: dict[str, Tensor] = {
        f"t{i}": ("U8", (n,), bytes((j * 7 + i) % 256 for j in range(n)))
        for i, n in enumerate(sizes)
    }
    tuned = stepped({k: v for k, v in base.items() if v[2]}, data.draw(st.floats(0, 1)), seed)
    tuned = base | tuned
    encoding = data.draw(st.sampled_from(["xor", "overwrite"]))
    write_version(folder / "s", 1, base, tuned, encoding=encoding)
    (folder / "local").mkdir()
    write_safetensors(folder / "local" / "model.safetensors", base)
    apply_in_place(folder / "local", folder / "s", workers=1)
    assert read_model(folder / "local") == tuned


# seeds


def test_a_full_version_takes_the_place(tmp_path: Path, models: Models, stream: Path) -> None:
    full = stream / "weight_v000004"
    full.mkdir()
    write_safetensors(full / "model.safetensors", models[1])
    (full / "tokenizer.json").write_text("{}")
    write_version(stream, 5, models[1], models[2])
    local = write_local(tmp_path / "local", models[0])
    done = apply_in_place(local, stream)
    assert (done.seed, done.versions, done.version) == (4, [5], 5)
    assert read_model(local) == models[2]
    names = {path.name for path in local.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "notes.md"} <= names
    assert not names & {"config.json", "model.safetensors.index.json"}
    assert len(list(local.glob("*.safetensors"))) == 1
    assert sorted(os.listdir(local / ".weight_sync")) == ["lock", "state.json"]
    assert marker_of(local) == 5


# refusals


def test_a_wrong_base(tmp_path: Path, models: Models, stream: Path) -> None:
    refused(write_local(tmp_path / "xor", models[1]), stream, "another digest")
    refused(write_local(tmp_path / "marked", models[0], version=1), stream, "another digest")
    refused(write_local(tmp_path / "late", models[0], version=9), stream, "newer")


def test_a_broken_late_version(tmp_path: Path, models: Models, stream: Path) -> None:
    path = sorted((stream / "weight_v000003").glob("*.safetensors"))[-1]
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    local = write_local(tmp_path / "local", models[0])
    refused(local, stream, "weight_v000003")
    assert apply_in_place(local, stream, target=2).version == 2


def test_a_missing_link(tmp_path: Path, models: Models, stream: Path) -> None:
    shutil.rmtree(stream / "weight_v000002")
    refused(write_local(tmp_path / "local", models[0]), stream, "missing")


def test_other_tensors(tmp_path: Path, models: Models, stream: Path) -> None:
    model = dict(models[0])
    model.pop("layers.2.weight")
    refused(write_local(tmp_path / "local", model), stream, "does not have")
    model["layers.2.weight"] = "BF16", (3, 64), bytes(3 * 128)
    refused(write_local(tmp_path / "other", model), stream, "holds")


def test_links_are_refused(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    shard = local / "model-00001-of-00002.safetensors"
    os.link(shard, tmp_path / "blob")
    refused(local, stream, "2 names", OutputError)
    shard.unlink()
    shard.symlink_to(tmp_path / "blob")
    refused(local, stream, "link", OutputError)
    assert read_model(local) == models[0]


def test_what_cannot_be_written(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    (local / "model-00001-of-00002.safetensors").chmod(0o444)
    if os.geteuid():
        refused(local, stream, "cannot be changed", OutputError)
    with pytest.raises(OutputError, match="not a directory"):
        apply_in_place(tmp_path / "none", stream)


def test_a_sync_folder_that_is_a_link(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    (tmp_path / "elsewhere").mkdir()
    (local / ".weight_sync").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="link"):
        apply_in_place(local, stream)
    assert not list((tmp_path / "elsewhere").iterdir())
    (local / ".weight_sync").unlink()
    (local / ".weight_sync").mkdir()
    (local / ".weight_sync" / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(OutputError, match="link"):
        apply_in_place(local, stream)
    assert not (tmp_path / "made").exists()


def test_a_full_disk(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    before = contents(local)
    with full_disk("pwrite"), pytest.raises(OutputError, match=r"No space.*free some"):
        apply_in_place(local, stream)
    assert contents(local) == before
    assert not (local / ".weight_sync").exists()
    assert apply_in_place(local, stream).version == 3


# the lock


def test_the_lock_is_waited_for(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    with engine_lock(local):
        with pytest.raises(OutputError, match=f"locked by process {os.getpid()}"):
            apply_in_place(local, stream, wait=0.1)
        waiting = threading.Thread(target=apply_in_place, args=(local, stream))
        waiting.start()
        time.sleep(0.2)
        assert marker_of(local) is None
    waiting.join()
    assert read_model(local) == models[3]


def test_a_lock_that_goes_with_its_directory(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    waiting = threading.Thread(target=apply_in_place, args=(local, stream))
    with suppress(KeyError), locked(local):
        waiting.start()
        time.sleep(0.2)
        raise KeyError
    waiting.join()
    assert read_model(local) == models[3]


def test_an_engine_and_ckdiff_take_turns(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    engine_pull(local, stream / "weight_v000001", 1)
    assert apply_in_place(local, stream, target=2).before == 1
    engine_pull(local, stream / "weight_v000003", 3)
    assert apply_in_place(local, stream).versions == []
    assert read_model(local) == models[3]


def test_a_reader_never_sees_half(tmp_path: Path, models: Models, stream: Path) -> None:
    local, seen = write_local(tmp_path / "local", models[0], version=0), []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with engine_lock(local):
                seen.append((marker_of(local), read_model(local)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in (1, 2, 3):
            apply_in_place(local, stream, target=number)
    finally:
        stop.set()
        reader.join()
    assert all(number is not None and model == models[number] for number, model in seen)


def test_several_at_once(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(apply_in_place(local, stream).versions))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [[], [], [], [1, 2, 3]]
    assert read_model(local) == models[3]


# half-way


def test_whole_checkpoints_are_not_half_way(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0])
    assert is_half_way(local) is None
    assert recover(local).version is None
    apply_in_place(local, stream, target=1)
    assert is_half_way(local) is None
    found = ckdiff.apply_in_place(local, undo=True)
    assert (found.version, found.recovered) == (1, None)
    (local / ".weight_sync" / "ckdiff-journal").write_text("left beside a marker")
    assert is_half_way(local) is None
    assert apply_in_place(local, stream).version == 3
    assert read_model(local) == models[3]


def test_a_marker_of_another_kind(tmp_path: Path, models: Models, stream: Path) -> None:
    local = write_local(tmp_path / "local", models[0], version=1)
    (local / ".weight_sync" / "state.json").write_text('{"version": 1}')
    refused(local, stream, "says no version", CkdiffError)


def test_not_safetensors(tmp_path: Path, stream: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        apply_in_place(local, stream)
