"""What earlier versions wrote is read for good: files made by 0.1.0, before anything in it changed.

``tests/data/format-1`` holds two checkpoints (``base`` is one file, ``tuned`` two shards with an
index) and what 0.1.0 made of them. They are data: nothing makes them anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

import ckdiff
from ckdiff.checkpoints import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "format-1"
RULE = "atol=1e-5"
#: elements that differ; ``differing`` counts them again, from the bytes
CHANGED = {
    "model.embed_tokens.weight": 194,
    "model.layers.0.self_attn.q_proj.weight": 52,
    "model.layers.0.mlp.experts": 66,
    "model.layers.0.norm.weight": 0,
    "model.layers.10.step": 1,
    "model.layers.10.flags": 3,
    "model.layers.10.empty": 0,
    "model.layers.10.half": 6,
    "model.layers.10.mlp.packed": 2,
}


def differing(name: str) -> np.ndarray:
    """Which elements differ, from the bytes of the two checkpoints and nothing of ckdiff's."""
    sides = []
    for folder in ("base", "tuned"):
        for path in sorted((DATA / folder).glob("*.safetensors")):
            raw = path.read_bytes()
            size = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + size])
            if name in header:
                entry = header[name]
                begin, end = (8 + size + at for at in entry["data_offsets"])
                sides.append((entry, np.frombuffer(raw[begin:end], np.uint8)))
    (entry, base), (_, tuned) = sides
    if entry["dtype"] == "F4":
        both = [np.stack([side & 15, side >> 4], axis=1).reshape(-1) for side in (base, tuned)]
        return (both[0] != both[1]).reshape(entry["shape"])
    count = int(np.prod(entry["shape"]))
    if not count:
        return np.zeros(entry["shape"], bool)
    return (base != tuned).reshape(count, -1).any(axis=1).reshape(entry["shape"])


@pytest.fixture
def store() -> ckdiff.MaskStore:
    return ckdiff.open_store(DATA / "run.zarr")


def test_a_store_is_opened_checked_and_has_the_masks_it_had(store):
    assert ckdiff.check_store(store)["ok"]
    assert {record.name: record.changed["exact"] for record in store.tensors} == CHANGED
    for name, count in CHANGED.items():
        mask = store.mask(name, "exact")
        assert int(mask.sum()) == count
        np.testing.assert_array_equal(mask, differing(name))
    np.testing.assert_array_equal(store.array(RULE)[:], store.dask(RULE).compute())
    assert store.tensors[0].statistics is not None


def test_the_same_diff_still_gives_the_same_masks(store, tmp_path):
    ckdiff.diff(
        DATA / "base", DATA / "tuned", tmp_path / "new.zarr", rules=["exact", RULE], stats=True
    )
    new = ckdiff.open_store(tmp_path / "new.zarr")
    for rule in ("exact", RULE):
        np.testing.assert_array_equal(new.array(rule)[:], store.array(rule)[:])
    assert new.objects == store.objects  # every file of it but the manifest, byte for byte


@pytest.mark.parametrize("name", ["union", "random", "imported"])
def test_a_derived_store_is_opened_and_checked(name, store):
    derived = ckdiff.open_store(DATA / f"{name}.zarr")
    assert ckdiff.check_store(derived)["ok"]
    changed = {record.name: record.changed["exact"] for record in derived.tensors}
    assert changed == CHANGED
    same = np.array_equal(derived.array()[:], store.array("exact")[:])
    assert same == (name != "random")


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_a_delta_is_applied_byte_for_byte(encoding, tmp_path):
    delta = DATA / f"{encoding}.ckdelta"
    assert ckdiff.info(delta)["changed"] == sum(CHANGED.values())
    ckdiff.apply(DATA / "base", delta, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (DATA / "tuned").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (DATA / "tuned" / name).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "masks.safetensors",
        "masks.packed.safetensors",
        "masks.indices.safetensors",
        "masks.frozen.npz",
        "masks.pt",
    ],
)
def test_a_mask_file_is_imported(name, store, tmp_path):
    path = shutil.copy(DATA / name, tmp_path / name)
    made = ckdiff.import_masks(path, tmp_path / "out.zarr", base=DATA / "base")
    np.testing.assert_array_equal(made.array("exact")[:], store.array("exact")[:])


def test_any_zarr_reader_reads_them():
    array = zarr.open_array(DATA / "run.zarr" / "masks" / "exact", mode="r", zarr_format=3)
    ones = int(np.bitwise_count(array[:]).sum())
    assert ones == sum(CHANGED.values())


def test_the_checkpoints_are_what_the_data_are_of():
    with open_checkpoint(DATA / "tuned") as tuned:
        assert set(tuned.table.names) == {*CHANGED, "lm_head.extra"}
