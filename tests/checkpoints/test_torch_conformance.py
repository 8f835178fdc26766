"""Torch files pass what every kind of checkpoint does, in every place, views of them included."""

from __future__ import annotations

import ctypes
import json
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import TENSORS, CheckpointTests, Source
from hub_server import only_hub
from test_conformance import Fetched, Local, Streamed
from test_copied import unmapped  # noqa: F401 (a fixture)
from torch_files import saved

import ckdiff
from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint

_KINDS = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}


def tensors() -> dict[str, Any]:
    """The suite's tensors."""
    found = {}
    for name, (dtype, shape, data) in TENSORS.items():
        found[name] = torch.zeros(shape, dtype=_KINDS[dtype])
        if data:
            flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            found[name] = flat.view(_KINDS[dtype]).reshape(shape)
    return found


def odd_views() -> dict[str, Any]:
    """The same, none of them where its elements lie one after the other by themselves."""
    plain = tensors()
    wide = torch.zeros(100_001, 2, dtype=torch.uint8)
    wide[:, 1] = plain["odd"]
    both = torch.cat([torch.zeros(5, dtype=torch.uint8), plain["c"], plain["c"]])
    return {
        "odd": wide[:, 1],  # every second element
        "a.w": plain["a.w"].t().contiguous().t(),
        "empty": plain["empty"],
        "b.w": torch.nn.Parameter(plain["b.w"].expand(3)[1]),
        "c": both[5:9006],  # a part of a storage that others may share
    }


def _sharded() -> dict[str, bytes]:
    names = list(TENSORS)
    shards = {"pytorch_model-00001-of-00002.bin": names[:2]}
    shards["pytorch_model-00002-of-00002.bin"] = names[2:]
    every = tensors()
    index = {name: shard for shard, held in shards.items() for name in held}
    return {
        "pytorch_model.bin.index.json": json.dumps({"weight_map": index}).encode(),
        **{shard: saved({name: every[name] for name in held}) for shard, held in shards.items()},
    }


LAYOUTS: dict[str, Callable[[], dict[str, bytes]]] = {
    "one": lambda: {"pytorch_model.bin": saved(tensors())},
    "views": lambda: {"pytorch_model.bin": saved(odd_views())},
    "deep": lambda: {"last.ckpt": saved({"epoch": 3, "state_dict": tensors()})},
    "sharded": _sharded,
}


@cache
def files_of(layout: str) -> dict[str, bytes]:
    """The files of the suite's tensors."""
    return LAYOUTS[layout]()


class TorchTests(CheckpointTests):
    """The suite, of whatever files a layout has."""

    layout = "one"

    @pytest.fixture
    def place(self, tmp_path: Path) -> Any:
        return Local(tmp_path / "model")

    @pytest.fixture
    def source(self, place: Any) -> Source:
        return Instead(place, files_of(self.layout))

    @pytest.fixture(params=["empty", "zeros", "half", "pickle", "directory"])
    def broken(self, request: Any) -> Callable[[bytes], bytes]:
        ways: dict[str, Callable[[bytes], bytes]] = {
            "empty": lambda data: b"",
            "zeros": lambda data: bytes(len(data)),
            "half": lambda data: data[: len(data) // 2],
            "pickle": lambda data: data.replace(b"torch._utils", b"torch._utilz"),
            "directory": lambda data: data[:-40] + b"\xff" * 20 + data[-20:],
        }
        return ways[request.param]

    def test_hostile_headers(self, source: Source, broken: Callable[[bytes], bytes]) -> None:
        assert isinstance(source, Instead)
        name = source.last
        source.place.put(source.files | {name: broken(source.files[name])})
        with pytest.raises(ckdiff.CheckpointError) as caught:
            source.open()
        assert "\n" not in str(caught.value)


class Instead(Source):
    """Other files than the suite asks for, which hold the same tensors."""

    def __init__(self, place: Any, files: dict[str, bytes]) -> None:
        self.place, self.files = place, files
        self.last = list(files)[-1]  #: of the files that have tensors

    def put(self, files: Mapping[str, bytes]) -> None:
        self.place.put(self.files)

    def open(self) -> Checkpoint:
        opened = self.place.open()
        assert isinstance(opened, Checkpoint)
        return opened

    def change(self, name: str, data: bytes) -> None:
        """A flipped byte of the tensors that the suite then reads."""
        raw = self.files[self.last]
        for other in self.files:
            if TENSORS["odd"][2][:64] in self.files[other]:
                self.last, raw = other, self.files[other]
        changed = bytearray(raw)
        changed[len(raw) // 2] ^= 1
        self.place.change(self.last, bytes(changed))


# what is wrong with a file is told from the same bytes in every place: see ``TorchTests``


class TestOneFile(TorchTests):
    pass


class TestSharded(TorchTests):
    layout = "sharded"


class TestInsideOfMore(TorchTests):
    layout = "deep"


class TestViews(TorchTests):
    layout = "views"

    def test_what_is_gathered_is_counted(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.reader_memory(1 << 20) >= 1 << 20
        assert not checkpoint.in_files


@pytest.mark.usefixtures("unmapped")
class TestViewsThatCannotBeMapped(TestViews):
    test_hostile_headers = None


class TestShardedFetched(TestSharded):
    test_hostile_headers = None

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Fetched(hub, tmp_path / "home")


class TestViewsCached(TestViews):
    test_hostile_headers = None

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Fetched(hub, tmp_path / "home")

    @pytest.fixture
    def checkpoint(self, source: Source) -> Iterator[Checkpoint]:
        source.put({})
        with source.open() as first:
            first.fetch()
        with source.open() as opened:
            assert not opened.missing_bytes()
            yield opened


class TestShardedStreamed(TestSharded):
    test_hostile_headers = None

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Streamed(hub)


class TestViewsStreamed(TestViews):
    test_hostile_headers = None

    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Streamed(hub)


@pytest.mark.usefixtures("unmapped")
def test_a_transposed_matrix_takes_no_more_than_is_declared(tmp_path: Path) -> None:
    """A row of it lies all over the file, which may not be mapped."""
    matrix = torch.arange(1 << 22, dtype=torch.int32).view(2048, 2048)  # 16 MiB
    (tmp_path / "m.pt").write_bytes(saved({"m": matrix.t()}))
    window = 1 << 16
    wanted = np.array([[0], [2048 * 4 * 1000], [window]], np.int64)
    with open_checkpoint(tmp_path / "m.pt") as opened, closing(opened.reader()) as reader:
        with closing(opened.reader()) as other:  # who comes first has the kernels compiled
            other.acquire(*wanted)
            other.release()
        tracemalloc.start()
        (address,) = reader.acquire(*wanted).tolist()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found = np.frombuffer(ctypes.string_at(address, window), np.int32).reshape(8, 2048)
        assert np.array_equal(found, matrix.numpy().T[1000:1008])
        reader.release()
        assert window < most < opened.reader_memory(window) + (1 << 18) < 4 << 20
