"""What every kind of checkpoint has to do, as tests: those of a kind inherit them."""

from __future__ import annotations

import ctypes
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import sharded
from support import Tensor

import ckdiff
from ckdiff.checkpoints.opening import open_recipe
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.errors import CheckpointError, SourceChanged, StoreError
from ckdiff.outputs.checks import check_place

_NOISE = np.random.default_rng(7)


def _noise(size: int) -> bytes:
    return _NOISE.integers(0, 256, size, np.uint8).tobytes()


#: odd sizes put what follows at odd offsets, and one tensor has no elements
SHARDS: dict[str, dict[str, Tensor]] = {
    "model-1.safetensors": {
        "odd": ("U8", (100_001,), _noise(100_001)),
        "a.w": ("BF16", (50, 1000), _noise(100_000)),
        "empty": ("F32", (0, 3), b""),
    },
    "model-2.safetensors": {"b.w": ("F32", (), _noise(4)), "c": ("U8", (9001,), _noise(9001))},
}
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}
FILES = sharded(SHARDS)
(INDEX,) = set(FILES) - set(SHARDS)

Span = tuple[str, int, int]  #: tensor, first byte, bytes


class Source(ABC):
    """Where a checkpoint of the kind is made."""

    @abstractmethod
    def put(self, files: Mapping[str, bytes]) -> None:
        """Make it of these files."""

    @abstractmethod
    def open(self) -> Checkpoint:
        """Open it as commands do: what is not here is not fetched."""

    @abstractmethod
    def change(self, name: str, data: bytes) -> None:
        """Another file of the same length under the name of one that was opened."""


def columns(checkpoint: Checkpoint, spans: list[Span]) -> tuple[Any, Any, Any]:
    at = {name: i for i, name in enumerate(checkpoint.table.names)}
    numbers = [(at[name], start, size) for name, start, size in spans]
    tensors, starts, sizes = np.array(numbers, np.int64).reshape(-1, 3).T.copy()
    return tensors, starts, sizes


def held(addresses: Any, spans: list[Span]) -> list[bytes]:
    sizes = [size for _, _, size in spans]
    return [ctypes.string_at(a, n) for a, n in zip(addresses.tolist(), sizes, strict=True)]


def expected(spans: list[Span]) -> list[bytes]:
    return [TENSORS[name][2][start : start + size] for name, start, size in spans]


def read(checkpoint: Checkpoint, reader: SpanReader, spans: list[Span]) -> list[bytes]:
    """A window, as bytes that outlive it."""
    found = held(reader.acquire(*columns(checkpoint, spans)), spans)
    reader.release()
    return found


def some_spans(noise: random.Random, count: int) -> list[Span]:
    """Of any tensor, at any byte, of any length, also twice the same."""
    found = []
    for _ in range(count):
        name = noise.choice(sorted(TENSORS))
        size = len(TENSORS[name][2])
        start = noise.randint(0, size)
        found.append((name, start, noise.choice([0, 1, 7, noise.randint(0, size)])))
    return [(name, start, min(n, len(TENSORS[name][2]) - start)) for name, start, n in found]


class CheckpointTests:
    """Inherited by the tests of each kind, which gives the fixture ``source``."""

    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def checkpoint(self, source: Source) -> Any:
        source.put(FILES)
        with source.open() as opened:
            opened.fetch()
            yield opened

    # what it says of itself

    def test_the_table(self, checkpoint: Checkpoint) -> None:
        table = checkpoint.table
        kinds = zip(table.dtypes, table.shapes, table.nbytes.tolist(), strict=True)
        found = dict(zip(table.names, kinds, strict=True))
        assert found == {name: (d, s, len(data)) for name, (d, s, data) in TENSORS.items()}
        assert checkpoint.label
        assert len(checkpoint.open_files) in (0, len(checkpoint.files))
        json.dumps(dict(checkpoint.origin))

    def test_its_files(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.in_files:
            return
        assert [file.name for file in checkpoint.files] == list(SHARDS)
        for i, file in enumerate(checkpoint.files):
            data, head = FILES[file.name], checkpoint.head(i)
            assert file.size == len(data)
            assert head == data[: 8 + int.from_bytes(data[:8], "little")]
        assert (checkpoint.index_name, checkpoint.index()) == (INDEX, FILES[INDEX])
        for tensor, name in enumerate(checkpoint.table.names):
            file, begin = int(checkpoint.file_index[tensor]), int(checkpoint.offset[tensor])
            data = TENSORS[name][2]
            assert FILES[checkpoint.files[file].name][begin : begin + len(data)] == data

    def test_the_table_is_known_before_it_is_fetched(self, source: Source) -> None:
        source.put(FILES)
        with source.open() as opened:
            before = opened.table.names, opened.offset.tolist(), opened.directory
            if opened.missing_bytes():
                with pytest.raises(CheckpointError):
                    opened.reader()
            for _ in range(2):
                opened.fetch()
                assert not opened.missing_bytes()
            assert (opened.table.names, opened.offset.tolist(), opened.directory) == before
            with closing(opened.reader()) as reader:
                spans = [("b.w", 0, 4)]
                assert read(opened, reader, spans) == expected(spans)

    def test_no_output_lies_inside_or_replaces_it(self, checkpoint: Checkpoint) -> None:
        inside = [] if checkpoint.directory is None else [f"{checkpoint.directory}/out"]
        for path in [*(file.path for file in checkpoint.open_files), *inside]:
            with pytest.raises(StoreError):
                check_place(Path(path), [checkpoint])

    def test_two_openings_of_one_thing_are_the_same(
        self, checkpoint: Checkpoint, source: Source
    ) -> None:
        with source.open() as other:
            other.fetch()
            for ask in (Checkpoint.fingerprint, Checkpoint.seen):
                name = ask.__name__
                first, second = (json.dumps(getattr(side, name)()) for side in (checkpoint, other))
                assert first == second

    # reading

    @pytest.mark.parametrize("ahead", [0, 1, 3])
    def test_any_spans_in_any_order(self, checkpoint: Checkpoint, ahead: int) -> None:
        noise = random.Random(ahead)
        windows = [some_spans(noise, noise.randint(0, 9)) for _ in range(20)]
        with closing(checkpoint.reader()) as reader:
            for i, spans in enumerate(windows):
                for coming in windows[i + 1 : i + 1 + ahead]:
                    reader.prefetch(*columns(checkpoint, coming))
                assert read(checkpoint, reader, spans) == expected(spans)

    def test_windows_that_are_asked_for_and_never_read(self, checkpoint: Checkpoint) -> None:
        spans = [("odd", 3, 50_000), ("c", 1, 9000)]
        checkpoint.read_ahead(*columns(checkpoint, spans))
        with closing(checkpoint.reader()) as reader:
            reader.prefetch(*columns(checkpoint, spans))
            other = [("a.w", 1, 99_999)]
            assert read(checkpoint, reader, other) == expected(other)

    def test_addresses_hold_until_the_release(self, checkpoint: Checkpoint) -> None:
        first, second = [("odd", 1, 1000)], [("a.w", 5, 1000), ("c", 0, 9001)]
        with closing(checkpoint.reader()) as reader, closing(checkpoint.reader()) as another:
            addresses = reader.acquire(*columns(checkpoint, first))
            assert read(checkpoint, another, second) == expected(second)
            assert held(addresses, first) == expected(first)

    def test_a_reader_for_each_worker(self, checkpoint: Checkpoint) -> None:
        def work(seed: int) -> bool:
            noise = random.Random(seed)
            with closing(checkpoint.reader()) as reader:
                windows = [some_spans(noise, 5) for _ in range(10)]
                return all(read(checkpoint, reader, w) == expected(w) for w in windows)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))
        assert checkpoint.reader_memory(1 << 20) >= 0

    def test_closing_more_than_once(self, source: Source) -> None:
        source.put(FILES)
        opened = source.open()
        opened.fetch()
        reader = opened.reader()
        read(opened, reader, [("c", 0, 1)])
        for close in (reader.close, reader.close, opened.close, opened.close):
            close()
        with pytest.raises(CheckpointError), closing(opened.reader()) as reader:
            reader.acquire(*columns(opened, [("c", 0, 1)]))

    def test_a_source_that_changes(self, checkpoint: Checkpoint, source: Source) -> None:
        name = "model-1.safetensors"
        data = bytearray(FILES[name])
        data[-1] ^= 1
        with closing(checkpoint.reader()) as reader:
            spans = [("odd", 0, 10)]
            assert read(checkpoint, reader, spans) == expected(spans)
            source.change(name, bytes(data))

            def read_on() -> None:
                read(checkpoint, reader, [("a.w", 0, 100_000)])
                checkpoint.verify()

            with pytest.raises(SourceChanged):
                read_on()

    # elsewhere, and hostile

    def test_a_recipe_travels(self, checkpoint: Checkpoint) -> None:
        recipe = checkpoint.recipe()
        assert isinstance(json.loads(recipe), dict)
        with open_recipe(recipe) as opened:
            assert opened.seen() == checkpoint.seen()
            with closing(opened.reader()) as reader:
                spans = some_spans(random.Random(1), 9)
                assert read(opened, reader, spans) == expected(spans)

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda data: data[:7],
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: len(data).to_bytes(8, "little") + data[8:],
            lambda data: data[:8] + b"[" + data[9:],
            lambda data: data.replace(b'"odd"', b'"a.w"', 1),
            lambda data: data.replace(b"[0,100001]", b"[1,100002]", 1),
            lambda data: data.replace(b"[100001]", b"[100002]", 1),
            lambda data: data[:-1],
            lambda data: data + b"x",
        ],
    )
    def test_hostile_headers(self, source: Source, break_it: Callable[[bytes], bytes]) -> None:
        name = "model-1.safetensors"
        source.put(FILES | {name: break_it(FILES[name])})
        with pytest.raises(ckdiff.CheckpointError) as caught:
            source.open()
        assert name in str(caught.value)
