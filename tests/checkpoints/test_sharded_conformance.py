"""Sharded training state passes what every kind of checkpoint does, tensors in pieces included."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import TENSORS, CheckpointTests, Source
from hub_server import only_hub
from sharded_state import distributed, rows, write_dcp, write_ranks
from test_conformance import Fetched, Streamed

import ckdiff
from ckdiff.checkpoints.contents import SHARDING
from ckdiff.checkpoints.opening import open_for_planning
from ckdiff.checkpoints.protocol import Checkpoint

torch = pytest.importorskip("torch")


def _tensors() -> dict[str, Any]:
    kinds = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}
    found = {}
    for name, (dtype, shape, data) in TENSORS.items():
        found[name] = torch.zeros(shape, dtype=kinds[dtype])
        if data:
            flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            found[name] = flat.view(kinds[dtype]).reshape(shape)
    return found


def _dcp(folder: Path) -> None:
    cuts = {"odd": rows((100_001,), 3), "a.w": rows((50, 1000), 4, 1), "c": rows((9001,), 2)}
    write_dcp(folder, _tensors(), cuts)


def _ranks(folder: Path) -> None:
    from torch.distributed.tensor import Shard

    def state(rank: int) -> Any:
        tensors = _tensors()
        for name, dim in (("odd", 0), ("a.w", 1), ("c", 0)):
            tensors[name] = distributed(tensors[name], (3,), [Shard(dim)])
        return tensors

    write_ranks(folder, 3, state)


def _pieces(folder: Path) -> None:
    cuts = {"odd": rows((100_001,), 2), "a.w": rows((50, 1000), 2, 1), "c": rows((9001,), 2)}
    for part in range(2):
        head: dict[str, Any] = {}
        said, body = {}, b""
        for name, tensor in _tensors().items():
            if name not in cuts and part:
                continue
            at, shape = cuts[name][part] if name in cuts else ((0,) * tensor.ndim, tensor.shape)
            box = tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))
            part_of = tensor[box].contiguous().reshape(-1)
            raw = part_of.view(torch.uint8).numpy().tobytes() if part_of.numel() else b""
            said[name] = {"saved_offsets": list(at)}
            span = [len(body), len(body) + len(raw)]
            dtype = TENSORS[name][0]
            head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
            body += raw
        text = json.dumps({"__metadata__": {SHARDING: json.dumps(said)}, **head}).encode()
        name = f"shard-{part + 1:05d}-model-00001-of-00001.safetensors"
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + body)


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "dcp": (_dcp, "__0_0.distcp"),
    "ranks": (_ranks, "model_world_size_3_rank_0.pt"),
    "pieces": (_pieces, "shard-00001-model-00001-of-00001.safetensors"),
}


@cache
def files_of(kind: str) -> dict[str, bytes]:
    """The files of the suite's tensors."""
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[kind][0](Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Sharded(Source):
    """The suite's tensors as ``kind`` has them, whatever files the suite asks for."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def put(self, files: Mapping[str, bytes]) -> None:
        self.write(files_of(self.kind))

    def write(self, files: Mapping[str, bytes]) -> None:
        self.folder.mkdir()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def open(self) -> Checkpoint:
        return open_for_planning(self.folder)

    def change(self, name: str, data: bytes) -> None:
        path = self.folder / WRITERS[self.kind][1]
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize("kind", WRITERS)
class TestSharded(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path, kind: str) -> Source:
        return Sharded(tmp_path / "model", kind)

    def test_it_is_in_pieces(self, checkpoint: Checkpoint) -> None:
        assert not checkpoint.in_files
        assert {checkpoint.table.names[i] for i in checkpoint.borders} == {"odd", "a.w", "c"}
        assert checkpoint.reader_memory(1 << 20) >= 1 << 20

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda data: data[:7],
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: b"\xff" * 64 + data[64:],
            lambda data: data.replace(b"U8", b"I8").replace(b"uint8", b"int16"),
            lambda data: bytes(len(data)),
        ],
    )
    def test_hostile_headers(self, source: Source, break_it: Callable[[bytes], bytes]) -> None:
        assert isinstance(source, Sharded)
        name = WRITERS[source.kind][1]
        files = files_of(source.kind)
        broken = break_it(files[name])
        if broken == files[name]:
            pytest.skip("it has nothing of the kind")
        source.write(files | {name: broken})
        with pytest.raises(ckdiff.CheckpointError) as caught:
            source.open()
        assert "\n" not in str(caught.value)
        assert str(source.folder) in str(caught.value)


class ShardedOnHub(Source):
    """The same files on the hub, fetched or streamed."""

    def __init__(self, place: Fetched | Streamed, kind: str) -> None:
        self.place, self.kind = place, kind

    def put(self, files: Mapping[str, bytes]) -> None:
        self.place.put(files_of(self.kind))

    def open(self) -> Checkpoint:
        return self.place.open()

    def change(self, name: str, data: bytes) -> None:
        name = WRITERS[self.kind][1]
        raw = bytearray(files_of(self.kind)[name])
        raw[len(raw) // 2] ^= 1
        self.place.change(name, bytes(raw))


# what is wrong with a file is told from the same bytes in every place: see ``TestSharded``


@pytest.mark.parametrize("kind", WRITERS)
class TestShardedFetched(CheckpointTests):
    test_hostile_headers = None

    @pytest.fixture
    def source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield ShardedOnHub(Fetched(hub, tmp_path / "home"), kind)


@pytest.mark.parametrize("kind", WRITERS)
class TestShardedStreamed(CheckpointTests):
    test_hostile_headers = None

    @pytest.fixture
    def source(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield ShardedOnHub(Streamed(hub), kind)
