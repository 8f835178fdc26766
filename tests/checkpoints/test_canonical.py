"""The files that a checkpoint would be are those that safetensors and transformers write."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conformance import FILES, TENSORS, CheckpointTests, Source, expected, read, some_spans
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint, TensorTable
from ckdiff.checkpoints.views import canonical
from ckdiff.checkpoints.views.canonical import (
    as_file,
    as_files,
    index_of_shards,
    plan_shards,
    with_files,
)
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, UsageError

_KINDS = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def whole(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Its files, put together from what it says and what its readers read."""
    made = {file.name: bytearray(file.size) for file in checkpoint.files}
    for i, file in enumerate(checkpoint.files):
        head = checkpoint.head(i)
        made[file.name][: len(head)] = head
    with closing(checkpoint.reader()) as reader:
        for i, name in enumerate(checkpoint.table.names):
            size, at = int(checkpoint.table.nbytes[i]), int(checkpoint.offset[i])
            file = checkpoint.files[int(checkpoint.file_index[i])].name
            (made[file][at : at + size],) = read(checkpoint, reader, [(name, 0, size)])
    return {name: bytes(data) for name, data in made.items()}


@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name.isascii() or name.encode("utf-8", "ignore")),
        st.tuples(st.sampled_from(_KINDS), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    )
)
def test_byte_for_byte_as_the_library_writes_it(kinds: Mapping[str, Any]) -> None:
    state = {name: torch.zeros(shape, dtype=kind) for name, (kind, shape) in kinds.items()}
    for i, tensor in enumerate(state.values()):
        tensor.view(-1).fill_(i % 2)
    if not state:
        return
    with as_file(open_checkpoint(state)) as checkpoint:
        assert whole(checkpoint) == {"model.safetensors": safetensors.torch.save(state)}


def test_all_dtypes_are_in_the_order_of_the_library() -> None:
    table = TensorTable(
        [f"t{i}" for i in range(len(DTYPES))],
        list(DTYPES),
        [(8,)] * len(DTYPES),
        np.array([dtype.bits for dtype in DTYPES.values()], np.int64),
    )
    (shard,) = plan_shards(table)
    order = [table.dtypes[i] for i in shard.tensors]
    assert order == list(reversed(DTYPES))
    # and the library takes it
    names = [
        name
        for name, _ in safetensors.deserialize(shard.head + bytes(shard.size - len(shard.head)))
    ]
    assert sorted(names) == sorted(table.names)


def test_shards_and_index_as_transformers_writes_them(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    noise = random.Random(3)
    state = {f"layers.{i}.w": torch.randn(noise.randint(1, 60)) for i in range(30)}
    split = split_torch_state_dict_into_shards(state, max_shard_size=200)
    wanted = {
        name: safetensors.torch.save({n: state[n] for n in names}, metadata={"format": "pt"})
        for name, names in split.filename_to_tensors.items()
    }
    made = as_files(open_checkpoint(state), 200, metadata={"format": "pt"})
    with made as checkpoint:
        assert whole(checkpoint) == wanted
        assert len(wanted) > 5
        assert checkpoint.index_name == "model.safetensors.index.json"
        raw = checkpoint.index()
        assert raw is not None
        index = json.loads(raw)
        assert index["weight_map"] == split.tensor_to_filename
        assert index["metadata"] == {"total_size": sum(4 * len(one) for one in state.values())}
        for name, data in wanted.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / checkpoint.index_name).write_bytes(raw)
    with open_checkpoint(tmp_path) as found:
        assert sorted(found.table.names) == sorted(state)


def test_what_no_file_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(*names: str, shape: tuple[int, ...] = (1,)) -> TensorTable:
        kinds = ["U8"] * len(names), [shape] * len(names)
        return TensorTable(list(names), *kinds, np.ones(len(names), np.int64))

    with pytest.raises(CheckpointError, match="called __metadata__"):
        plan_shards(table("w", "__metadata__"))
    with monkeypatch.context() as patch:
        patch.setattr(canonical, "HEADER_LIMIT", 1000)
        with pytest.raises(CheckpointError) as caught:
            plan_shards(table("w" * 1000))
    assert re.search(r"header of 1,\d+ bytes, more than 1,000 \(write smaller", str(caught.value))
    (empty,) = plan_shards(table(), 3)
    assert (len(empty.tensors), empty.head[8:]) == (0, b"{}      ")
    two = plan_shards(table("a", "b"), 0)
    assert [shard.name for shard in two] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert b'"a": "model-00001' in index_of_shards(table("a", "b"), two)


class OfFolder(Source):
    """Files seen as one other file: what is read is theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, files: Mapping[str, bytes]) -> None:
        self.folder.mkdir()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def open(self) -> Checkpoint:
        return as_file(open_checkpoint(self.folder))

    def change(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)


class TestOneFileOfSeveral(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return OfFolder(tmp_path / "model")

    def test_its_files(self, checkpoint: Checkpoint) -> None:
        ((name, data),) = whole(checkpoint).items()
        assert name == "model.safetensors"
        found = {name: bytes(one["data"]) for name, one in safetensors.deserialize(data)}
        assert found == {name: data for name, (_, _, data) in TENSORS.items()}
        assert checkpoint.in_files
        assert with_files(checkpoint) is checkpoint
        assert checkpoint.index() is None

    def test_a_recipe_travels(self, checkpoint: Checkpoint) -> None:
        """It does not: what opens it would see the files that there are."""
        with pytest.raises(UsageError):
            checkpoint.recipe()


def test_a_folder_of_files_needs_no_others(tmp_path: Path) -> None:
    source = OfFolder(tmp_path / "model")
    source.put(FILES)
    with open_checkpoint(source.folder) as checkpoint:
        assert with_files(checkpoint) is checkpoint
        spans = some_spans(random.Random(1), 3)
        with closing(checkpoint.reader()) as reader:
            assert read(checkpoint, reader, spans) == expected(spans)
