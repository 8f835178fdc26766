"""What masks of tensors whose sides differ in dtype or rows become: other stores, files, grafts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from two_sides import Pair, some_pairs, two_sided

import ckdiff
from ckdiff.errors import PairingError
from ckdiff.options import Observer

NAMES = ["alike", "embed", "layers.0.w", "layers.1.w", "lm_head", "padded"]
ROWS = {1: (20, 24), 4: (24, 20), 5: (24, 20)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    pairs = some_pairs(1)
    two_sided(folder / "one.zarr", pairs)
    # another run from the same base
    other = some_pairs(2)
    tuned = {
        name: Pair(pair.base, (pair.tuned[0], pair.tuned[1], other[name].tuned[2]))
        for name, pair in pairs.items()
    }
    two_sided(folder / "two.zarr", tuned)
    two_sided(folder / "same.zarr", {"alike": pairs["alike"]})
    return folder


def test_combined(made: Path, tmp_path: Path) -> None:
    one, two = (ckdiff.open_store(made / f"{name}.zarr") for name in ("one", "two"))
    both = ckdiff.combine("union", [one, two], tmp_path / "both.zarr")
    assert ckdiff.check_store(both)["ok"]
    for name in NAMES:
        np.testing.assert_array_equal(both.mask(name), one.mask(name) | two.mask(name))
    assert both.table.base_hashes == one.table.base_hashes
    assert both.table.tuned_hashes == [""] * 6
    # a derived store has no tuned side, and yet its masks are those of some rows
    assert both.table.tuned_dtypes is None
    assert both.table.resized == ROWS
    assert both.manifest["format_version"] == 2
    assert "tied" not in both.manifest
    found = ckdiff.overlap([both, one, two])
    assert (found.other_base, found.unknown_base, found.left_out) == ([], [], [])
    plain = ckdiff.combine("union", [both, made / "same.zarr"], tmp_path / "plain.zarr")
    assert plain.manifest["format_version"] == 1


def test_combined_from_bases_of_other_sizes(made: Path, tmp_path: Path) -> None:
    """Of the base as much is known as all stores agree about."""
    pairs = some_pairs(1)
    dtype, _, data = pairs["padded"].base
    short = Pair((dtype, (20, 30), data[: 20 * 30 * 2]), pairs["padded"].tuned)
    two_sided(tmp_path / "short.zarr", {"padded": short})
    for order in (1, -1):
        inputs = [made / "one.zarr", tmp_path / "short.zarr"][::order]
        made_of = ckdiff.combine("intersection", inputs, tmp_path / f"{order}.zarr")
        assert made_of.table.resized == {0: (24, 20)}
        assert made_of.table.base_hashes == [pairs["padded"].hashes()[0]]
    last = data[:-1] + bytes([data[-1] ^ 1])
    longer = dtype, (25, 30), data + last[-60:]
    two_sided(tmp_path / "longer.zarr", {"padded": Pair(longer, pairs["padded"].tuned)})
    inputs = [made / "one.zarr", tmp_path / "longer.zarr"]
    assert ckdiff.combine("union", inputs, tmp_path / "l.zarr").table.resized == {0: (25, 20)}
    first = Pair((dtype, (24, 30), bytes([data[0] ^ 1]) + data[1:]), pairs["padded"].tuned)
    two_sided(tmp_path / "other.zarr", {"padded": first})
    inputs = [made / "one.zarr", tmp_path / "other.zarr"]
    disputed = ckdiff.combine("union", inputs, tmp_path / "d.zarr")
    assert disputed.table.base_hashes == [""]
    assert ckdiff.check_store(disputed)["ok"]


@pytest.mark.parametrize("within", ["tensor", "model"])
def test_random(made: Path, tmp_path: Path, within: str) -> None:
    one = ckdiff.open_store(made / "one.zarr")
    drawn = ckdiff.random_mask(one, tmp_path / "r.zarr", seed=7, within=within)  # type: ignore[arg-type]
    assert ckdiff.check_store(drawn)["ok"]
    assert drawn.manifest["changed"] == one.manifest["changed"]
    assert drawn.table.shapes == one.table.shapes
    assert drawn.table.resized == ROWS
    assert drawn.table.base_hashes == one.table.base_hashes
    again = ckdiff.random_mask(drawn, tmp_path / "again.zarr", seed=7, within=within)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.array()[:], drawn.array()[:])


@pytest.mark.parametrize("to", ["safetensors", "npz", "torch", "indices"])
def test_exported_and_imported(made: Path, tmp_path: Path, to: str) -> None:
    one, notes = ckdiff.open_store(made / "one.zarr"), list[str]()
    out = tmp_path / {"npz": "m.npz", "torch": "m.pt"}.get(to, "m.safetensors")
    ckdiff.export_masks(one, out, to=to, observer=Observer(note=notes.append))
    (note,) = notes
    assert "3 tensors were compared in the rows that both sides have" in note
    assert note.endswith("embed, lm_head, padded")
    back = ckdiff.import_masks(out, tmp_path / "back.zarr")
    for name in NAMES:
        np.testing.assert_array_equal(back.mask(name), one.mask(name))
    assert back.manifest["format_version"] == 1


def test_exported_files_say_which_rows_they_are_of(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    ckdiff.export_masks(made / "one.zarr", out)
    raw = out.read_bytes()
    said = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    rows = {"embed": [20, 24], "lm_head": [24, 20], "padded": [24, 20]}
    assert json.loads(said["resized"]) == rows
    assert json.loads(said["tensors"])["lm_head"] == ["F16", [20, 30]]
    assert safetensors_numpy.load_file(out)["lm_head"].shape == (20, 30)
    notes: list[str] = []
    ckdiff.export_masks(
        made / "same.zarr", tmp_path / "plain.safetensors", observer=Observer(note=notes.append)
    )
    assert notes == []
    assert b'"resized"' not in (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize(("side", "name"), [("base", "lm_head"), ("tuned", "embed")])
def test_there_is_no_mask_of_rows_that_were_not_compared(
    made: Path, tmp_path: Path, side: str, name: str
) -> None:
    like = made / "one.checkpoints" / side
    with pytest.raises(PairingError, match=f"{name} has 24 rows.* only the first 20") as error:
        ckdiff.export_masks(made / "one.zarr", tmp_path / "out", like=like)
    assert "leave out --like" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_like_the_side_that_was_compared_whole(made: Path, tmp_path: Path) -> None:
    pairs = some_pairs(1)
    grown = two_sided(tmp_path / "grown.zarr", {name: pairs[name] for name in ("alike", "embed")})
    base = grown.path.with_suffix(".checkpoints") / "base"
    ckdiff.export_masks(grown, tmp_path / "out", like=base)
    found = safetensors_numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["embed"], grown.mask("embed"))


def test_an_import_needs_a_base_of_the_masks_shape(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    ckdiff.export_masks(made / "one.zarr", out)
    with pytest.raises(PairingError, match=r"lm_head has the shape \[20, 30\], its tensor"):
        ckdiff.import_masks(out, tmp_path / "i.zarr", base=made / "one.checkpoints" / "base")


# values of the base


def test_null_that_reads_the_base(made: Path, tmp_path: Path) -> None:
    """The rows that were compared are counted, whatever else the base has."""
    stores, pairs = [made / "one.zarr", made / "two.zarr"], some_pairs(1)
    found = ckdiff.overlap(stores, nulls=["magnitude"], base=made / "one.checkpoints" / "base")
    cut = {
        name: Pair((pair.base[0], pair.shape, pair.compared()[0]), pair.tuned)
        for name, pair in pairs.items()
    }
    shorter = two_sided(tmp_path / "cut.zarr", cut)
    same = ckdiff.overlap(
        stores, nulls=["magnitude"], base=shorter.path.with_suffix(".checkpoints") / "base"
    )
    one, other = (
        [row["pairs"][0]["nulls"]["magnitude"] for row in result.to_dict()["rows"]]
        for result in (found, same)
    )
    assert one == other
    with pytest.raises(PairingError, match="another dtype or shape for embed"):
        ckdiff.overlap(stores, nulls=["magnitude"], base=made / "one.checkpoints" / "tuned")


def test_null_finds_another_base(made: Path, tmp_path: Path) -> None:
    pairs = some_pairs(1)
    dtype, shape, data = pairs["padded"].base
    stores = [made / "one.zarr", made / "two.zarr"]
    for at, right in ((len(data) - 1, True), (0, False)):
        content = bytearray(data)
        content[at] ^= 1
        changed = pairs | {"padded": Pair((dtype, shape, bytes(content)), pairs["padded"].tuned)}
        base = two_sided(tmp_path / f"{at}.zarr", changed).path.with_suffix(".checkpoints")
        if right:  # the row that differs was not compared
            ckdiff.overlap(stores, nulls=["magnitude"], base=base / "base")
            continue
        with pytest.raises(ckdiff.CkdiffError, match="is not the base of these stores"):
            ckdiff.overlap(stores, nulls=["magnitude"], base=base / "base")


def test_groups_of_an_overlap_are_of_the_base_dtype(made: Path) -> None:
    found = ckdiff.overlap([made / "one.zarr", made / "two.zarr"], by="dtype")
    assert found.groups == ["model", "BF16", "F16", "F32"]
