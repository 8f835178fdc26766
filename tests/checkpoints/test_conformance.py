"""Each kind of checkpoint passes the same tests, and nobody asks of which kind one is."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import FILES, TENSORS, CheckpointTests, Source
from hub_server import Hub, only_hub

import ckdiff
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_for_planning, open_for_streaming
from ckdiff.checkpoints.places.hub.streamed import StreamedPlace
from ckdiff.checkpoints.places.local import LocalPlace
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, TensorTable

PACKAGE = Path(ckdiff.__file__).parent


class Local(Source):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, files: Mapping[str, bytes]) -> None:
        self.folder.mkdir()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def open(self) -> Checkpoint:
        return open_for_planning(self.folder)

    def change(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)


class OnHub(Source):
    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def put(self, files: Mapping[str, bytes]) -> None:
        self.hub.put("me/model", files)

    def open(self) -> Checkpoint:
        return open_for_planning("hf://me/model")

    def change(self, name: str, data: bytes) -> None:
        self.hub.repositories["me/model"]["main"].files[name] = data


class Fetched(OnHub):
    """Of what was fetched, the files in the cache are what counts."""

    def __init__(self, hub: Hub, home: Path) -> None:
        super().__init__(hub)
        self.home = home

    def change(self, name: str, data: bytes) -> None:
        (path,) = self.home.rglob(f"snapshots/*/{name}")
        path.write_bytes(data)


class Streamed(OnHub):
    def open(self) -> Checkpoint:
        return open_for_streaming("hf://me/model")


class TestLocal(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return Local(tmp_path / "model")


class TestFetched(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Fetched(hub, tmp_path / "home")


class TestCached(TestFetched):
    """All of it is in the cache before it is opened."""

    @pytest.fixture
    def checkpoint(self, source: Source) -> Iterator[Checkpoint]:
        source.put(FILES)
        with source.open() as first:
            first.fetch()
        with source.open() as opened:
            assert not opened.missing_bytes()
            yield opened


class TestStreamed(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield Streamed(hub)


# a kind that has nothing but what it must


class Reader:
    def __init__(self, arrays: list[np.ndarray[Any, Any]]) -> None:
        self._arrays = arrays

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        begins = np.array([self._arrays[i].ctypes.data for i in tensors.tolist()], np.int64)
        return begins + starts

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        pass

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class InMemory(Checkpoint):
    def __init__(self, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
        self.label = "a dict"
        self._arrays = [np.frombuffer(data, np.uint8) for _, _, data in tensors.values()]
        kinds = [(dtype, shape) for dtype, shape, _ in tensors.values()]
        self.table = TensorTable(
            list(tensors),
            [dtype for dtype, _ in kinds],
            [shape for _, shape in kinds],
            np.array([len(array) for array in self._arrays], np.int64),
        )

    def reader(self) -> Reader:
        return Reader(self._arrays)

    def fingerprint(self) -> list[Any]:
        return [array.tobytes().hex()[:1000] for array in self._arrays]


def test_the_defaults_are_enough(tmp_path: Path) -> None:
    dtype, shape, data = TENSORS["odd"]
    changed = TENSORS | {"odd": (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))}
    one, other = InMemory(TENSORS), InMemory(changed)
    found = ckdiff.diff(one, other, tmp_path / "run.zarr")
    assert found.rules["exact"]["changed"] == 1
    assert found.store is not None
    found.store.check()
    with pytest.raises(ckdiff.CheckpointError, match="a dict"):
        ckdiff.export_masks(found.store, tmp_path / "z", like=one)
    # what has no files is written as the file that it would be
    ckdiff.delta(one, other, tmp_path / "y")
    ckdiff.apply(one, tmp_path / "y", tmp_path / "applied.safetensors")
    ckdiff.graft(one, other, found.store, tmp_path / "grafted.safetensors")
    made = (tmp_path / f"{done}.safetensors" for done in ("applied", "grafted"))
    assert len({path.read_bytes() for path in made}) == 1
    assert ckdiff.diff(tmp_path / "applied.safetensors", other).rules["exact"]["changed"] == 0
    with pytest.raises(ckdiff.UsageError, match="only here"):
        one.recipe()


# who asks


def test_nobody_asks_of_which_kind_it_is() -> None:
    mine = (*FileCheckpoint.__mro__, *LocalPlace.__mro__, *StreamedPlace.__mro__)
    kinds = {kind.__name__ for kind in mine}
    kinds -= {"object", "ABC"}
    members = {name for name in vars(Checkpoint) if not name.startswith("_")}
    members |= set(Checkpoint.__annotations__)
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "checkpoints"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            asked = {n.value for n in node.args[1:2] if isinstance(n, ast.Constant)}
            named = {n.id for a in node.args[1:] for n in ast.walk(a) if isinstance(n, ast.Name)}
            guesses = node.func.id in ("hasattr", "getattr") and asked & members
            if guesses or (node.func.id in ("isinstance", "issubclass") and named & kinds):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
