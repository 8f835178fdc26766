"""However both sides are stored, a diff counts what a naive comparison of their values counts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ckdiff

State = dict[str, Any]

KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(), (1,), (700,), (33, 5), (5, 33), (3, 4, 5), (0, 3), (2, 1, 600)]
#: values that every one of the kinds has, zeros of both signs among them
VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.25, 3.0, 96.0, 2.0**-10])


def values(draw: Any, seed: int) -> State:
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(draw(st.integers(1, 5))):
        shape = draw(st.sampled_from(SHAPES))
        at = torch.randint(len(VALUES), shape, generator=noise)
        found[f"m.layers.{i}.w"] = VALUES[at].to(draw(st.sampled_from(KINDS)))
    return found


def touched(draw: Any, state: State, seed: int) -> State:
    """Some elements of some tensors with other values, some tensors of other dtypes."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in state.items():
        other = tensor.clone()
        if draw(st.booleans()):
            where = torch.rand(tensor.shape, generator=noise) < draw(st.sampled_from([0.01, 0.5]))
            at = torch.randint(len(VALUES), tensor.shape, generator=noise)
            other = torch.where(where, VALUES[at].to(tensor.dtype), tensor)
        found[name] = other.to(draw(st.sampled_from([tensor.dtype, *KINDS])))
    return found


def arranged(draw: Any, tensor: Any) -> Any:
    """The same tensor, stored otherwise."""
    how = draw(st.sampled_from(["plain", "by columns", "spread", "inside", "backwards"]))
    if how == "by columns" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if how == "spread":
        return torch.stack([tensor, torch.ones_like(tensor)], -1)[..., 0]
    if how == "inside":
        wide = torch.cat([torch.ones(3, dtype=tensor.dtype), tensor.reshape(-1)])
        return wide[3:].view(tensor.shape)
    if how == "backwards" and tensor.ndim > 2:
        order = list(range(tensor.ndim))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    return tensor


def stored(draw: Any, folder: Path, state: State) -> Path:
    """A checkpoint of either format, in one file or several, in any order."""
    folder.mkdir()
    names = draw(st.permutations(list(state)))
    shards = draw(st.integers(1, min(2, len(names))))
    as_torch = draw(st.booleans())
    stem, suffix = ("pytorch_model", ".bin") if as_torch else ("model", ".safetensors")
    places = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}{suffix}"
        if as_torch:
            part = {name: arranged(draw, tensor) for name, tensor in part.items()}
            content = {"epoch": 1, "state_dict": part} if draw(st.booleans()) else part
            torch.save(content, folder / file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file)
        places |= dict.fromkeys(part, file)
    if draw(st.booleans()):
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def bits(tensor: Any) -> Any:
    """Of the values as F64, which holds them all."""
    return tensor.double().contiguous().reshape(-1).view(torch.int64).numpy()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_counts_and_masks_are_those_of_the_values(data: st.DataObject) -> None:
    base = values(data.draw, data.draw(st.integers(0, 99)))
    tuned = touched(data.draw, base, data.draw(st.integers(0, 99)))
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            stored(data.draw, Path(folder) / name, state)
            for name, state in (("a", base), ("b", tuned))
        ]
        found = ckdiff.diff(*sides, Path(folder) / "s.zarr", rules=["exact", "atol=0.75"])
        assert found.store is not None
        assert [record.name for record in found.store.tensors] == sorted(base)
        assert not found.unpaired_details
        for record in found.store.tensors:
            one, other = base[record.name], tuned[record.name]
            changed = bits(one) != bits(other)
            far = (one.double() - other.double()).abs() > 0.75
            for rule, wanted in (("exact", changed), ("atol=0.75", far.reshape(-1).numpy())):
                assert record.changed[rule] == int(wanted.sum())
                mask = found.store.mask(record.name, rule)
                assert np.array_equal(mask.reshape(-1), wanted)
        wider = [name for name in base if base[name].dtype != tuned[name].dtype]
        assert [one["name"] for one in found.to_dict()["retyped"]] == sorted(wider)


def test_what_an_index_names_and_no_file_has_is_renamed_where_parts_are_compared(
    tmp_path: Path,
) -> None:
    noise = torch.Generator().manual_seed(1)
    at = "model.layers.0.self_attn"
    parts = {f"{at}.{kind}_proj.weight": torch.randn(4, 4, generator=noise) for kind in "qkv"}
    save_file({**parts, "model.mtp.w": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    fused = {f"net.{at}.qkv_proj.weight": torch.cat([*parts.values()])}
    save_file(fused, tmp_path / "b/m.safetensors")
    places = dict.fromkeys([*fused, "net.model.mtp.w"], "m.safetensors")
    index = json.dumps({"weight_map": places})
    (tmp_path / "b/model.safetensors.index.json").write_text(index)
    found = ckdiff.diff(tmp_path / "a.safetensors", tmp_path / "b", rename=["^net[.]="])
    assert (found.rules["exact"]["changed"], found.elements) == (0, 48)
    assert found.unpaired["missing"] == ["model.mtp.w"]
    assert not any(names for reason, names in found.unpaired.items() if reason != "missing")
