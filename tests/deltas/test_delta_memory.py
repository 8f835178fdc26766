"""Deltas and grafts of weights in memory: what comes out is what the library would have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ckdiff


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(50, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 9)]
    layers[2].bfloat16()  # files have it after the others
    return torch.nn.Sequential(*layers)


def trained(base: Any) -> Any:
    tuned = model()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned[0].weight[::3] += 1
        tuned[2].weight[1, :7] *= -1
        tuned[1].num_batches_tracked += 5
    return tuned


@pytest.fixture
def base() -> Any:
    return model()


def saved(state: Any, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(state.state_dict(), path)
    return path


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_a_folder_and_a_module(base: Any, tmp_path: Path, encoding: str) -> None:
    folder, tuned = saved(base, tmp_path / "base" / "model.safetensors").parent, trained(base)
    made = ckdiff.delta(folder, tuned, tmp_path / "d", encoding=encoding)
    assert made.changed == 14 * 50 + 7 + 1
    done = ckdiff.apply(folder, tmp_path / "d", tmp_path / "new")
    assert done.files == ["model.safetensors"]
    wanted = safetensors.torch.save(tuned.state_dict())
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == wanted
    assert ckdiff.diff(tmp_path / "new", tuned).rules["exact"]["changed"] == 0


def test_both_in_memory(base: Any, tmp_path: Path) -> None:
    tuned = trained(base)
    strided = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in reversed(tuned.state_dict().items())
    }
    ckdiff.delta(base.state_dict(), strided, tmp_path / "d")
    wanted = safetensors.torch.save(tuned.state_dict())
    for start in (base, {name: one.clone() for name, one in base.state_dict().items()}):
        ckdiff.apply(start, tmp_path / "d", tmp_path / "new.safetensors", overwrite=True)
        assert (tmp_path / "new.safetensors").read_bytes() == wanted
    with pytest.raises(ckdiff.DeltaError):
        ckdiff.apply(tuned, tmp_path / "d", tmp_path / "wrong.safetensors")


def test_a_file_and_a_mapping_of_arrays(base: Any, tmp_path: Path) -> None:
    file, tuned = saved(base, tmp_path / "base.safetensors"), trained(base).float()
    arrays = {name: tensor.numpy() for name, tensor in tuned.state_dict().items()}
    arrays["new"] = np.asfortranarray(np.arange(12, dtype=">i2").reshape(3, 4))
    made = ckdiff.delta(file, arrays, tmp_path / "d")
    assert made.unpaired["added"] == ["new"]
    ckdiff.apply(file, tmp_path / "d", tmp_path / "new.safetensors")
    found = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert found["new"].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert all(torch.equal(found[name], one) for name, one in tuned.state_dict().items())


def test_of_what_a_mask_marks(base: Any, tmp_path: Path) -> None:
    """Files have the tensors in another order than the state dict."""
    tuned, other = trained(base), model(1)
    ckdiff.diff(base, tuned, tmp_path / "run.zarr")
    made = ckdiff.delta(base, other, tmp_path / "d", mask=tmp_path / "run.zarr")
    assert made.lossy is not None
    ckdiff.apply(base, tmp_path / "d", tmp_path / "masked.safetensors")
    state = base.state_dict()
    wanted = {
        name: torch.where(one == tuned.state_dict()[name], one, other.state_dict()[name])
        for name, one in state.items()
    }
    assert (tmp_path / "masked.safetensors").read_bytes() == safetensors.torch.save(wanted)
    found = ckdiff.graft(base, other, tmp_path / "run.zarr", tmp_path / "grafted.safetensors")
    assert found["grafted"] == 14 * 50 + 7 + 1
    assert (tmp_path / "grafted.safetensors").read_bytes() == safetensors.torch.save(wanted)


def test_a_graft_into_a_folder_from_memory(base: Any, tmp_path: Path) -> None:
    folder, tuned = saved(base, tmp_path / "base" / "model.safetensors").parent, trained(base)
    ckdiff.diff(folder, tuned, tmp_path / "run.zarr")
    ckdiff.graft(folder, tuned, tmp_path / "run.zarr", tmp_path / "new")
    assert ckdiff.diff(tmp_path / "new", tuned).rules["exact"]["changed"] == 0


def test_weight_patches_there_and_back(base: Any, tmp_path: Path) -> None:
    tuned = trained(base)
    patches = list(ckdiff.weight_patches(tuned, base=base))
    assert {patch.name for patch in patches} == {"0.weight", "1.num_batches_tracked", "2.weight"}
    ckdiff.delta_from_patches(base, patches, tmp_path / "d")
    ckdiff.apply(base, tmp_path / "d", tmp_path / "new.safetensors")
    wanted = safetensors.torch.save(tuned.state_dict())
    assert (tmp_path / "new.safetensors").read_bytes() == wanted
    with pytest.raises(ckdiff.UsageError, match="a Sequential is not a delta"):
        list(ckdiff.weight_patches(tuned))


def test_a_step_while_the_delta_is_made(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckdiff.deltas import creating

    tuned, verified = trained(base), creating.Making._compare

    def stepping(self: Any, recorder: Any) -> Any:
        found = verified(self, recorder)
        with torch.no_grad():
            tuned[0].bias.zero_()
        return found

    monkeypatch.setattr(creating.Making, "_compare", stepping)
    with pytest.raises(ckdiff.SourceChanged, match=r"Sequential: 0.bias was changed"):
        ckdiff.delta(base, tuned, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_torch_files_are_rebuilt_as_safetensors(base: Any, tmp_path: Path) -> None:
    folder, tuned = saved(base, tmp_path / "base" / "model.safetensors").parent, trained(base)
    (tmp_path / "torch").mkdir()
    file = tmp_path / "torch" / "pytorch_model.bin"
    torch.save(tuned.state_dict(), file)
    ckdiff.delta(folder, file.parent, tmp_path / "d")
    assert ckdiff.apply(folder, tmp_path / "d", tmp_path / "new").files == ["model.safetensors"]
    wanted = safetensors.torch.save(tuned.state_dict())
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == wanted
    with pytest.raises(ckdiff.OutputError, match="would replace a source"):
        ckdiff.delta(folder, file, file, overwrite=True)
