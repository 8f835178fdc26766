"""What Megatron saves: read where it is whole, refused by name where it is not."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from cli_support import error, ok
from sharded_state import rows, write_dcp

torch = pytest.importorskip("torch")

STATE = {"embedding.weight": torch.arange(32.0).reshape(8, 4), "decoder.w": torch.eye(4)}


def rank_file(folder: Path) -> None:
    """The file of one rank, with the optimizer beside the model in it."""
    folder.mkdir(parents=True)
    optimizer = {"state": {0: {"exp_avg": torch.ones(8, 4)}}}
    found = {"args": argparse.Namespace(hidden=4), "model": STATE, "optimizer": optimizer}
    torch.save({**found, "rng_state": [torch.zeros(9)]}, folder / "model_optim_rng.pt")


def dist(folder: Path, said: dict[str, Any] | None = None) -> Path:
    """``torch_dist``, with what Megatron adds to the metadata."""
    folder.mkdir(parents=True)
    write_dcp(folder, STATE, {name: rows(tuple(t.shape), 2) for name, t in STATE.items()})
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 3, "args": argparse.Namespace()}, folder / "common.pt")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.mcore_data = said or {}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_one_rank_is_the_model(tmp_path: Path) -> None:
    rank_file(tmp_path / "run/iter_0000001/mp_rank_00")
    rank_file(tmp_path / "run/iter_0000002/mp_rank_00")
    torch.save({0: torch.ones(9)}, tmp_path / "run/iter_0000001/mp_rank_00/distrib_optim.pt")
    assert "did you mean" in error("info", str(tmp_path / "run"))
    folder = tmp_path / "run/iter_0000001/mp_rank_00"
    for path in (folder, folder / "model_optim_rng.pt"):
        found = json.loads(ok("info", str(path), "--json").stdout)
        assert (found["tensors"], found["elements"]) == (2, 48)


def test_several_ranks_are_no_model(tmp_path: Path) -> None:
    for name in ("mp_rank_00", "mp_rank_01"):
        rank_file(tmp_path / "tp/iter_0000100" / name)
    for name in ("mp_rank_00_000", "mp_rank_00_001"):
        rank_file(tmp_path / "pp" / name)
    for path in (tmp_path / "tp", tmp_path / "tp/iter_0000100", tmp_path / "pp"):
        said = error("info", str(path))
        assert "Megatron checkpoint of 2 ranks" in said
        assert "torch_dist" in said


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ('{"sharded_backend": "zarr", "common_backend": "torch"}', ["back end zarr", "torch_dist"]),
        ('{"sharded_backend": "torch_dist"}', ["not saved completely"]),
        ('{"sharded_backend": "\\u001b[31m"}', ["back end", "torch_dist"]),
        ('{"sharded_backend": 3}', ["holds no tensors|no weights"]),
        ("[1", ["holds no tensors|no weights"]),
        ("[" * 40_000, ["holds no tensors|no weights"]),
    ],
)
def test_other_back_ends(tmp_path: Path, form: str, says: list[str]) -> None:
    (tmp_path / "metadata.json").write_text(form)
    torch.save({"iteration": 3, "args": argparse.Namespace()}, tmp_path / "common.pt")
    (tmp_path / "decoder.w").mkdir()
    (tmp_path / "decoder.w/.zarray").write_text("{}")
    said = error("info", str(tmp_path))
    for text in says:
        assert any(one in said for one in text.split("|")), said
    assert "\x1b" not in said


def test_its_own_directories_of_pieces(tmp_path: Path) -> None:
    optimizer = {"optimizer.state.exp_avg.w": {"nd_reformulated_orig_global_shape": (2, 2)}}
    whole, again = dist(tmp_path / "a"), dist(tmp_path / "b", optimizer)
    found = json.loads(ok("diff", str(whole), str(again), "--json").stdout)
    assert (found["tensors_identical"], found["elements"]) == (2, 48)
    named: dict[str, Any] = {"decoder.w": {"nd_reformulated_orig_global_shape": (2, 8)}}
    said = error("info", str(dist(tmp_path / "c", named)))
    assert "decoder.w another shape" in said
