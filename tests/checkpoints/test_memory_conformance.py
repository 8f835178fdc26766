"""What is in memory is a checkpoint like others: packed, strided, and on a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from conformance import SHARDS, TENSORS, CheckpointTests, Source

import ckdiff
from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.places import heldtorch
from ckdiff.checkpoints.protocol import Checkpoint

_KINDS = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}


def as_tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> Any:
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    kind = _KINDS[dtype]
    return packed.view(kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def spread(tensor: Any) -> Any:
    """The same elements, each second one of more."""
    return torch.stack([tensor, tensor], -1)[..., 0]


class InTorch(Source):
    def __init__(self, arranged: Callable[[Any], Any]) -> None:
        self.arranged = arranged
        self.state: dict[str, Any] = {}

    def put(self, files: Mapping[str, bytes]) -> None:
        self.state = {name: self.arranged(as_tensor(*one)) for name, one in TENSORS.items()}

    def open(self) -> Checkpoint:
        return open_checkpoint(self.state)

    def change(self, name: str, data: bytes) -> None:
        changed = list(SHARDS[name])[1]
        self.state[changed].zero_()


class InMemoryTests(CheckpointTests):
    def test_two_openings_of_one_thing_are_the_same(
        self, checkpoint: Checkpoint, source: Source
    ) -> None:
        """They are not: nothing says that it is what it was. Nor does one that stays open."""
        with source.open() as other:
            said = [json.dumps(one.fingerprint()) for one in (checkpoint, checkpoint, other)]
        assert len(set(said)) == 3

    def test_a_recipe_travels(self, checkpoint: Checkpoint) -> None:
        """It does not."""
        with pytest.raises(ckdiff.UsageError, match="a state dict is only here"):
            checkpoint.recipe()

    @pytest.mark.skip(reason="there are no headers")
    def test_hostile_headers(self, source: Source, break_it: Callable[[bytes], bytes]) -> None: ...


class TestPacked(InMemoryTests):
    @pytest.fixture
    def source(self) -> Source:
        return InTorch(lambda tensor: tensor)


class TestStrided(InMemoryTests):
    @pytest.fixture
    def source(self) -> Source:
        return InTorch(spread)


@pytest.mark.parametrize("arranged", [lambda tensor: tensor, spread], ids=["packed", "strided"])
class TestOnDevice(InMemoryTests):
    """As though the processor's memory were a device's."""

    @pytest.fixture
    def source(self, arranged: Any, monkeypatch: pytest.MonkeyPatch) -> Source:
        monkeypatch.setattr(heldtorch, "is_here", lambda tensor: False)
        return InTorch(arranged)


class InNumpy(InTorch):
    def put(self, files: Mapping[str, bytes]) -> None:
        super().put(files)
        for name, tensor in self.state.items():
            if tensor.dtype != torch.bfloat16:
                self.state[name] = tensor.numpy()


class TestInNumpy(InMemoryTests):
    @pytest.fixture
    def source(self) -> Source:
        return InNumpy(lambda tensor: tensor)

    def test_some_are_arrays(self, source: Source) -> None:
        source.put({})
        assert isinstance(source, InNumpy)
        assert sum(isinstance(array, np.ndarray) for array in source.state.values()) == 4
