"""Publishing weights on a device from what changed there: streams are those of whole copies.

Here torch's CPU passes for a device, and the CPU's kernels for its code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_pairs import files_of
from device_tensors import State, pretend
from hypothesis import given, settings
from hypothesis import strategies as st

import ckdiff
from ckdiff.kernels.gpu import compact
from ckdiff.sync import Publisher, loading, making, shadow

KINDS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8,
         torch.bool, torch.float8_e4m3fn, torch.complex64]  # fmt: skip
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_state(noise: torch.Generator) -> State:
    state = {f"t{i}": torch.randn(40 + 90 * i, generator=noise).to(k) for i, k in enumerate(KINDS)}
    state["strided"] = torch.randn(30, 20, generator=noise).t()
    return state | {"none": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}


def step(state: State, share: float, noise: torch.Generator, *, odd: bool) -> None:
    """Other bits in a share of the elements; NaNs and infinities among them if ``odd``."""
    for tensor in state.values():
        flat = tensor.t().reshape(-1) if tensor.dim() > 1 else tensor.view(-1)
        chosen = torch.rand(len(flat), generator=noise) < share
        if odd and tensor.is_floating_point() and tensor.element_size() > 1:
            flat[chosen] = torch.where(flat[chosen] > 0, torch.nan, torch.inf).to(tensor.dtype)
        if tensor.dtype == torch.bool:
            flat[chosen] = ~flat[chosen]
        else:
            bits = flat.view(WORDS[min(tensor.element_size(), 8)])
            bits[chosen] ^= torch.randint(0, 100, (int(chosen.sum()),), generator=noise).to(
                bits.dtype
            )
        if tensor.dim() > 1 and tensor.numel():
            tensor.t().copy_(flat.view(tensor.t().shape))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.003, 0.03, 0.5, 1.0]), st.booleans()),
             min_size=2, max_size=5),
    st.sampled_from([None, "bf16", "f16", "f32"]),
    st.sampled_from(["xor", "overwrite"]),
    st.sampled_from([None, 3]),
)  # fmt: skip
def test_a_stream_is_the_same_to_the_byte(
    steps: list[tuple[float, bool]], dtype: str | None, encoding: str, anchor: int | None
) -> None:
    def published(snapshot: str, folder: Path) -> dict[str, bytes]:
        noise = torch.Generator().manual_seed(len(steps))
        state, options = some_state(noise), {"encoding": encoding, "anchor_every": anchor}
        with Publisher(folder, dtype=dtype, snapshot=snapshot, workers=2, **options) as publisher:
            publisher.publish(state)
            for share, odd in steps:
                step(state, share, noise, odd=odd)
                publisher.publish(state)
        return files_of(folder)

    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        for module in (making, loading):
            patch.setattr(module, "window_of", lambda dtype: 1 << 10)
        patch.setattr(shadow, "_AT_ONCE", 5)
        expected, found = (published(kind, Path(root, kind)) for kind in ("memory", "device"))
        assert [name for name in expected if found[name] != expected[name]] == []


def test_only_what_changed_comes_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, state = pretend(monkeypatch), {"w": torch.zeros(50_000), "b": torch.zeros(9)}
    weight = state["w"]
    with Publisher(tmp_path / "s", dtype="bf16", snapshot="device") as publisher:
        publisher.publish(state)
        assert sum(copied) == 4 * 50_009
        weight[17::1000] = 1
        assert publisher.publish(state).density == 50 / 50_009
        weight += 1e-9  # every one, and after rounding 49,950 from zero
        assert publisher.publish(state).density == 49_950 / 50_009
        weight[:] = weight * 1.0001  # nothing, after rounding
        assert publisher.publish(state).tensors == 0
        assert sum(copied) == 4 * (2 * 50_009 - 9)


@pytest.mark.parametrize("broken", ["copies", "code"])
def test_where_the_device_cannot_all_is_copied_and_said_once(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    pretend(monkeypatch)
    notes: list[str] = []
    state = {"w": torch.zeros(5000)}
    where = (torch.Tensor, "new_empty") if broken == "copies" else (compact, "changed_positions")
    observer = ckdiff.Observer(note=notes.append)
    with Publisher(tmp_path / "s", state, snapshot="device", observer=observer) as publisher:
        monkeypatch.setattr(*where, fail)
        for i in range(4):
            state["w"][i] = 1
            assert publisher.publish(state).density == 1 / 5000
    assert notes == [
        "warning: from here on all weights are copied from their device: CUDA out of memory. Tried"
    ]


def test_what_is_written_meanwhile_is_found_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By something that torch does not count: neither side of the next comparison is older."""
    pretend(monkeypatch)
    state, real = {"w": torch.zeros(5000)}, compact.changed_positions

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        state["w"].data[100] = 5
        return found

    with Publisher(tmp_path / "s", state, snapshot="device") as publisher:
        publisher.publish(state)
        state["w"][1] = 1
        with monkeypatch.context() as patch:
            patch.setattr(compact, "changed_positions", meanwhile)
            assert publisher.publish(state).density == 1 / 5000
        assert publisher.publish(state).density == 1 / 5000
        assert publisher.publish(state).tensors == 0


@pytest.mark.parametrize("how", ["a file", "in pieces"])
def test_what_comes_another_way_for_once_is_not_forgotten(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    state, other = {"w": torch.zeros(5000)}, tmp_path / "w.safetensors"
    ckdiff.convert({"w": torch.ones(5000)}, other)
    middle: Any = other if how == "a file" else {"w": torch.ones(5000, 2)[:, 0]}
    with Publisher(tmp_path / "s", state, snapshot="device") as publisher:
        found = [publisher.publish(given).density for given in (state, middle, state)]
    assert found == [0, 1, 1]


def test_after_an_error_nothing_is_taken_for_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    state, base = {"w": torch.zeros(5000)}, tmp_path / "base.safetensors"
    ckdiff.convert(state, base)

    def fail(*_: object) -> None:
        raise OSError(5, "broken")

    with Publisher(tmp_path / "s", base, snapshot="device") as publisher:
        publisher.publish(state)
        state["w"][1] = 1
        with monkeypatch.context() as patch:
            patch.setattr(making, "bytes_at", fail)  # when the copy is ahead of the snapshot
            with pytest.raises(ckdiff.OutputError, match="broken"):
                publisher.publish(state)
        assert publisher.publish(state).density == 1 / 5000
