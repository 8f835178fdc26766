"""A pipeline is grafted component by component: folders, shards and indexes stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import only_hub, safetensors, sharded
from support import Tensor

import ckdiff

NOISE = np.random.default_rng(3)


def tensor() -> Tensor:
    return "BF16", (4, 8), NOISE.integers(0, 1 << 15, 32, np.uint16).tobytes()


def pipeline(*, hidden: bool = False) -> dict[str, bytes]:
    """A sharded component with its index, one in one file, and one whose index is of one file."""
    stem = "diffusion_pytorch_model"
    shards = {f"{stem}-0000{i}-of-00002.safetensors": {f"w{i}": tensor()} for i in (1, 2)}
    unet = sharded(shards)
    unet[f"{stem}.safetensors.index.json"] = unet.pop("model.safetensors.index.json")
    if hidden:  # a tensor that a file has and the index does not name
        name = f"{stem}-00002-of-00002.safetensors"
        unet[name] = safetensors({**shards[name], "stale": tensor()})
    said = {"unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "enc": ["transformers", "E"]}
    alone = json.dumps({"metadata": {}, "weight_map": {"e": "only.safetensors"}})
    return {
        "model_index.json": json.dumps(said).encode(),
        **{f"unet/{name}": data for name, data in unet.items()},
        f"vae/{stem}.safetensors": safetensors({"v": tensor()}),
        "enc/only.safetensors": safetensors({"e": tensor()}),
        "enc/model.safetensors.index.json": alone.encode(),
    }


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ckdiff-copied.json"
    }


@pytest.mark.parametrize("hidden", [False, True])
def test_each_component_keeps_its_index(tmp_path: Path, hidden: bool) -> None:
    before, after = pipeline(hidden=hidden), pipeline(hidden=hidden)
    base, tuned = written(tmp_path / "base", before), written(tmp_path / "tuned", after)
    ckdiff.diff(base, tuned, tmp_path / "m.zarr")
    found = ckdiff.graft(base, tuned, tmp_path / "m.zarr", tmp_path / "out")
    made = read(tmp_path / "out")
    indexes = [name for name in before if name.endswith("index.json") and "/" in name]
    assert {name: made[name] for name in indexes} == {name: before[name] for name in indexes}
    assert set(indexes) <= set(found["files"])
    again = ckdiff.diff(tuned, tmp_path / "out")
    assert again.rules["exact"]["changed"] == 0
    assert not any(again.unpaired.values())
    ckdiff.graft(base, tuned, tmp_path / "m.zarr", tmp_path / "out", overwrite=True)
    if not hidden:
        assert made == {**after, **{name: before[name] for name in indexes}}


def test_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = pipeline(), pipeline()
    tuned = written(tmp_path / "tuned", after)
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("me/pipe", before)
        ckdiff.diff("hf://me/pipe", tuned, tmp_path / "m.zarr")
        ckdiff.graft("hf://me/pipe", tuned, tmp_path / "m.zarr", tmp_path / "out")
    made: dict[str, Any] = read(tmp_path / "out")
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert made[name] == before[name]


def test_an_index_that_changed_is_noticed(tmp_path: Path) -> None:
    base = written(tmp_path / "base", pipeline())
    with ckdiff.open_checkpoint(base) as opened:
        assert len(opened.part_indexes()) == 2
        path = base / "enc/model.safetensors.index.json"
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(ckdiff.SourceChanged):
            opened.part_indexes()


@pytest.mark.parametrize("encoding", ["packed", "indices", "xor", "overwrite"])
def test_deltas_are_of_its_components(tmp_path: Path, encoding: str) -> None:
    """In two components tensors may have one name: what knows them by that alone is refused."""
    base, tuned = (written(tmp_path / side, pipeline()) for side in ("base", "tuned"))
    out = tmp_path / "d"
    with pytest.raises(ckdiff.CheckpointError, match="is a pipeline") as caught:
        ckdiff.delta(base, tuned, out, encoding=encoding)
    assert caught.value.hint == "make one for each component, such as tuned/enc"
    assert not out.exists()
    ckdiff.delta(base / "unet", tuned / "unet", out, encoding=encoding)
    ckdiff.apply(base / "unet", out, tmp_path / "made")
    assert ckdiff.diff(tuned / "unet", tmp_path / "made").rules["exact"]["changed"] == 0
    with pytest.raises(ckdiff.CkdiffError):
        ckdiff.apply(base, out, tmp_path / "again")
