"""The masks of one version, against a diff of the checkpoints on both sides of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_support import run
from support import Tensor
from version_models import write_model, write_steps
from weight_streams import write_version

import ckdiff
from ckdiff.errors import DeltaError, UsageError


def same_masks(one: ckdiff.MaskStore, other: ckdiff.MaskStore) -> None:
    names = [record.name for record in one.tensors]
    assert names == [record.name for record in other.tensors]
    for mine, theirs in zip(one.tensors, other.tensors, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.changed["exact"] == theirs.changed["exact"]
        masks = one.mask(mine.name, "exact"), other.mask(mine.name, "exact")
        np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_the_masks_of_a_version_are_those_of_a_diff(tmp_path: Path, encoding: str) -> None:
    steps = write_steps(tmp_path, 2)
    for base, tuned in ((steps[0], steps[1]), (steps[1], steps[2])):
        ckdiff.delta(base, tuned, tmp_path / "s", encoding=encoding)
    version = tmp_path / "s" / "weight_v000002"
    out = tmp_path / "m.zarr"
    done = run("import", str(version), "-o", str(out), "--base", str(steps[0]))
    assert done.exit_code == 0, done.output
    ckdiff.diff(steps[1], steps[2], tmp_path / "d.zarr")
    same_masks(ckdiff.open_store(out), ckdiff.open_store(tmp_path / "d.zarr"))
    ckdiff.check(out)
    found = run("overlap", str(out), str(tmp_path / "d.zarr"), "--json")
    assert found.exit_code == 0, found.output
    assert '"jaccard": 1.0' in found.stdout


def test_an_earlier_full_version_says_what_tensors_there_are(tmp_path: Path) -> None:
    steps = write_steps(tmp_path, 2)
    ckdiff.delta(steps[0], steps[1], tmp_path / "s", encoding="xor", full=True)
    ckdiff.delta(steps[1], steps[2], tmp_path / "s", encoding="xor")
    store = ckdiff.import_masks(tmp_path / "s" / "weight_v000002", tmp_path / "m.zarr")
    ckdiff.diff(steps[1], steps[2], tmp_path / "d.zarr")
    same_masks(store, ckdiff.open_store(tmp_path / "d.zarr"))
    with pytest.raises(DeltaError, match="is a full version, and does not say what changed"):
        ckdiff.import_masks(tmp_path / "s" / "weight_v000001", tmp_path / "n.zarr")
    away = shutil.copytree(tmp_path / "s" / "weight_v000002", tmp_path / "alone")
    with pytest.raises(DeltaError, match="what tensors the model has: it is not in its") as caught:
        ckdiff.import_masks(away, tmp_path / "n.zarr")
    assert "--base" in str(caught.value)
    with pytest.raises(UsageError, match="by the rule exact"):
        ckdiff.import_masks(tmp_path / "s" / "weight_v000002", tmp_path / "n.zarr", invert=True)
    assert not (tmp_path / "n.zarr").exists()


def test_without_a_model_it_is_refused(tmp_path: Path) -> None:
    steps = write_steps(tmp_path, 1)
    ckdiff.delta(steps[0], steps[1], tmp_path / "s", encoding="xor")
    done = run("import", str(tmp_path / "s" / "weight_v000001"), "-o", str(tmp_path / "m.zarr"))
    assert done.exit_code == 2
    assert "no full version is before it" in done.stderr or "--base" in done.stderr
    with pytest.raises(UsageError, match="a mask needs one of them"):
        ckdiff.import_masks(tmp_path / "s", tmp_path / "m.zarr", base=steps[0])
    other = write_model(tmp_path / "other", {"x": ("U8", (3,), b"abc")})
    with pytest.raises(DeltaError, match="which the base does not have"):
        ckdiff.import_masks(tmp_path / "s" / "weight_v000001", tmp_path / "m.zarr", base=other)


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 4001), ("F6_E2M3", 3000), ("C64", 800)])
def test_elements_of_other_widths(tmp_path: Path, dtype: str, nbytes: int) -> None:
    rng = np.random.default_rng(0)
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64}[dtype]
    old = np.frombuffer(rng.bytes(nbytes), np.uint8)
    new = old.copy()
    new[rng.integers(0, nbytes, 200)] ^= rng.integers(1, 255, 200).astype(np.uint8)
    shape = (nbytes * 8 // bits,)
    base: dict[str, Tensor] = {"w": (dtype, shape, old.tobytes())}
    tuned: dict[str, Tensor] = {"w": (dtype, shape, new.tobytes())}
    one, two = (write_model(tmp_path / n, m) for n, m in (("one", base), ("two", tuned)))
    for number, encoding in enumerate(("xor", "overwrite"), 1):
        version = write_version(tmp_path / encoding, number, base, tuned, encoding=encoding)
        out = tmp_path / f"{encoding}.zarr"
        if encoding == "overwrite" and bits < 8:
            with pytest.raises(DeltaError, match=f"w has elements of {bits} bits"):
                ckdiff.import_masks(version, out, base=one)
            continue
        store = ckdiff.import_masks(version, out, base=one)
        if number == 1:
            ckdiff.diff(one, two, tmp_path / "d.zarr")
        same_masks(store, ckdiff.open_store(tmp_path / "d.zarr"))


def test_a_version_without_changes_is_a_store_without_ones(tmp_path: Path) -> None:
    (step,) = write_steps(tmp_path, 0)
    made = ckdiff.delta(step, step, tmp_path / "s", encoding="xor")
    store = ckdiff.import_masks(made.path, tmp_path / "m.zarr", base=step)
    assert [record.changed["exact"] for record in store.tensors] == [0] * 7
    assert ckdiff.check(tmp_path / "s", base=step)["frames"] == 0
    assert ckdiff.info(tmp_path / "s")["versions"][0]["changed_bytes"] == 0
    squashed = ckdiff.squash(tmp_path / "s", 1, 1, tmp_path / "o")
    assert (squashed.tensors, squashed.changed_bytes) == (0, 0)
