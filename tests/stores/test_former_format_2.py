"""What 0.2.0 wrote is read for good, as what 0.1.0 wrote is: mask stores of format 2, timelines,
weight versions in every encoding, deltas with common rows, profiles of rows and columns.

``tests/data/format-2`` was made once by ``make_format_2.py`` beside it. What the numbers must be is
said here by numpy from the bytes of the checkpoints, and by nothing of ckdiff's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from naive_timeline import tell, ways
from weight_streams import read_model

import ckdiff

DATA = Path(__file__).parents[1] / "data" / "format-2"
KINDS = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}
RUN = [f"checkpoint-{100 * i}" for i in range(4)]
EMBED, QUERY, NORM = (
    "model.embed.weight",
    "model.layers.0.q_proj.weight",
    "model.layers.0.norm.weight",
)
WRITTEN = "common", "retyped", "dequantized", "adapter", "union", "random", "low"


def model(folder: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return read_model(DATA / folder)


def values(folder: str, name: str) -> npt.NDArray[np.float32]:
    dtype, shape, data = model(folder)[name]
    return np.frombuffer(data, KINDS[dtype]).astype(np.float32).reshape(shape)


def store(name: str) -> ckdiff.MaskStore:
    return ckdiff.open_store(DATA / f"{name}.zarr")


def differing(rule: str = "exact") -> dict[str, npt.NDArray[np.bool_]]:
    """Which elements differ of the checkpoint that grew."""
    found = {}
    for name in (EMBED, NORM, QUERY):
        old, new = values("old", name), values("grown", name)[: len(values("old", name))]
        found[name] = old != new if rule == "exact" else np.abs(old - new) > np.float32(1e-3)
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_a_store_is_opened_and_checked(name: str) -> None:
    assert json.loads((DATA / f"{name}.zarr/manifest.json").read_text())["format_version"] == 2
    assert ckdiff.check_store(store(name))["ok"]


@pytest.mark.parametrize("rule", ["exact", "atol=1e-3"])
def test_retyped_tensors_and_common_rows(rule: str) -> None:
    expected = differing(rule)
    assert all(mask.any() and not mask.all() for mask in expected.values())
    for name, mask in expected.items():
        np.testing.assert_array_equal(store("common").mask(name, rule), mask)
        if name != EMBED:
            np.testing.assert_array_equal(store("retyped").mask(name, rule), mask)
    table = store("common").table
    assert [record.name for record in table] == [*expected]
    counts = [int(mask.sum()) for mask in expected.values()]
    assert [record.changed[rule] for record in table] == counts
    assert store("common").tensors[0].statistics is not None


def test_derived_stores() -> None:
    for name, mask in differing().items():
        np.testing.assert_array_equal(store("union").mask(name), mask)
        assert store("random").mask(name).sum() == mask.sum()
        weights, low = np.abs(values("old", name)), store("low").mask(name)
        if weights.ndim == 2:
            assert low.sum() == weights.size // 4
            assert weights[low].max() <= weights[~low].min()


def test_values_of_quantised_tensors_and_of_adapters() -> None:
    old, new = values("fp8", QUERY), values("fp8-tuned", QUERY)
    np.testing.assert_array_equal(store("dequantized").mask(QUERY), old != new)
    name = "base_model.model.model.layers.0.q_proj.lora_{}.weight"
    low, high = (values("adapter", name.format(side)) for side in "AB")
    merged = (values("old", QUERY) + 2 * (high @ low)).astype(ml_dtypes.bfloat16)
    mask = store("adapter").mask(QUERY)
    np.testing.assert_array_equal(mask, merged.astype(np.float32) != values("old", QUERY))
    assert 0 < mask.sum() < mask.size


def made_again(name: str, out: Path) -> ckdiff.MaskStore:
    given: dict[str, Any] = {
        "common": {"rules": ["exact", "atol=1e-3"], "stats": True, "common_rows": True},
        "retyped": {"rules": ["exact", "atol=1e-3"], "stats": True},
        "dequantized": {"dequantize": True},
        "adapter": {"tuned_adapter": DATA / "adapter"},
    }[name]
    sides = {"dequantized": ("fp8", "fp8-tuned"), "adapter": ("old", "old")}
    base, tuned = sides.get(name, ("old", "grown"))
    ckdiff.diff(DATA / base, DATA / tuned, out, **given)
    return ckdiff.open_store(out)


@pytest.mark.parametrize("name", WRITTEN[:4])
def test_the_same_diff_still_gives_the_same_store(name: str, tmp_path: Path) -> None:
    assert made_again(name, tmp_path / "new.zarr").objects == store(name).objects


@pytest.mark.parametrize(("name", "steps"), [("run", 3), ("no-moves", 2)])
def test_a_timeline(name: str, steps: int) -> None:
    found = ckdiff.open_timeline(DATA / f"{name}.timeline")
    assert ckdiff.check_timeline(found)["ok"]
    run = [model(folder) for folder in RUN[: steps + 1]]
    names = found.store(1).table.names
    assert sorted(names) == sorted(run[0])
    for at, tensor in enumerate(names):
        dtype, shape, _ = run[0][tensor]
        sides = [model[tensor][2] for model in run]
        told = tell("exact", dtype, sides)
        column = [*told.first, *told.previous, *told.kept, told.moved]
        assert found.counts[:, at].tolist() == column
        for step, mask in enumerate(told.masks, 1):
            assert found.store(step).mask(tensor).reshape(-1).tolist() == mask
        if name == "run":
            assert found.first_moves(tensor).shape == shape
            assert found.first_moves(tensor).reshape(-1).tolist() == told.moves
            way = ways(dtype, sides)
            lengths, counts = (part[:, at] for part in found.paths)
            assert counts[:steps].tolist() == [one.onward for one in way]
            steps_and_distances = [one.step_length for one in way] + [one.distance for one in way]
            expected = [float(one) for one in steps_and_distances]
            np.testing.assert_allclose(lengths, expected, rtol=1e-12)


@pytest.mark.parametrize(("target", "folder"), [*enumerate([*RUN[1:], *RUN[1:3]], 1)])
def test_weight_versions_lead_to_every_checkpoint(target: int, folder: str, tmp_path: Path) -> None:
    if target == 5:  # in place, from the version before
        shutil.copytree(DATA / RUN[1], tmp_path / "out")
        ckdiff.apply_in_place(tmp_path / "out", DATA / "stream", base_version=4)
    else:
        ckdiff.apply(DATA / RUN[0], DATA / "stream", tmp_path / "out", target=target)
    assert read_model(tmp_path / "out") == model(folder)


def test_weight_versions_are_checked_and_told() -> None:
    assert ckdiff.check(DATA / "stream", base=DATA / RUN[0])["ok"]
    told = ckdiff.info(DATA / "stream")["versions"]
    encodings = [version["encoding"] for version in told]
    assert encodings == ["xor", "overwrite", "packed", None, "xor"]


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_a_delta_of_common_rows_and_two_dtypes(encoding: str, tmp_path: Path) -> None:
    ckdiff.apply(DATA / "old", DATA / f"{encoding}.ckdelta", tmp_path / "out")
    made = tmp_path / "out/model.safetensors"
    assert made.read_bytes() == (DATA / "grown/model.safetensors").read_bytes()


def test_a_delta_of_a_mask(tmp_path: Path) -> None:
    """Only what the mask marks is new, of tensors that both sides have."""
    ckdiff.apply(DATA / "old", DATA / "masked.ckdelta", tmp_path / "out")
    made, mask = read_model(tmp_path / "out"), differing("atol=1e-3")[QUERY]
    old, new = (np.frombuffer(model(side)[QUERY][2], "<u2") for side in ("old", "grown"))
    expected = np.where(mask.reshape(-1), new, old)
    assert made[QUERY][2] == expected.tobytes()
    assert made.keys() == model("grown").keys()


def test_profiles_of_rows_and_columns(tmp_path: Path) -> None:
    """The file holds what numpy counts, and the same counts are written still."""
    ckdiff.structure([store("common")], rule="exact", profiles=tmp_path / "new.safetensors")
    written = (DATA / "profiles.safetensors").read_bytes()
    assert (tmp_path / "new.safetensors").read_bytes() == written
    mask = differing()[QUERY]
    held = [np.asarray(mask.sum(axis), np.int64).tolist() for axis in (1, 0)]
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    found = []
    for name, entry in header.items():
        if QUERY in name:
            begin, end = (8 + size + at for at in entry["data_offsets"])
            kind = {"U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"}[entry["dtype"]]
            found.append(np.frombuffer(written[begin:end], kind).tolist())
    assert sorted(found) == sorted(held)
