"""Tuned sides and bases whose files hold more than counts: files come out as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_support import ok
from delta_reseal import loosen
from support import Tensor, write_index, write_safetensors

import ckdiff
from ckdiff.errors import CheckpointError, DeltaError

FILES = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


def tensor(value: int) -> Tensor:
    return "F32", (4,), bytes([value, 0, 0, 63] * 4)


def model(folder: Path, value: int, *, twice: bool = False, gone: bool = False) -> Path:
    """Two files, of which the index names not all."""
    second = {"b": tensor(value + 1)} | ({"extra": tensor(9)} if twice else {})
    write_safetensors(folder / FILES[0], {"a": tensor(value), "extra": tensor(value + 2)})
    write_safetensors(folder / FILES[1], second)
    write_index(folder, {"a": FILES[0], "b": FILES[1]} | ({"c": FILES[1]} if gone else {}))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_what_an_index_does_not_name_is_rebuilt(tmp_path: Path, encoding: str) -> None:
    base, tuned = model(tmp_path / "b", 1), model(tmp_path / "t", 5)
    found = ckdiff.delta(base, tuned, tmp_path / "d", encoding=encoding)
    assert found.tensors == 3
    assert found.paired == 2
    assert found.unpaired["added"] == ["extra"]
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tuned)
    loose = loosen(tmp_path / "d")
    assert (loose.metadata["version"], loose.manifest["ranges"]) == ("2", [])
    records = {patch.name for patch in ckdiff.weight_patches(tuned, base=base)}
    assert records == {"a", "b"}


def test_a_version_that_is_not_needed_is_refused(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "b.safetensors", {"a": tensor(1)})
    tuned = write_safetensors(tmp_path / "t.safetensors", {"a": tensor(2)})
    ckdiff.delta(base, tuned, tmp_path / "d")
    loose = loosen(tmp_path / "d")
    loose.metadata["version"], loose.manifest["ranges"] = "2", []
    with pytest.raises(DeltaError, match="does not need"):
        ckdiff.info(loose.seal(tmp_path / "bad"))


def test_an_index_that_leads_elsewhere_is_refused_in_every_version(tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "b", 1), model(tmp_path / "t", 5)
    ckdiff.delta(base, tuned, tmp_path / "d")
    for index in ({"a": FILES[1], "b": FILES[1]}, {"a": FILES[0], "b": "../x"}, {"x": FILES[0]}):
        loose = loosen(tmp_path / "d")
        heads = loose.parts["ckdiff.heads"]
        size = sum(file[2] for file in loose.manifest["files"])
        loose.parts["ckdiff.heads"] = heads[:size] + json.dumps({"weight_map": index}).encode()
        with pytest.raises(DeltaError):
            ckdiff.apply(base, loose.seal(tmp_path / "bad"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_made_again(tmp_path: Path) -> None:
    base = model(tmp_path / "b", 1)
    twice, gone = model(tmp_path / "t", 5, twice=True), model(tmp_path / "g", 5, gone=True)
    with pytest.raises(CheckpointError, match="two of its files have a tensor called extra"):
        ckdiff.delta(base, twice, tmp_path / "d")
    with pytest.raises(CheckpointError, match="its index has other tensors than its files"):
        ckdiff.delta(base, gone, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    # a base is only read: what it has besides does not matter
    for odd in (twice, gone):
        ckdiff.delta(odd, base, tmp_path / "d", overwrite=True)
        ckdiff.apply(odd, tmp_path / "d", tmp_path / "out", overwrite=True)
        assert tree(tmp_path / "out") == tree(base)


def test_grafts_keep_what_an_index_does_not_name(tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "b", 1), model(tmp_path / "t", 5)
    ckdiff.diff(base, tuned, tmp_path / "z")
    found = ckdiff.graft(base, tuned, tmp_path / "z", tmp_path / "out")
    assert found["unmasked"] == ["extra"]
    wanted = tree(base)
    wanted[FILES[1]] = (tuned / FILES[1]).read_bytes()
    one = write_safetensors(tmp_path / "x", {"a": tensor(5), "extra": tensor(3)})
    assert tree(tmp_path / "out") == wanted | {FILES[0]: one.read_bytes()}
    with pytest.raises(CheckpointError, match="two of its files have a tensor called extra"):
        ckdiff.graft(model(tmp_path / "t2", 1, twice=True), tuned, tmp_path / "z", tmp_path / "o2")


@pytest.mark.parametrize("way", ["graft", "convert"])
def test_what_is_not_written_is_said(tmp_path: Path, way: str) -> None:
    """Tensors that an index names and no file has, and which of several models was taken."""
    sides = [model(tmp_path / name, value, gone=True) for name, value in (("b", 1), ("t", 5))]
    for side in sides:
        write_safetensors(side / "consolidated.safetensors", {"a": tensor(3)})
    given, out = [*map(str, sides)], str(tmp_path / "out")
    if way == "graft":
        ckdiff.diff(*sides, out=tmp_path / "mask")
        given += ["--mask", str(tmp_path / "mask")]
    said = ok(way, *(given[:1] if way == "convert" else given), "-o", out).stderr
    lost = "warning: tensors that no file has, or that cannot be read, are not written: c\n"
    assert lost in said
    assert said.count("consolidated.safetensors") == (1 if way == "convert" else 2)


def test_what_a_delta_does_not_rebuild_is_said(tmp_path: Path) -> None:
    for name, value in (("b.pt", 1.0), ("t.pt", 2.0)):
        odd = torch.zeros(3, dtype=torch.complex128)
        torch.save({"a": torch.full((4,), value), "odd": odd}, tmp_path / name)
    sides = str(tmp_path / "b.pt"), str(tmp_path / "t.pt")
    found = ok("delta", *sides, "-o", str(tmp_path / "d"))
    assert "that cannot be read, are not in the delta: odd\n" in found.stderr
    assert found.stderr.count("of dtype complex128") == 2
