"""Tensors that are on the device already are compared where they are; stores are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from checkpoint_pairs import files_of
from device_tensors import diffed, pretend, some_states

import ckdiff
from ckdiff.checkpoints.places.heldtorch import HeldOnDevice
from ckdiff.errors import CkdiffError
from ckdiff.kernels import gpu
from ckdiff.kernels.gpu import kernels, staging
from ckdiff.kernels.gpu.sizes import Sizes

#: bytes of those that do not lie as code likes them: strided, and one element off, of two sides
COPIED = 4 * 2000 + 2 * 2 * 1999


@pytest.mark.parametrize("stats", [False, True])
def test_nothing_is_copied_and_the_store_is_the_same(
    stats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for statistics, for which all is."""
    base, tuned = some_states()
    diffed(base, tuned, tmp_path / "here", device="cpu", stats=stats)
    copied = pretend(monkeypatch)
    found = diffed(base, tuned, tmp_path / "there", stats=stats)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
    assert found.rules["exact"]["changed"] > 1000
    if stats:
        assert sum(copied) > 10 * COPIED
    else:
        assert sum(copied) == COPIED
        assert found.device_why == "torch's CPU: tensors are on it"


@pytest.mark.parametrize("strided", [False, True])
def test_there_is_no_room_for_copies_where_there_are_none(
    strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [{"t": tensor} for tensor in (torch.zeros(999, 3), torch.ones(999, 3))]
    if strided:
        states[1]["t"] = torch.ones(3, 999).t()
    pretend(monkeypatch)
    monkeypatch.setattr(kernels, "Sizes", asked := Mock(wraps=Sizes))
    assert diffed(*states).rules["exact"]["changed"] == 2997
    assert asked.call_args.kwargs == {"copied": strided}


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_in_a_file(side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{name: t.contiguous() for name, t in state.items()} for state in some_states()]
    sides: list[Any] = list(states)
    file = tmp_path / "side.safetensors"
    safetensors.torch.save_file({k: v.clone() for k, v in states[side].items()}, file)
    sides[side] = file
    expected = diffed(*sides, None, device="cpu").rules
    copied = pretend(monkeypatch)
    assert diffed(*sides, None).rules == expected
    assert sum(copied) <= 2 * 1999


def test_auto_takes_the_device_that_tensors_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is, and without trying the CPU, which would have to copy."""
    opened = gpu.open_device
    monkeypatch.setattr(gpu, "open_device", lambda name: opened("torch-cpu"))
    base, tuned = some_states()
    assert str(diffed(base, tuned, None, device="auto").device_why).endswith(
        "for starting a GPU to pay"
    )
    copied = pretend(monkeypatch)
    monkeypatch.setattr(HeldOnDevice, "on_gpu", lambda self: True)
    found = diffed(base, tuned, None, device="auto")
    assert found.device_why == "torch's CPU: tensors are on it"
    assert sum(copied) == COPIED


def test_the_cpu_never_touches_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory there runs out, that is an error."""

    pretend(monkeypatch)
    lost = Mock(side_effect=torch.cuda.OutOfMemoryError("no memory"))
    monkeypatch.setattr(staging, "_compare", lost)
    with pytest.raises(CkdiffError) as caught:
        diffed(*some_states(), None)
    assert str(caught.value) == "torch's CPU is out of memory (run with --device cpu)"


def test_what_was_written_to_meanwhile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = some_states()
    real = staging._compare

    def compare(*arguments: Any) -> None:
        real(*arguments)
        tuned["many"].add_(1)

    pretend(monkeypatch)
    monkeypatch.setattr(staging, "_compare", compare)
    with pytest.raises(ckdiff.SourceChanged, match="many was changed while it was being read"):
        diffed(base, tuned, None)
