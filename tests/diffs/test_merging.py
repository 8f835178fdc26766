"""A LoRA adapter merged into a side of a diff, and what of it arrived in the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hub_server import only_hub
from support import write_safetensors

import ckdiff

BF16 = ml_dtypes.bfloat16
NOISE = np.random.default_rng(3)
W = (NOISE.standard_normal((96, 64)) * 0.05).astype(BF16)
OTHER = (NOISE.standard_normal((8, 8)) * 0.05).astype(BF16)
A = (NOISE.standard_normal((4, 64)) * 0.1).astype(np.float32)
B = (NOISE.standard_normal((96, 4)) * 0.1).astype(np.float32)
B[:5] = 0  # rows that the adapter leaves


def put(folder: Path, tensors: dict[str, Any], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"bfloat16": "BF16", "float32": "F32"}
    raw = {n: (kinds[str(a.dtype)], a.shape, a.tobytes()) for n, a in tensors.items()}
    write_safetensors(folder / name, raw)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return put(tmp_path / "base", {"l.q.weight": W, "l.k.weight": OTHER})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    matrices = {
        "base_model.model.l.q.lora_A.weight": A,
        "base_model.model.l.q.lora_B.weight": B,
    }
    folder = put(tmp_path / "adapter", matrices, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged() -> Any:
    return (W.astype(np.float32) + 2 * (B @ A)).astype(BF16)


def test_what_an_adapter_changes(base: Path, adapter: Path, tmp_path: Path) -> None:
    found = ckdiff.diff(base, base, tmp_path / "x.zarr", tuned_adapter=adapter)
    wanted = merged().view(np.uint16) != W.view(np.uint16)
    assert found.store is not None
    # the order of sums in a product of matrices moves the last bit of very few elements
    assert int((found.store.mask("l.q.weight") != wanted).sum()) <= 3
    assert found.table.find("l.k.weight") is not None
    assert not found.store.mask("l.k.weight").any()
    assert found.merge is None


@pytest.mark.parametrize("scheduler", ["threads", None])
def test_whether_a_merge_survived(
    base: Path, adapter: Path, tmp_path: Path, scheduler: str | None
) -> None:
    there = merged()
    there[10] = W[10]  # not merged
    there[20] += BF16(1)  # and then trained on
    there[0, 0] = BF16(9)  # what the adapter leaves
    other = put(tmp_path / "merged", {"l.q.weight": there, "l.k.weight": OTHER})
    found = ckdiff.diff(base, other, base_adapter=adapter, scheduler=scheduler)
    counts = found.merge
    assert counts is not None
    visible = merged().view(np.uint16) != W.view(np.uint16)
    assert counts["elements"] == W.size
    assert abs(counts["visible"] - int(visible.sum())) <= 3
    assert counts["asked"] == 91 * 64
    assert abs(counts["lost"] - int(visible[10].sum())) <= 3
    assert counts["other"] >= 60
    assert counts["extra"] >= 1
    assert counts["arrived"] + counts["lost"] + counts["other"] == counts["visible"]
    assert found.to_dict()["merge"]["share"] == counts["arrived"] / counts["visible"]


def test_a_run_that_was_stopped_counts_the_same(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckdiff.stores.workdir import WorkDir

    other = put(tmp_path / "merged", {"l.q.weight": merged(), "l.k.weight": OTHER})
    whole = ckdiff.diff(base, other, base_adapter=adapter).merge

    def stopped(self: Any, manifest: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "commit", stopped)
        with pytest.raises(ckdiff.Interrupted):
            ckdiff.diff(base, other, tmp_path / "x.zarr", base_adapter=adapter)
    found = ckdiff.diff(base, other, tmp_path / "x.zarr", base_adapter=adapter)
    assert found.bytes_resumed == found.bytes_read
    assert found.merge == whole
    assert found.store is not None
    found.store.check()


def test_no_adapter(base: Path, adapter: Path) -> None:
    with pytest.raises(ckdiff.CheckpointError, match=r"adapter_config\.json"):
        ckdiff.diff(base, base, tuned_adapter=base)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ckdiff.CheckpointError, match="IA3"):
        ckdiff.diff(base, base, tuned_adapter=adapter)


def test_an_adapter_of_the_hub(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ckdiff.diff(base, base, tuned_adapter=adapter).rules
    with only_hub(tmp_path, monkeypatch) as hub:
        files = {path.name: path.read_bytes() for path in adapter.iterdir()}
        hub.put("me/lora", files)
        hub.put("me/none", {name: data for name, data in files.items() if "config" not in name})
        assert ckdiff.diff(base, base, tuned_adapter="hf://me/lora").rules == here
        with pytest.raises(ckdiff.CheckpointError, match=r"adapter_config\.json"):
            ckdiff.diff(base, base, tuned_adapter="hf://me/none")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ckdiff.CheckpointError, match=r"adapter_config\.json"):
            ckdiff.diff(base, base, tuned_adapter="hf://me/lora")  # it was read, not cached


@pytest.mark.parametrize("wide", ["base", "tuned"])
def test_a_merge_that_was_saved_in_another_dtype(
    base: Path, adapter: Path, tmp_path: Path, wide: str
) -> None:
    """Arrived is what is the same once both are rounded to the narrower dtype."""
    there = merged()
    there[10] = W[10]
    if wide == "tuned":
        there, narrow = there.astype(np.float32), base
    else:
        narrow = put(tmp_path / "wide", {"l.q.weight": W.astype(np.float32), "l.k.weight": OTHER})
    other = put(tmp_path / "merged", {"l.q.weight": there, "l.k.weight": OTHER})
    counts = ckdiff.diff(narrow, other, base_adapter=adapter).merge
    assert counts is not None
    visible = merged().view(np.uint16) != W.view(np.uint16)
    assert abs(counts["visible"] - int(visible.sum())) <= 3
    assert abs(counts["lost"] - int(visible[10].sum())) <= 3
    assert counts["other"] <= 3


def test_an_adapter_that_brings_the_weight_it_is_added_to(base: Path, tmp_path: Path) -> None:
    other = (W.astype(np.float32) * 1.5).astype(BF16)
    matrices = {
        "base_model.model.l.q.base_layer.weight": other,
        "base_model.model.l.q.lora_A.weight": A,
        "base_model.model.l.q.lora_B.weight": B,
    }
    folder = put(tmp_path / "adapter", matrices, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    there = (other.astype(np.float32) + 2 * (B @ A)).astype(BF16)
    whole = put(tmp_path / "merged", {"l.q.weight": there, "l.k.weight": OTHER})
    counts = ckdiff.diff(base, whole, base_adapter=folder).merge
    assert counts is not None
    visible = there.view(np.uint16) != other.view(np.uint16)
    assert abs(counts["visible"] - int(visible.sum())) <= 3
    assert abs(counts["arrived"] - int(visible.sum())) <= 3
