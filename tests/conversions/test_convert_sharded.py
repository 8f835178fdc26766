"""Sharded training state as safetensors: pieces come together, bit for bit or rounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import ok
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_models import STATE, dcp, pieces, ranks

import ckdiff


@pytest.mark.parametrize("make", [dcp, ranks, pieces])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_pieces_come_together(
    tmp_path: Path, make: Callable[[Path], str], dtype: str | None
) -> None:
    source, out = tmp_path / "run", tmp_path / "out"
    make(source)
    beside = source / ("huggingface" if make is ranks else ".")
    beside.mkdir(exist_ok=True)
    (beside / "config.json").write_text('{"dtype": "float32"}')
    asked = () if dtype is None else ("--dtype", dtype)
    said = ok("convert", str(source), "-o", str(out), "--shard-size", "200", *asked, "--json")
    found = json.loads(said.stdout)
    assert (found["tensors"], found["elements"]) == (3, 200)
    assert found["copied"] == ["config.json"]
    assert found["rounded"] == 0  # small whole numbers
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == STATE.keys()
    made = {}
    for path in out.glob("*.safetensors"):
        made |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    for name, tensor in STATE.items():
        wanted = tensor if dtype is None else tensor.bfloat16()
        assert made[name].dtype == wanted.dtype
        assert torch.equal(made[name], wanted)
    wanted_dtype = "float32" if dtype is None else "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == wanted_dtype
    again = ckdiff.diff(source, out).to_dict()
    assert (again["tensors"], again["rules"]["exact"]["changed"]) == (3, 0)


def test_what_ranks_do_not_agree_about_is_not_written(tmp_path: Path) -> None:
    ranks(tmp_path / "run")
    path = tmp_path / "run/model_world_size_2_rank_1.pt"
    state = torch.load(path, weights_only=False)
    state["model.norm.bias"] = STATE["model.norm.bias"] + 1
    torch.save(state, path)
    with pytest.raises(ckdiff.CheckpointError, match="not the same in"):
        ckdiff.convert(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
