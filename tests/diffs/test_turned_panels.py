"""Turned experts, compared while they are copied: as if each were in a tensor of its own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import ckdiff
from ckdiff.checkpoints import panels
from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.kernels import Kernels

Tensors = dict[str, npt.NDArray[Any]]
LAYERS, EXPERTS, ROWS = 2, 3, 192


def apart(columns: int, seed: int, *, biases: bool) -> Tensors:
    """Gate and up of each expert, in a tensor of its own."""
    rng, base, found = np.random.default_rng(seed), np.random.default_rng(9), {}
    for layer in range(LAYERS):
        for n in range(EXPERTS):
            for role in ("gate", "up"):
                name = f"model.layers.{layer}.mlp.experts.{n}.{role}_proj"
                values = base.integers(0, 1 << 15, (ROWS, columns)).astype(np.float16)
                values[rng.random(values.shape) < 0.1] += 1
                found[f"{name}.weight"] = values
                if biases:
                    found[f"{name}.bias"] = np.zeros(ROWS, np.float16)
    return found


def fused(tensors: Tensors, *, woven: bool) -> Tensors:
    """Both of all experts in one tensor: as columns, one beside the other or in turn."""
    found: Tensors = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.experts"
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            if f"{name}.0.gate_proj.{kind}" not in tensors:
                continue
            parts: npt.NDArray[Any] = np.stack(
                [
                    [tensors[f"{name}.{n}.{role}_proj.{kind}"] for role in ("gate", "up")]
                    for n in range(EXPERTS)
                ]
            )  # experts, roles, rows, columns or none
            if kind == "bias":
                found[f"{name}.gate_up_proj_bias"] = parts.swapaxes(1, 2).reshape(EXPERTS, -1)
                continue
            turned = parts.transpose((0, 3, 2, 1) if woven else (0, 3, 1, 2))
            found[f"{name}.gate_up_proj{ending}"] = turned.reshape(EXPERTS, parts.shape[3], -1)
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


@pytest.mark.parametrize("woven", [False, True])
@pytest.mark.parametrize("columns", [320, 2048])
@pytest.mark.parametrize("turned", ["base", "tuned"])
def test_a_diff_is_that_of_what_is_apart(
    tmp_path: Path, columns: int, woven: bool, turned: str
) -> None:
    sides = [apart(columns, seed, biases=woven) for seed in (1, 2)]
    folders = []
    for i, side in enumerate(sides):
        for kind, tensors in (("apart", side), ("fused", fused(side, woven=woven))):
            folder = tmp_path / f"{kind}-{i}"
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
            folders.append(folder)
    base, tuned = (1, 2) if turned == "base" else (0, 3)
    ran: list[int] = []
    run_panels = Kernels.run_panels

    def noted(self: Kernels, segments: Any, masks: Any, into: Any, wanted: Any) -> None:
        ran.append(sum(panel.copying is not None for panel in wanted))
        run_panels(self, segments, masks, into, wanted)

    wanted = ckdiff.diff(folders[0], folders[2], tmp_path / "wanted", workers=1)
    with (
        mock.patch.object(Kernels, "run_panels", noted),
        mock.patch.object(panels, "PANEL", 1 << 17),
    ):
        found = ckdiff.diff(folders[base], folders[tuned], tmp_path / "found", workers=1)
        assert not ran if woven else sum(ran) > LAYERS * EXPERTS
        ran.clear()
        with mock.patch.object(PieceReader, "give_panels"):
            gathered = ckdiff.diff(folders[base], folders[tuned], tmp_path / "gathered", workers=1)
        assert not ran
    assert wanted.store is not None
    for result in (found, gathered):
        assert result.store is not None
        mine, theirs = result.table, wanted.table
        order = [mine.names.index(name) for name in theirs.names]
        for what in ("base_hashes", "tuned_hashes"):
            assert [list(getattr(mine, what))[i] for i in order] == list(getattr(theirs, what))
        assert mine.changed["exact"][order].tolist() == theirs.changed["exact"].tolist()
        for name in theirs.names:
            assert np.array_equal(result.store.mask(name), wanted.store.mask(name)), name


@pytest.mark.parametrize("cut", [[1024], [512, 1024], [100]])
def test_what_is_cut_across_its_rows_beside_what_is_turned(tmp_path: Path, cut: list[int]) -> None:
    """Rows of the one side in grids, and those of the other in panels."""
    sides = [apart(2048, seed, biases=False) for seed in (1, 2)]
    folders = [tmp_path / name for name in ("whole", "cut", "apart", "fused")]
    for folder in folders:
        folder.mkdir()
    save_file(sides[0], folders[0] / "model.safetensors")
    save_file(sides[1], folders[2] / "model.safetensors")
    save_file(fused(sides[1], woven=False), folders[3] / "model.safetensors")
    for n, (low, high) in enumerate(pairwise([0, *cut, 2048]), 1):
        parts = {name: np.ascontiguousarray(x[:, low:high]) for name, x in sides[0].items()}
        said = json.dumps({name: {"saved_offsets": [0, low]} for name in parts})
        path = folders[1] / f"shard-{n:05d}-model-00001-of-00001.safetensors"
        save_file(parts, path, {"DCP_SHARDING_INFO": said})
    wanted = ckdiff.diff(folders[0], folders[2], tmp_path / "wanted", workers=1)
    with mock.patch.object(panels, "PANEL", 1 << 17):
        found = ckdiff.diff(folders[1], folders[3], tmp_path / "found", workers=1)
    mine, theirs = found.table, wanted.table
    order = [mine.names.index(name) for name in theirs.names]
    assert mine.changed["exact"][order].tolist() == theirs.changed["exact"].tolist()
    for what in ("base_hashes", "tuned_hashes"):
        assert [list(getattr(mine, what))[i] for i in order] == list(getattr(theirs, what))
