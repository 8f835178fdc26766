"""Several processes: FSDP2, DDP, and which part of a mask belongs to which shard."""

from __future__ import annotations

from pathlib import Path

import mask_stores
import numpy as np
import pytest
import torch
from training_processes import run_together
from training_support import Masks, Tiny, alone, one_thread, some_masks

__all__ = ["one_thread"]  # a fixture


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Masks]:
    """What two processes trained, by way of doing it."""
    folder = tmp_path_factory.mktemp("together")
    masks = {name: mask.numpy() for name, mask in some_masks(Tiny()).items()}
    base = {
        name: ("F32", mask.shape, np.zeros(mask.shape, np.uint32)) for name, mask in masks.items()
    }
    mask_stores.make_store(folder / "run.zarr", base, masks)
    names = ["fsdp", "fsdp_groups", "ddp"]
    run_together("training_worker.py", "+".join(names), 2, folder)
    return {name: torch.load(folder / f"{name}.pt") for name in names}


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_two_processes_give_what_one_does(how: str, together: dict[str, Masks]) -> None:
    # both processes see the same batch, so that the mean of their gradients is each one's
    expected = alone()
    found = together[how]
    assert found.keys() == expected.keys()
    differing = {
        name: int((bits != found[name].view(torch.int32)).sum()) for name, bits in expected.items()
    }
    assert differing == dict.fromkeys(expected, 0)


def test_partly_sharded_models_in_mixed_precision(together: dict[str, Masks]) -> None:
    # the worker checks the bits
    assert all(weights.isfinite().all() for weights in together["fsdp_groups"].values())


def test_masks_are_cut_as_torch_cuts_weights(tmp_path: Path) -> None:
    run_together("training_worker.py", "layouts", 4, tmp_path)
