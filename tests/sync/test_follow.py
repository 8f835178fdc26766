"""A local checkpoint that follows what a publisher publishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_publisher import model, raw, saved, step
from weight_streams import read_model

import ckdiff
from ckdiff.sync import Publisher, follow


@pytest.mark.parametrize("anchor", [None, 2])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_a_reader_follows(tmp_path: Path, encoding: str, anchor: int | None) -> None:
    state, stream, wanted = model(), tmp_path / "s", []
    base = saved(state, tmp_path / "base")
    local = tmp_path / "local"
    shutil.copytree(base, local)
    with Publisher(stream, base, encoding=encoding, anchor_every=anchor) as publisher:
        for seed in range(3):
            step(state, seed)
            publisher.publish(state)
            wanted.append(raw(state))
            if seed == 0:
                assert follow(local, stream) == 1
    for target in (2, None):
        version = follow(local, stream, target)
        assert version == (target or 3)
        found = {name: data for name, (_, _, data) in read_model(local).items()}
        assert found == wanted[version - 1]
    assert follow(local, stream) == 3
    assert (local / "config.json").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = model()
    other = saved({"a.weight": torch.zeros(3)}, tmp_path / "other")
    with Publisher(tmp_path / "s", state) as publisher:
        step(state, 0)
        publisher.publish(state)
    before = (other / "model.safetensors").read_bytes()
    with pytest.raises(ckdiff.DeltaError):
        follow(other, tmp_path / "s")
    assert (other / "model.safetensors").read_bytes() == before
