"""Masks of principal and of small weights: what sorting the whole matrix would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok
from derived_stores import fails_after, tree
from hypothesis import given
from hypothesis import strategies as st
from support import write_safetensors
from test_structure_energy import NUMPY, write

import ckdiff
from ckdiff.runs.principals.low import Limit, magnitudes, smallest, taken
from ckdiff.runs.principals.making import LowMask, reconstruction

FLOATS = ["BF16", "F16", "F32", "F64", "F8_E4M3"]


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60),
    st.sampled_from([8, 16, 32, 64]),
    st.data(),
)
def test_the_smallest_are_found_without_sorting(
    values: list[int], bits: int, data: st.DataObject
) -> None:
    some = data.draw(st.sampled_from([2**bits, 3, 70_000]))
    keys = np.array([value % 2**bits % some for value in values], f"u{bits // 8}")
    wanted = data.draw(st.integers(1, len(keys)))
    limit = smallest(lambda: iter([keys[:7], keys[7:]]), bits, wanted)
    flags, equal = taken(keys[:7], limit, 0)
    more, _ = taken(keys[7:], limit, equal)
    expected = np.zeros(len(keys), bool)
    expected[np.argsort(keys, kind="stable")[:wanted]] = True
    assert np.concatenate([flags, more]).tolist() == expected.tolist()


def test_magnitudes_are_ordered_like_absolute_values() -> None:
    values = np.array([0.0, -0.0, 1.5, -1.5, -3, np.inf, np.nan], np.float32)
    keys = magnitudes(values.view(np.uint8), "F32").tolist()
    assert keys[0] == keys[1] == 0
    assert keys[2] == keys[3] < keys[4] < keys[5] < keys[6]
    whole = np.array([0, -1, 1, -128, 127], np.int8)
    assert magnitudes(whole.view(np.uint8), "I8").tolist() == [0, 1, 1, 128, 127]
    assert magnitudes(np.array([0x80, 0x7F, 0], np.uint8), "F8_E4M3FNUZ").tolist() == [255, 127, 0]
    assert taken(np.array([3, 3, 2], np.uint8), Limit(3, 1), 0)[0].tolist() == [True, False, True]


def checkpoint(path: Path, seed: int = 0, rows: int = 40) -> tuple[Path, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {
        f"{i}.{dtype}.weight": (dtype, np.round(rng.standard_normal((rows, 30)), 1))
        for i, dtype in enumerate(FLOATS)
    }
    tensors["7.conv.weight"] = "BF16", rng.standard_normal((6, 3, 2, 2))
    tensors["8.bias"] = "BF16", rng.standard_normal(50)
    tensors["9.ids.weight"] = "I16", rng.integers(-9, 9, (12, 12))
    values = {
        name: v.astype(NUMPY[dtype]).astype(np.float64) for name, (dtype, v) in tensors.items()
    }
    return write(path, tensors), values


def like(root: Path) -> Path:
    one, other = (checkpoint(root / f"{seed}.safetensors", seed)[0] for seed in (0, 1))
    ckdiff.diff(one, other, root / "run.zarr")
    return root / "run.zarr"


def lowest(values: Any, share: float) -> Any:
    flat = np.abs(values).ravel()
    found = np.zeros(len(flat), bool)
    found[np.argsort(flat, kind="stable")[: round(share * len(flat))]] = True
    return found.reshape(values.shape)


@pytest.mark.parametrize("share", [0, 0.05, 0.3, 1])
def test_the_smallest_weights(tmp_path: Path, share: float) -> None:
    store = like(tmp_path)
    path, values = checkpoint(tmp_path / "0.safetensors")
    found = ckdiff.principal(path, tmp_path / "low.zarr", like=store, kind="low", alpha=share)
    for name, matrix in values.items():
        expected = lowest(matrix, share) if matrix.ndim > 1 else np.zeros(matrix.shape, bool)
        assert np.array_equal(found.mask(name), expected), name
    found.check()
    made = found.manifest["made_by"]
    assert (made["operation"], made["alpha"]) == ("low", repr(float(share)))
    assert made["files"][0]["label"].endswith("/0.safetensors")
    # the mask's base is the checkpoint: overlaps with the run from it know
    assert found.table.base_hashes == ckdiff.open_store(store).table.base_hashes


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_principal_weights(tmp_path: Path, rank: int | None) -> None:
    store = like(tmp_path)
    path, values = checkpoint(tmp_path / "0.safetensors")
    found = ckdiff.principal(
        path, tmp_path / "p.zarr", like=store, kind="principal", alpha=0.2, rank=rank
    )
    for name, matrix in values.items():
        flags = found.mask(name)
        if matrix.ndim == 1:
            assert not flags.any()
            continue
        assert flags.sum() == round(0.2 * flags.size)
        flat = matrix.reshape(len(matrix), -1)
        left, sizes, right = np.linalg.svd(flat, full_matrices=False)
        energy = np.cumsum(sizes**2) / (sizes**2).sum()
        kept = rank or int(np.argmax(energy >= 0.9)) + 1
        rebuilt = np.abs((left[:, :kept] * sizes[:kept]) @ right[:kept]).reshape(flags.shape)
        # float32 may order what is all but equal otherwise
        assert rebuilt[flags].min() >= rebuilt[~flags].max() - 1e-5
    made = found.manifest["made_by"]
    assert made.get("rank") == rank


def test_a_reconstruction_of_full_rank_is_the_matrix() -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    assert np.allclose(reconstruction(matrix.copy(), 4), matrix, atol=1e-5)
    assert not reconstruction(np.zeros((3, 3), np.float32), None).any()


def test_ties_go_to_the_lower_address_across_chunks(tmp_path: Path) -> None:
    elements = (1 << 26) + 512 * 40  # the end lies in a second chunk
    rows = elements // 512
    data = np.full(elements, 5, np.uint8)
    data[::2] = 7
    data[-3:] = 1
    path = write_safetensors(tmp_path / "m.safetensors", {"w": ("U8", (rows, 512), data.tobytes())})
    ckdiff.diff(path, path, tmp_path / "s.zarr")
    wanted = elements // 2 + 11  # all that are small, and a few of the others
    found = ckdiff.principal(
        path, tmp_path / "low.zarr", like=tmp_path / "s.zarr", kind="low", alpha=wanted / elements
    )
    flags = found.mask("w").ravel()
    assert flags.sum() == wanted
    expected = (data < 7).astype(bool)
    expected[np.flatnonzero(data == 7)[: wanted - expected.sum()]] = True
    assert np.array_equal(flags, expected)


def test_a_stopped_run_is_resumed_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = like(tmp_path)
    arguments: dict[str, Any] = {"like": store, "kind": "low", "alpha": 0.3}
    base = tmp_path / "0.safetensors"
    whole = ckdiff.principal(base, tmp_path / "whole.zarr", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(LowMask, "make", fails_after(0, LowMask, KeyboardInterrupt()))
        with pytest.raises(ckdiff.Interrupted):
            ckdiff.principal(base, tmp_path / "again.zarr", **arguments)
    again = ckdiff.principal(base, tmp_path / "again.zarr", **arguments)
    assert tree(again.path) == tree(whole.path)


def test_what_is_refused(tmp_path: Path) -> None:
    store = like(tmp_path)
    base = tmp_path / "0.safetensors"
    out = tmp_path / "out.zarr"
    for wrong in ({"alpha": 1.5}, {"alpha": float("nan")}, {"kind": "high"}, {"rank": 3}):
        with pytest.raises(ckdiff.UsageError):
            ckdiff.principal(base, out, **({"like": store, "kind": "low", "alpha": 0.1} | wrong))  # type: ignore[arg-type]
    other, _ = checkpoint(tmp_path / "other.safetensors", rows=41)
    with pytest.raises(ckdiff.PairingError, match="is \\[41, 30\\]"):
        ckdiff.principal(other, out, like=store, kind="low", alpha=0.1)
    with pytest.raises(ckdiff.BudgetError, match="too little"):
        ckdiff.principal(base, out, like=store, kind="principal", alpha=0.1, memory="10MiB")
    with pytest.raises(ckdiff.StoreError, match="replace"):
        ckdiff.principal(base, base, like=store, kind="low", alpha=0.1)
    assert not out.exists()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    matrix = np.ones((4, 4))
    matrix[0, 0] = np.nan
    path = write(tmp_path / "m.safetensors", {"w": ("F32", matrix)})
    ckdiff.diff(path, path, tmp_path / "s.zarr")
    with pytest.raises(ckdiff.CheckpointError, match="not finite"):
        ckdiff.principal(
            path, tmp_path / "p", like=tmp_path / "s.zarr", kind="principal", alpha=0.5
        )
    found = ckdiff.principal(
        path, tmp_path / "l", like=tmp_path / "s.zarr", kind="low", alpha=15 / 16
    )
    assert not found.mask("w")[0, 0]


def test_the_command_and_its_overlap(tmp_path: Path) -> None:
    store, base = str(like(tmp_path)), str(tmp_path / "0.safetensors")
    out = str(tmp_path / "low.zarr")
    said = ok("principal", base, "--like", store, "--kind", "low", "--alpha", "0.1", "-o", out)
    assert "/0.safetensors, 0.1 of each matrix" in said.stdout
    found = json.loads(
        ok("overlap", store, out, "--null", "magnitude", "--base", base, "--json").stdout
    )
    assert found["unknown_base"] == found["other_base"] == []
    assert "0 to 1" in error(
        "principal", base, "--like", store, "--kind", "low", "--alpha", "2", "-o", out
    )
