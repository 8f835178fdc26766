"""Views of what is streamed, and the components of a pipeline, pass what every kind does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_adapter_conformance
from conformance import FILES, TENSORS, CheckpointTests, Source
from hub_server import only_hub, safetensors
from support import Tensor
from test_conformance import Local, Streamed
from test_torch_conformance import tensors
from torch_files import saved

from ckdiff.checkpoints.opening import open_checkpoint, open_recipe
from ckdiff.checkpoints.pieces import Piece
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.views.adapter import adapt
from ckdiff.checkpoints.views.parts import PartsView
from ckdiff.checkpoints.views.unfusing import Part, SideView

FUSED = "model.safetensors"


def _fused() -> dict[str, Tensor]:
    """The suite's tensors: two in one, one in its columns, and two under other names."""
    (_, (odd,), first), (_, (c,), second) = TENSORS["odd"], TENSORS["c"]
    rows, columns = TENSORS["a.w"][1]
    turned = np.frombuffer(TENSORS["a.w"][2], np.uint16).reshape(rows, columns).T.tobytes()
    return {
        "both": ("U8", (odd + c,), first + second),
        "turned": ("BF16", (columns, rows), turned),
        "x.empty": TENSORS["empty"],
        "x.b.w": TENSORS["b.w"],
    }


def parts_of(inner: Checkpoint) -> PartsView:
    """The view that has the suite's tensors."""
    at = {name: i for i, name in enumerate(inner.table.names)}
    (odd,), (c,), (rows, columns) = (TENSORS[name][1] for name in ("odd", "c", "a.w"))
    both, turned = at["both"], at["turned"]
    parts = [
        Part("odd", both, (odd,), (Piece(both, 0, (0,), (odd,), (1,)),)),
        Part("c", both, (c,), (Piece(both, odd, (0,), (c,), (1,)),)),
        Part(
            "a.w",
            turned,
            (rows, columns),
            (Piece(turned, 0, (0, 0), (rows, columns), (1, rows)),),
        ),
    ]
    kept = np.array([at["x.empty"], at["x.b.w"]], np.int64)
    return PartsView(inner, SideView(kept, ["empty", "b.w"], parts))


class InParts(Source):
    """A fused checkpoint at ``place``, seen part by part."""

    def __init__(self, place: Any, files: Mapping[str, bytes]) -> None:
        self.place, self.files = place, files

    def put(self, files: Mapping[str, bytes]) -> None:
        self.place.put(self.files)

    def open(self) -> Checkpoint:
        return parts_of(self.place.open())

    def change(self, name: str, data: bytes) -> None:
        (file, raw) = next(iter(self.files.items()))
        changed = bytearray(raw)
        changed[len(raw) // 2] ^= 1
        self.place.change(file, bytes(changed))


def _fused_in_torch() -> dict[str, bytes]:
    import torch

    found, plain = {}, tensors()
    wide = torch.cat([plain["odd"], plain["c"]])
    found["both"] = torch.stack([wide, wide], 1)[:, 1]  # pieces of what is in pieces
    found["turned"] = plain["a.w"].t()
    found |= {"x.empty": plain["empty"], "x.b.w": plain["b.w"]}
    return {"pytorch_model.bin": saved(found)}


class PartsTests(CheckpointTests):
    """What is the same for all views of parts."""

    #: those of the files themselves are what they are views of
    test_hostile_headers = None

    def test_a_recipe_travels(self, checkpoint: Checkpoint) -> None:
        """It is that of what it is a view of: whoever reads it takes the same view."""
        with parts_of(open_recipe(checkpoint.recipe())) as opened:
            assert opened.seen() == checkpoint.seen()


class TestPartsStreamed(PartsTests):
    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield InParts(Streamed(hub), {FUSED: safetensors(_fused())})


class TestPartsOfTorch(PartsTests):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return InParts(Local(tmp_path / "model"), _fused_in_torch())


class AdaptedStream(test_adapter_conformance.Adapted):
    """A streamed base, and an adapter that is here."""

    def __init__(self, folder: Path, hub: Any) -> None:
        super().__init__(folder)
        self.stream = Streamed(hub)

    def put(self, files: Mapping[str, bytes]) -> None:
        super().put(files)
        self.stream.put(files)

    def open(self) -> Checkpoint:
        with ExitStack() as stack:
            sides = [self.stream.open(), open_checkpoint(self.adapter)]
            for side in sides:
                stack.callback(side.close)
            view = adapt(*sides)
            stack.pop_all()
            return view

    def change(self, name: str, data: bytes) -> None:
        self.stream.change(name, data)


class TestAdaptedStream(test_adapter_conformance.TestAdapted):
    test_hostile_headers = None

    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
        with only_hub(tmp_path, monkeypatch) as hub:
            yield AdaptedStream(tmp_path, hub)


def test_what_was_passed_over_is_said_of_views_too(tmp_path: Path) -> None:
    source = test_adapter_conformance.Adapted(tmp_path)
    source.put(FILES)
    (source.base / "consolidated.safetensors").write_bytes(safetensors(_fused()))
    with source.open() as adapted:
        assert ["consolidated" in note for note in adapted.notes] == [True]
