"""Grafts between sides that are stored otherwise: other dtypes, fused tensors, other files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckdiff
from ckdiff.checkpoints.pieces import Piece, packed_strides
from ckdiff.errors import PairingError
from ckdiff.grafts import run
from ckdiff.grafts.blending import Blender, Blends, can_take
from ckdiff.grafts.weaving import Lying, woven
from ckdiff.options import Observer

Array = npt.NDArray[Any]
KINDS = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32), "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(folder: Path, tensors: dict[str, Array]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def content(folder: Path) -> dict[str, Array]:
    found: dict[str, Array] = load_file(folder / "model.safetensors")
    return found


# other dtypes


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("tuned", KINDS)
def test_blends_of_two_dtypes(base: str, tuned: str) -> None:
    """Against ml_dtypes: what is taken is rounded to nearest-even, and counted."""
    if not can_take((base, tuned)):
        assert KINDS[tuned].itemsize == 1
        return
    rng = np.random.default_rng(5)
    count = 3001
    x, y = (noise(i, count).astype(KINDS[kind]) for i, kind in enumerate((base, tuned)))
    mask = rng.random(count) < 0.3
    blender = Blender(Blends([(base, tuned)]))
    sides = x.view(np.uint8), y.view(np.uint8), np.packbits(mask, bitorder="little")
    found, counts = bytearray(), np.zeros(3, np.int64)
    for data, some in blender((base, tuned), sides, count):
        found += data.tobytes()
        counts += some
    # two steps of rounding are not one: none of these needs them
    cast = y.astype(np.float32).astype(KINDS[base]) if tuned != "F64" else y.astype(KINDS[base])
    wanted = np.where(mask, cast, x)
    assert bytes(found) == wanted.tobytes()
    exact = cast.astype(np.float64) == y.astype(np.float64)
    assert counts.tolist() == [
        mask.sum(), (mask & (wanted.astype(np.float64) != x.astype(np.float64))).sum(),
        (mask & ~exact).sum(),
    ]  # fmt: skip


def test_a_tuned_side_in_another_dtype(tmp_path: Path) -> None:
    old = {"a": noise(1, 40, 30).astype(KINDS["BF16"]), "b": noise(2, 20), "c": noise(3, 9)}
    new = {"a": noise(4, 40, 30), "b": noise(5, 20).astype(KINDS["BF16"]), "c": noise(6, 9)}
    base, tuned = save(tmp_path / "base", old), save(tmp_path / "tuned", new)
    ckdiff.diff(base, tuned, tmp_path / "mask.zarr")
    notes = list[str]()
    made = ckdiff.graft(
        base, tuned, tmp_path / "mask.zarr", tmp_path / "out",
        observer=Observer(note=notes.append),
    )  # fmt: skip
    out = content(tmp_path / "out")
    assert {n: t.dtype for n, t in out.items()} == {n: t.dtype for n, t in old.items()}
    for name, tensor in new.items():
        assert out[name].tobytes() == tensor.astype(old[name].dtype).tobytes()
    inexact = (new["a"].astype(KINDS["BF16"]).astype(np.float32) != new["a"]).sum()
    assert (made["rounded"], made["rounded_elements"]) == (1, inexact)
    assert any("2 tensors have another dtype in tuned" in note for note in notes)


# fused tensors

LAYER = "model.layers.0."


def per_part(seed: int) -> dict[str, Array]:
    """Two experts, attention and a norm, each projection by itself."""
    found = {LAYER + "norm.weight": noise(seed, 8)}
    for i, (name, rows) in enumerate((("q", 8), ("k", 4), ("v", 4))):
        found[f"{LAYER}self_attn.{name}_proj.weight"] = noise(seed + i + 1, rows, 8)
    for expert in range(3):
        for i, (name, shape) in enumerate((("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))):
            name = f"{LAYER}mlp.experts.{expert}.{name}_proj.weight"
            found[name] = noise(seed + 10 * expert + i + 5, *shape)
    return found


def fused(parts: dict[str, Array], style: str) -> dict[str, Array]:
    """The same weights as other programs keep them."""
    attn, experts = LAYER + "self_attn.", LAYER + "mlp.experts."
    qkv = np.concatenate([parts[f"{attn}{x}_proj.weight"] for x in "qkv"])
    gate, up, down = (
        np.stack([parts[f"{experts}{e}.{x}_proj.weight"] for e in range(3)])
        for x in ("gate", "up", "down")
    )
    both = np.concatenate([gate, up], axis=1)
    if style == "columns":
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
    return {
        LAYER + "norm.weight": parts[LAYER + "norm.weight"],
        attn + "qkv_proj.weight": qkv,
        experts + "gate_up_proj": both,
        experts + "down_proj": down,
    }


def some(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    """Some of the elements of ``new``."""
    rng = np.random.default_rng(9)
    return {n: np.where(rng.random(t.shape) < 0.4, new[n], t) for n, t in old.items()}


@pytest.mark.parametrize("style", ["rows", "columns"])
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_fused_on_a_side(
    tmp_path: Path, style: str, sides: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of parts, applied to whatever each side has: the same weights come out."""
    monkeypatch.setattr(run, "_WOVEN", 64)
    old, new = per_part(100), per_part(200)
    marked = some(old, new)
    ckdiff.diff(save(tmp_path / "o", old), save(tmp_path / "m", marked), tmp_path / "z")
    base, tuned = old, new
    if sides in ("base", "both"):
        base = fused(old, style)
    if sides in ("tuned", "both"):
        tuned = fused(new, style)
    base = {n: t.astype(KINDS[dtype]) for n, t in base.items()}
    made = ckdiff.graft(
        save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), tmp_path / "z",
        tmp_path / "out", workers=2,
    )  # fmt: skip
    wanted = fused(marked, style) if sides in ("base", "both") else marked
    out = content(tmp_path / "out")
    assert out.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert out[name].tobytes() == tensor.astype(KINDS[dtype]).tobytes(), name
    assert made["grafted"] == ckdiff.open_store(tmp_path / "z").manifest["changed"]["exact"]
    assert made["unmasked"] == made["left_out"] == []
    assert made["tensors"] == len(base)


@pytest.mark.parametrize("style", ["rows", "columns"])
def test_only_some_parts_have_masks(tmp_path: Path, style: str) -> None:
    old, new = per_part(100), per_part(200)
    one = LAYER + "mlp.experts.1.gate_proj.weight"
    rest = {n: t for n, t in new.items() if n == one}
    few = {n: t for n, t in old.items() if "experts.1" in n or "norm" in n}
    ckdiff.diff(save(tmp_path / "o", few), save(tmp_path / "n", few | rest), tmp_path / "z")
    base = save(tmp_path / "base", fused(old, style))
    made = ckdiff.graft(base, save(tmp_path / "t", new), tmp_path / "z", tmp_path / "out")
    wanted = fused(old | rest, style)
    assert {n: t.tobytes() for n, t in content(tmp_path / "out").items()} == {
        n: np.ascontiguousarray(t).tobytes() for n, t in wanted.items()
    }
    assert made["grafted"] == made["differing"] == 48


def test_fused_tensors_of_another_size(tmp_path: Path) -> None:
    old, new = per_part(100), per_part(200)
    ckdiff.diff(save(tmp_path / "o", old), save(tmp_path / "n", new), tmp_path / "z")
    base = fused(old, "rows")
    base[LAYER + "mlp.experts.gate_up_proj"] = noise(1, 3, 11, 8)
    good = save(tmp_path / "good", fused(old, "rows"))
    with pytest.raises(PairingError, match="the mask does not fit: base lacks"):
        ckdiff.graft(good, tmp_path / "n", tmp_path / "z", tmp_path / "out", unfuse=False)
    with pytest.raises(PairingError, match="the mask does not fit: base lacks"):
        ckdiff.graft(save(tmp_path / "b", base), tmp_path / "n", tmp_path / "z", tmp_path / "out")


# the arithmetic of it


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[int, list[Lying]]:
    """Parts that tile a tensor: slices of an array of some dimensions, with these in any order."""
    fine = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    elements = math.prod(fine)
    whole = np.arange(elements).reshape(fine)
    axis = draw(st.integers(0, len(fine) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, fine[axis]), max_size=2)) - {fine[axis]})
    parts = []
    for piece in np.split(whole, cuts, axis=axis):
        part = piece.transpose(draw(st.permutations(range(len(fine)))))
        strides = tuple(stride // whole.itemsize for stride in part.strides)
        begin = int(part.flat[0]) * 4
        parts.append(Lying(part.shape, (Piece(0, begin, (0,) * part.ndim, part.shape, strides),)))
    return elements, parts


@given(laid_out())
@settings(max_examples=150, deadline=None)
def test_parts_are_boxes_of_the_whole(made: tuple[int, list[Lying]]) -> None:
    """What is put together box by box is what it was taken from, element by element."""
    elements, parts = made
    found = woven(elements, 4, parts)
    assert found is not None
    shape, boxes = found
    out = np.full(shape, -1)
    for part, held in zip(parts, boxes, strict=True):
        (piece,) = part.pieces
        flat = np.empty(math.prod(part.shape), np.int64)
        own = packed_strides(part.shape)
        for index in np.ndindex(*part.shape):
            place = sum(i * s for i, s in zip(index, piece.strides, strict=True))
            flat[sum(i * s for i, s in zip(index, own, strict=True))] = piece.begin // 4 + place
        for box in held:
            for index in np.ndindex(*box.shape):
                at = tuple(a + i for a, i in zip(box.at, index, strict=True))
                assert out[at] == -1
                here = box.begin + sum(i * s for i, s in zip(index, box.strides, strict=True))
                out[at] = flat[here]
    assert out.reshape(-1).tolist() == list(range(elements))


def test_what_does_not_tile_is_refused() -> None:
    half = Lying((2,), (Piece(0, 0, (0,), (2,), (1,)),))
    assert woven(4, 4, [half]) is None
    assert woven(4, 4, [half, half]) is None
    assert woven(6, 4, [Lying((3,), (Piece(0, 0, (0,), (3,), (4,)),)), half]) is None


# other files


def test_torch_files_and_weights_in_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    old, new = per_part(1), per_part(2)
    marked = some(old, new)
    ckdiff.diff(save(tmp_path / "o", old), save(tmp_path / "m", marked), tmp_path / "z")
    files = []
    for name, tensors in (("old", old), ("new", new)):
        state = {n: torch.from_numpy(t) for n, t in tensors.items()}
        torch.save(state, tmp_path / f"{name}.pt")
        files.append((tmp_path / f"{name}.pt", state))
    for i, base in enumerate((files[0][0], files[0][1], tmp_path / "o")):
        for j, tuned in enumerate((files[1][0], files[1][1], fused(new, "columns"))):
            out = tmp_path / f"{i}{j}"
            ckdiff.graft(base, tuned, tmp_path / "z", out)
            found = load_file(out if out.is_file() else out / "model.safetensors")
            assert {n: t.tobytes() for n, t in found.items()} == {
                n: t.tobytes() for n, t in marked.items()
            }
