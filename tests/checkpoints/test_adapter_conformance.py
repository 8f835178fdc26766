"""A base with an adapter merged into it is a checkpoint like others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conformance import TENSORS, CheckpointTests, Source
from support import write_safetensors

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.views.adapter import adapt

_CONFIG = {"peft_type": "LORA", "r": 2, "modules_to_save": ["b"]}


class Adapted(Source):
    """An adapter that brings a tensor whole, in another dtype, and leaves its value."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"

    def put(self, files: Mapping[str, bytes]) -> None:
        self.base.mkdir()
        for name, data in files.items():
            (self.base / name).write_bytes(data)
        dtype, shape, data = TENSORS["b.w"]
        wide = np.frombuffer(data, np.float32).astype(np.float64).tobytes()
        same = {"base_model.model.b.w": ("F64", shape, wide)}
        write_safetensors(self.adapter / "adapter_model.safetensors", same)
        (self.adapter / "adapter_config.json").write_text(json.dumps(_CONFIG))
        assert dtype == "F32"

    def open(self) -> Checkpoint:
        with ExitStack() as stack:
            sides = [open_checkpoint(folder) for folder in (self.base, self.adapter)]
            for side in sides:
                stack.callback(side.close)
            view = adapt(*sides)
            stack.pop_all()
            return view

    def change(self, name: str, data: bytes) -> None:
        (self.base / name).write_bytes(data)


class TestAdapted(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return Adapted(tmp_path)
