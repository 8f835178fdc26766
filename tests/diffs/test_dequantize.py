"""Quantised tensors compared by value, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import write_safetensors

import ckdiff
from ckdiff.options import Observer

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
NOISE = np.random.default_rng(11)
Q = NOISE.integers(0, 127, (300, 260), np.uint8).view(F8)
SCALE = NOISE.uniform(0.01, 0.1, (3, 3)).astype(np.float32)
KINDS = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "bfloat16": "BF16"}


def put(folder: Path, tensors: dict[str, Any]) -> Path:
    folder.mkdir()
    raw = {n: (KINDS[str(a.dtype)], a.shape, a.tobytes()) for n, a in tensors.items()}
    write_safetensors(folder / "model.safetensors", raw)
    return folder


def quantised(q: Any, scale: Any) -> dict[str, Any]:
    norm = np.ones(8, BF16)
    return {"l.w.weight": q, "l.w.weight_scale_inv": scale, "norm": norm}


def values(q: Any, scale: Any) -> Any:
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: q.shape[0], : q.shape[1]]
    return q.astype(np.float32) * spread


def notes_of(a: Path, b: Path, **more: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return ckdiff.diff(a, b, observer=Observer(note=notes.append), **more), notes


def test_against_the_original(tmp_path: Path) -> None:
    base = put(tmp_path / "q", quantised(Q, SCALE))
    original = (values(Q, SCALE) * 1.001).astype(BF16)
    tuned = put(tmp_path / "o", {"l.w.weight": original, "norm": np.ones(8, BF16)})
    found = ckdiff.diff(base, tuned, tmp_path / "x.zarr", dequantize=True, rules=["atol=0.5"])
    wide = original.astype(np.float32)
    exact = values(Q, SCALE).view(np.uint32) != wide.view(np.uint32)
    assert found.rules["exact"]["changed"] == int(exact.sum())
    far = np.abs(values(Q, SCALE) - wide) > np.float32(0.5)
    assert found.rules["atol=0.5"]["changed"] == int(far.sum())
    assert not any(found.unpaired.values())
    assert found.store is not None
    assert found.store.manifest["selection"]["dequantize"] is True
    found.store.check()
    # as bits it is another question, and a hint says so
    plain, notes = notes_of(base, tuned)
    assert plain.unpaired["removed"] == ["l.w.weight_scale_inv"]
    assert [note for note in notes if "--dequantize" in note]


def test_another_quantisation_of_the_same(tmp_path: Path) -> None:
    small = np.abs(Q.astype(np.float32)) < 200
    q = np.where(small, Q, np.zeros_like(Q))
    doubled = (q.astype(np.float32) * 2).astype(F8)
    a = put(tmp_path / "a", quantised(q, SCALE))
    b = put(tmp_path / "b", quantised(doubled, (SCALE / 2).astype(np.float32)))
    same = values(q, SCALE) == values(doubled, (SCALE / 2).astype(np.float32))
    found = ckdiff.diff(a, b, dequantize=True)
    assert found.rules["exact"]["changed"] == int((~same).sum())
    assert ckdiff.diff(a, b).rules["exact"]["changed"] > 1000


def test_only_scales_changed(tmp_path: Path) -> None:
    a = put(tmp_path / "a", quantised(Q, SCALE))
    b = put(tmp_path / "b", quantised(Q, (SCALE * 2).astype(np.float32)))
    found, notes = notes_of(a, b)
    assert found.rules["exact"]["changed"] == SCALE.size
    assert any("only the scales of" in note for note in notes)
    found, notes = notes_of(a, b, dequantize=True)
    assert found.rules["exact"]["changed"] == int((values(Q, SCALE) != 0).sum())
    assert not any("hint" in note for note in notes)


def test_nothing_is_quantised(tmp_path: Path) -> None:
    a = put(tmp_path / "a", {"w": np.ones((4, 4), np.float32)})
    found, notes = notes_of(a, a, dequantize=True, out=tmp_path / "x.zarr")
    assert any("no tensor is quantised" in note for note in notes)
    assert found.store.manifest["format_version"] == 1


@pytest.mark.parametrize("verify", [False, True])
def test_with_itself(tmp_path: Path, verify: bool) -> None:
    a = put(tmp_path / "a", quantised(Q, SCALE))
    assert ckdiff.diff(a, a, dequantize=True, verify=verify).rules["exact"]["changed"] == 0


def test_codes_are_not_moved_by_masks_of_values(tmp_path: Path) -> None:
    a = put(tmp_path / "a", quantised(Q, SCALE))
    b = put(tmp_path / "b", quantised(Q[::-1].copy(), (SCALE * 2).astype(np.float32)))
    bits, by_value = tmp_path / "bits.zarr", tmp_path / "values.zarr"
    ckdiff.diff(a, b, bits)
    ckdiff.diff(a, b, by_value, dequantize=True)
    both = tmp_path / "both.zarr"
    ckdiff.combine("union", [by_value, by_value], both)  # says no more how it was made
    for mask in (by_value, both):
        with pytest.raises(ckdiff.PairingError, match="without --dequantize"):
            ckdiff.graft(a, b, mask, tmp_path / "g")
        with pytest.raises(ckdiff.PairingError, match="without --dequantize"):
            ckdiff.delta(a, b, tmp_path / "d", mask=mask)
    assert not (tmp_path / "g").exists()
    assert not (tmp_path / "d").exists()
    ckdiff.graft(a, b, bits, tmp_path / "g")
    assert ckdiff.diff(b, tmp_path / "g").rules["exact"]["changed"] == 0
    ckdiff.delta(a, b, tmp_path / "d", mask=bits)


def test_codes_are_not_values_of_the_other_side(tmp_path: Path) -> None:
    a = put(tmp_path / "a", quantised(Q, SCALE))
    b = put(tmp_path / "b", {"l.w.weight": values(Q, SCALE).astype(BF16), "norm": np.ones(8, BF16)})
    ckdiff.diff(a, b, tmp_path / "m.zarr")
    for base, tuned in ((a, b), (b, a)):
        with pytest.raises(ckdiff.PairingError, match=r"one side only|without --dequantize"):
            ckdiff.graft(base, tuned, tmp_path / "m.zarr", tmp_path / "g")
