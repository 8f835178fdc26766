"""Overlaps, combinations and random masks of runs whose sides were stored otherwise."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckdiff
from ckdiff.errors import PairingError

LAYER = "model.layers.0.self_attn."
Tensors = dict[str, np.ndarray]  # type: ignore[type-arg]


def save(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def base_of() -> Tensors:
    rng = np.random.default_rng(1)
    sizes = {"q": 16, "k": 8, "v": 8}
    found = {
        f"{LAYER}{x}_proj.weight": rng.standard_normal((n, 32)).astype(np.float32)
        for x, n in sizes.items()
    }
    return found | {"embed": rng.standard_normal((20, 32)).astype(np.float32)}


def run(old: Tensors, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: np.where(rng.random(t.shape) < 0.3, t + 1, t) for n, t in old.items()}


def fused(tensors: Tensors) -> Tensors:
    """With queries, keys and values in one."""
    found = {n: t for n, t in tensors.items() if LAYER not in n}
    whole = np.concatenate([tensors[f"{LAYER}{x}_proj.weight"] for x in "qkv"])
    return found | {f"{LAYER}qkv_proj.weight": whole}


def masks(old: Tensors, new: Tensors) -> Tensors:
    return {n: t != new[n] for n, t in old.items()}


def test_nulls_read_the_base_as_the_stores_see_it(tmp_path: Path) -> None:
    """A fused base gives what one with the parts does, and is held against the same hashes."""
    old = base_of()
    apart, whole = save(tmp_path / "apart", old), save(tmp_path / "whole", fused(old))
    stores = []
    for i, base in enumerate((apart, whole)):
        tuned = save(tmp_path / str(i), run(old, i))
        ckdiff.diff(base, tuned, tmp_path / f"{i}.zarr")
        stores.append(tmp_path / f"{i}.zarr")
    both = [
        ckdiff.overlap(stores, base=base, nulls=("tensor", "magnitude"), by="tensor")
        for base in (apart, whole)
    ]
    one, other = (masks(old, run(old, i)) for i in range(2))
    for found in both:
        assert found.counts[0, 1] == sum(int((one[n] & other[n]).sum()) for n in old)
        for name in ("tensor", "magnitude"):
            mine, theirs = found.moments[name], both[0].moments[name]
            assert np.array_equal(mine.mean, theirs.mean)
    wrong = dict(old)
    wrong[LAYER + "v_proj.weight"] = old[LAYER + "v_proj.weight"] + 1
    with pytest.raises(ckdiff.CkdiffError, match="is not the base of these stores"):
        ckdiff.overlap(stores, base=save(tmp_path / "w", fused(wrong)), nulls=("magnitude",))
    lacking = fused({n: t[:-1] for n, t in old.items()})
    with pytest.raises(PairingError, match="has another dtype or shape for embed"):
        ckdiff.overlap(stores, base=save(tmp_path / "l", lacking), nulls=("magnitude",))


def test_runs_of_other_dtypes_and_rows(tmp_path: Path) -> None:
    """Counts of what each run changed, whatever it was stored as, are those of its masks."""
    old = base_of()
    news = [run(old, i) for i in range(2)]
    news[0]["embed"] = np.concatenate([news[0]["embed"], np.ones((3, 32), np.float32)])
    bf16 = np.dtype(ml_dtypes.bfloat16)
    old = {n: t.astype(bf16).astype(np.float32) for n, t in old.items()}
    news[1] = {n: t.astype(bf16) for n, t in run(old, 7).items()}
    base, stores, wanted = save(tmp_path / "b", old), list[Path](), list[Tensors]()
    for i, new in enumerate(news):
        tuned = save(tmp_path / f"t{i}", fused(new))
        ckdiff.diff(base, tuned, tmp_path / f"{i}.zarr", common_rows=True)
        stores.append(tmp_path / f"{i}.zarr")
        wanted.append({n: t != new[n][: len(t)].astype(np.float32) for n, t in old.items()})
    found = ckdiff.overlap(stores, base=base, nulls=("tensor", "magnitude", "rowcol"))
    one, other = wanted
    assert found.counts.tolist() == [
        [sum(int((a[n] & b[n]).sum()) for n in old) for b in wanted] for a in wanted
    ]
    both = ckdiff.combine("intersection", stores, tmp_path / "and.zarr")
    for name in old:
        assert (both.mask(name) == (one[name] & other[name])).all()
    drawn = ckdiff.random_mask(stores[1], tmp_path / "r.zarr", seed=1)
    for name in old:
        assert drawn.mask(name).sum() == other[name].sum()
