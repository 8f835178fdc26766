"""Tensors made from a range of the base's: rows that came and went, parts of fused tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_reseal import loosen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Tensor, write_safetensors

import ckdiff
from ckdiff.deltas.form import FORMS
from ckdiff.errors import DeltaError, PairingError, UsageError

WIDTHS = {"BF16": 2, "F32": 4, "C64": 8, "I64": 8, "U8": 1, "F4": 0.5}
ENCODINGS = ["packed", "indices"]


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def rows(dtype: str, count: int, inner: int, seed: int = 0) -> Tensor:
    """The first rows of one long tensor."""
    whole = noise(seed, int(2000 * inner * WIDTHS[dtype]))
    return dtype, (count, inner), whole[: int(count * inner * WIDTHS[dtype])]


def changed(tensor: Tensor, at: int) -> Tensor:
    dtype, shape, data = tensor
    raw = bytearray(data)
    if raw:
        raw[at % len(raw)] ^= 1
    return dtype, shape, bytes(raw)


def save(folder: Path, **tensors: Tensor) -> Path:
    path: Path = write_safetensors(folder / "model.safetensors", tensors)
    return path


def made(base: Path, tuned: Path, folder: Path, **options: Any) -> Any:
    """A delta, tried: gives what ``delta`` gives."""
    result = ckdiff.delta(base, tuned, folder / "delta", overwrite=True, **options)
    ckdiff.apply(base, folder / "delta", folder / "out.safetensors", overwrite=True)
    assert (folder / "out.safetensors").read_bytes() == tuned.read_bytes()
    return result


def version(path: Path) -> str:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return str(header["__metadata__"]["version"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_vocabulary_that_grew_costs_its_new_rows(tmp_path: Path, encoding: str) -> None:
    base = save(tmp_path / "base", embed=rows("BF16", 1000, 64), other=rows("F32", 3, 3))
    grown = changed(rows("BF16", 1010, 64), 77)
    tuned = save(tmp_path / "tuned", embed=grown, other=rows("F32", 3, 3))
    result = made(base, tuned, tmp_path, encoding=encoding)
    fresh = 10 * 64 * 2
    assert result.size < 3 * fresh + 6000
    assert (result.changed, result.elements) == (1, 1000 * 64 + 9)
    assert not any(result.unpaired.values())
    (one,) = result.resized
    assert one == {"name": "embed", "base": [1000, 64], "tuned": [1010, 64], "rows": 1000}
    assert version(tmp_path / "delta") == "2"
    about = ckdiff.info(tmp_path / "delta")
    assert about["resized"] == result.resized
    assert (about["changed"], about["elements"]) == (1, 1000 * 64 + 9)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_that_went_cost_nothing(tmp_path: Path, encoding: str) -> None:
    base = save(tmp_path / "base", embed=rows("BF16", 1010, 64))
    tuned = save(tmp_path / "tuned", embed=rows("BF16", 1000, 64))
    result = made(base, tuned, tmp_path, encoding=encoding)
    assert result.size < 3000
    assert (result.changed, result.elements) == (0, 64000)
    # what went is not looked at: another base with the same first rows does as well
    other = save(tmp_path / "other", embed=changed(rows("BF16", 1010, 64), 1009 * 128))
    ckdiff.apply(other, tmp_path / "delta", tmp_path / "again.safetensors")
    wrong = save(tmp_path / "wrong", embed=changed(rows("BF16", 1010, 64), 999 * 128))
    with pytest.raises(DeltaError, match="was not made for"):
        ckdiff.apply(wrong, tmp_path / "delta", tmp_path / "no.safetensors")


def test_new_rows_of_zeros_are_no_changes(tmp_path: Path) -> None:
    dtype, _, data = rows("F32", 5, 4)
    base = save(tmp_path / "base", a=(dtype, (5, 4), data), b=("F4", (2, 2), noise(1, 2)))
    longer = ("F4", (4, 2), noise(1, 2) + bytes(2))
    tuned = save(tmp_path / "tuned", a=(dtype, (6, 4), data + bytes(16)), b=longer)
    for encoding in ENCODINGS:
        result = made(base, tuned, tmp_path, encoding=encoding)
        assert (result.changed, result.elements) == (0, 24)


def test_what_has_no_rows_in_common_is_whole_and_the_file_is_as_before(tmp_path: Path) -> None:
    base = save(tmp_path / "base", a=rows("F32", 5, 4), b=("F32", (2,), bytes(8)))
    for shape in ((4, 6), (24,), (6, 2, 2)):
        tuned = save(tmp_path / "t", a=("F32", shape, noise(4, 96)), b=("F32", (2,), bytes(8)))
        assert made(base, tuned, tmp_path).unpaired["reshaped"] == ["a"]
        assert version(tmp_path / "delta") == "1"
        assert "ranges" not in loosen(tmp_path / "delta").manifest


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several windows."""
    for form in set(FORMS.values()):
        monkeypatch.setattr(form, "frame", 512 * 8 * form.bytes)


@given(
    dtype=st.sampled_from(sorted(WIDTHS)),
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    inner=st.sampled_from([2, 64, 512, 1000]),
    seed=st.integers(0, 1000),
    encodings=st.lists(st.sampled_from(ENCODINGS), min_size=5, max_size=5),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_chains_of_any_rows(
    tmp_path_factory: pytest.TempPathFactory,
    small_frames: None,
    dtype: str,
    counts: Sequence[int],
    inner: int,
    seed: int,
    encodings: Sequence[str],
) -> None:
    """Whatever came and went, and was changed between: the last one's bytes, in one go."""
    folder = tmp_path_factory.mktemp("chain")
    sides = []
    for i, count in enumerate(counts):
        tensor = rows(dtype, count, inner, seed)
        for k in range(1, i + 1):
            tensor = changed(tensor, (seed + 7919 * k) * k)
        sides.append(save(folder / str(i), a=tensor, b=rows("BF16", 2, 2)))
    deltas = []
    for i, (one, other) in enumerate(pairwise(sides)):
        path = folder / f"{i}.delta"
        ckdiff.delta(one, other, path, encoding=encodings[i])
        ckdiff.apply(one, path, folder / "step.safetensors", overwrite=True)
        assert (folder / "step.safetensors").read_bytes() == other.read_bytes()
        deltas.append(path)
    ckdiff.apply(sides[0], deltas, folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == sides[-1].read_bytes()


def test_a_chain_in_another_order_or_of_another_base(tmp_path: Path) -> None:
    sides = [save(tmp_path / str(n), a=changed(rows("BF16", n, 8), n)) for n in (4, 6, 3)]
    deltas = [tmp_path / "0.delta", tmp_path / "1.delta"]
    for path, (one, other) in zip(deltas, pairwise(sides), strict=True):
        ckdiff.delta(one, other, path)
    with pytest.raises(DeltaError, match="does not follow"):
        ckdiff.apply(sides[0], deltas[::-1], tmp_path / "out.safetensors")
    other = save(tmp_path / "other", a=changed(rows("BF16", 4, 8), 1))
    with pytest.raises(DeltaError):
        ckdiff.apply(other, deltas, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# masks


@pytest.mark.parametrize(("before", "after"), [(5, 8), (8, 5)])
def test_of_common_rows_a_mask_takes_some(tmp_path: Path, before: int, after: int) -> None:
    one, other = rows("F32", before, 4, 1), rows("F32", after, 4, 2)
    base, tuned = save(tmp_path / "b", a=one), save(tmp_path / "t", a=other)
    few = bytearray(rows("F32", after, 4, 1)[2])
    few[::9] = bytes(x ^ 1 for x in few[::9])
    some = save(tmp_path / "some", a=("F32", (after, 4), bytes(few)))
    ckdiff.diff(base, some, tmp_path / "some.zarr", common_rows=True)
    half = ckdiff.random_mask(tmp_path / "some.zarr", tmp_path / "half.zarr", seed=1)
    result = ckdiff.delta(base, tuned, tmp_path / "d", mask=half)
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out.safetensors")
    mask = ckdiff.open_store(half).mask("a")
    both = min(before, after)
    x, y = (np.frombuffer(t[2], np.float32).reshape(t[1]) for t in (one, other))
    wanted = np.concatenate([np.where(mask, y[:both], x[:both]), y[both:]])
    assert (tmp_path / "out.safetensors").read_bytes().endswith(wanted.tobytes())
    assert result.changed == mask.sum() > 0
    assert result.lossy is not None
    assert result.lossy["left_out"] == 4 * both - mask.sum()


def test_a_mask_of_other_rows_is_refused(tmp_path: Path) -> None:
    base, tuned = (
        save(tmp_path / "b", a=rows("F32", 5, 4)),
        save(tmp_path / "t", a=rows("F32", 8, 4)),
    )
    for count in (6, 8):
        one, other = (save(tmp_path / f"{count}{s}", a=rows("F32", count, 4, s)) for s in (1, 2))
        ckdiff.diff(one, other, tmp_path / f"{count}.zarr")
        with pytest.raises(PairingError, match="the mask does not fit: a is"):
            ckdiff.delta(base, tuned, tmp_path / "d", mask=tmp_path / f"{count}.zarr")


# parts


def fused(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A base with keys and values in one, and one that has them apart."""
    width, names = 8, ("q_proj", "k_proj", "v_proj")
    sizes = (8, 4, 4)
    data = [noise(seed + i, size * width * 2) for i, size in enumerate(sizes)]
    mlp = [noise(seed + 9 + i, 6 * width * 2) for i in range(2)]
    base, tuned = dict[str, Tensor](), dict[str, Tensor]()
    for layer in ("model.layers.0.", "model.layers.1."):
        base[layer + "self_attn.qkv_proj.weight"] = "BF16", (16, width), b"".join(data)
        base[layer + "mlp.gate_up_proj.weight"] = "BF16", (12, width), b"".join(mlp)
        for name, part, size in zip(names, data, sizes, strict=True):
            moved = changed(("BF16", (size, width), part), 5)
            tuned[f"{layer}self_attn.{name}.weight"] = moved
        for name, part in zip(("gate_proj", "up_proj"), mlp, strict=True):
            tuned[f"{layer}mlp.{name}.weight"] = changed(("BF16", (6, width), part), 9)
    both = {"model.norm.weight": ("BF16", (8,), noise(3, 16))}
    return save(folder / "fused", **base, **both), save(folder / "parts", **tuned, **both)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_parts_of_a_fused_base(tmp_path: Path, encoding: str) -> None:
    base, tuned = fused(tmp_path)
    result = made(base, tuned, tmp_path, encoding=encoding)
    assert (result.changed, result.elements) == (10, 2 * (16 + 12) * 8 + 8)
    assert not any(result.unpaired.values())
    assert len(result.parts) == 10
    assert {item["base"].split(".")[-2] for item in result.parts} == {"qkv_proj", "gate_up_proj"}
    back = made(tuned, base, tmp_path, encoding=encoding)  # fused ones have no base: whole
    assert len(back.unpaired["added"]) == 4
    assert ckdiff.info(tmp_path / "delta")["kind"] == "delta"


def test_parts_in_a_chain(tmp_path: Path) -> None:
    """As the first link only: windows of a part do not begin where its base's do."""
    base, tuned = fused(tmp_path)
    ckdiff.delta(base, tuned, tmp_path / "a.delta")
    ckdiff.delta(tuned, base, tmp_path / "b.delta")
    chain = [tmp_path / "a.delta", tmp_path / "b.delta"]
    ckdiff.apply(base, chain, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == base.read_bytes()
    with pytest.raises(DeltaError, match="is made from the middle of a tensor") as error:
        ckdiff.apply(tuned, chain[::-1], tmp_path / "no.safetensors")
    assert "apply the earlier deltas first" in str(error.value.hint)


def test_a_mask_of_parts(tmp_path: Path) -> None:
    base, tuned = fused(tmp_path)
    ckdiff.diff(base, tuned, tmp_path / "all.zarr")
    result = ckdiff.delta(base, tuned, tmp_path / "d", mask=tmp_path / "all.zarr")
    assert result.lossy is not None
    assert result.lossy["left_out"] == 0
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()


# records


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_records_of_other_rows_come_whole(tmp_path: Path, encoding: str) -> None:
    base = save(tmp_path / "b", a=rows("F32", 5, 4), s=rows("F32", 9, 2, 3))
    tuned = save(tmp_path / "t", a=rows("F32", 8, 4), s=rows("F32", 7, 2, 3))
    ckdiff.delta(base, tuned, tmp_path / "d", encoding=encoding)
    found = list(ckdiff.weight_patches(tmp_path / "d", base=base))
    assert [(p.name, p.shape, p.indices) for p in found] == [
        ("a", (8, 4), None),
        ("s", (7, 2), None),
    ]
    assert found[0].values.tobytes() == rows("F32", 8, 4)[2]
    assert found[1].values.tobytes() == rows("F32", 7, 2, 3)[2]
    with pytest.raises(UsageError, match="cannot be made from the delta alone"):
        list(ckdiff.weight_patches(tmp_path / "d"))
    wrong = save(tmp_path / "w", a=changed(rows("F32", 5, 4), 3), s=rows("F32", 9, 2, 3))
    with pytest.raises(DeltaError, match="was not made for"):
        list(ckdiff.weight_patches(tmp_path / "d", base=wrong))


# hostile values


@pytest.mark.parametrize(
    "change",
    [
        {"elements": 33}, {"elements": 0}, {"elements": 2**62}, {"first": 1}, {"first": 2**62},
        {"new": 13}, {"new": 2**60}, {"base_shape": [8, 4]}, {"base_shape": [2**40, 2**40]},
        {"base_shape": [4, 4]}, {"name": "b"}, {"name": "x"}, {"new": None}, {"base_shape": 5},
        {"base": 5}, {"x": 1}, {"base_shape": [2**30] * 70}, {"elements": 19}, {"new": 11},
    ],
)  # fmt: skip
def test_hostile_ranges(tmp_path: Path, change: dict[str, Any]) -> None:
    base = save(tmp_path / "b", a=rows("F32", 5, 4), b=rows("F32", 2, 2))
    tuned = save(tmp_path / "t", a=rows("F32", 8, 4), b=rows("F32", 2, 2))
    ckdiff.delta(base, tuned, tmp_path / "d")
    loose = loosen(tmp_path / "d")
    (item,) = loose.manifest["ranges"]
    assert item == {
        "name": "a", "base": "a", "base_shape": [5, 4], "first": 0, "elements": 20, "new": 12,
    }  # fmt: skip
    item.update(change)
    with pytest.raises(DeltaError) as error:
        ckdiff.apply(base, loose.seal(tmp_path / "bad"), tmp_path / "out.safetensors")
    assert "\n" not in error.value.message
    assert not (tmp_path / "out.safetensors").exists()


def test_new_elements_are_counted(tmp_path: Path) -> None:
    """What is said of them is held against what comes out, also where all sums are right."""
    base = save(tmp_path / "b", a=rows("F32", 5, 4))
    tuned = save(tmp_path / "t", a=changed(rows("F32", 8, 4), 1))
    ckdiff.delta(base, tuned, tmp_path / "d")
    loose = loosen(tmp_path / "d")
    loose.manifest["ranges"][0]["new"] -= 1
    loose.manifest["changed"] += 1
    with pytest.raises(DeltaError, match="other elements of a changed than it counts"):
        ckdiff.apply(base, loose.seal(tmp_path / "bad"), tmp_path / "out.safetensors")
    with pytest.raises(DeltaError, match="other elements of a changed than it counts"):
        list(ckdiff.weight_patches(tmp_path / "bad", base=base))


def test_ranges_of_no_version_and_none_of_this(tmp_path: Path) -> None:
    base = save(tmp_path / "b", a=rows("F32", 5, 4))
    tuned = save(tmp_path / "t", a=rows("F32", 8, 4))
    ckdiff.delta(base, tuned, tmp_path / "d")
    cases: list[tuple[Any, str]] = [
        ([], "2"), (None, "2"), ("kept", "1"), ("twice", "2"), ("kept", "3"),
    ]  # fmt: skip
    for ranges, number in cases:
        loose = loosen(tmp_path / "d")
        loose.metadata["version"] = number
        if ranges is None:
            del loose.manifest["ranges"]
        elif ranges == "twice":
            loose.manifest["ranges"] *= 2
        elif ranges != "kept":
            loose.manifest["ranges"] = ranges
        with pytest.raises(DeltaError):
            ckdiff.info(loose.seal(tmp_path / "bad"))
