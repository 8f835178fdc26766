"""``ckdiff.timeline`` against its naive twin, and its stores against those of ``diff``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from checkpoint_pairs import files_of
from support import write_safetensors
from timelines import SHAPES, Run, some_run, told, total, write_run

import ckdiff
from ckdiff.runs.timeline import timeline
from ckdiff.runs.timelines.check import check_timeline
from ckdiff.runs.timelines.result import Timeline, open_timeline


def agrees(found: Timeline, run: Run, rule: str) -> None:
    """Hold everything that a timeline says against the twin."""
    every, steps = told(run, rule), len(found)
    said = found.to_dict()
    assert [s["changed_since_first"] for s in said["steps"]] == total(every, "first")
    assert [s["changed_since_previous"] for s in said["steps"]] == total(every, "previous")
    kept, final = total(every, "kept"), sum(one.final for one in every.values())
    assert [s["kept"] for s in said["steps"]] == kept
    assert [s["coverage"] for s in said["steps"]] == [k / final if final else None for k in kept]
    moved = sum(one.moved for one in every.values())
    assert (said["final"], said["returned"]) == (final, moved - final)
    assert said["never"] + said["returned"] + said["final"] == said["elements"]
    assert len(said["checkpoints"]) == steps + 1
    for name, one in every.items():
        moves = found.first_moves(name)
        assert moves.shape == SHAPES[name][1]
        assert moves.reshape(-1).tolist() == one.moves
        for step in range(1, steps + 1):
            mask = found.store(step).mask(name, rule)
            assert mask.reshape(-1).tolist() == one.masks[step - 1]
    rows = {row["group"]: row for row in found.summary("tensor")}
    for name, one in every.items():
        row = rows[name]
        assert [s["changed_since_first"] for s in row["steps"]] == one.first
        assert [s["changed_since_previous"] for s in row["steps"]] == one.previous
        assert [s["kept"] for s in row["steps"]] == one.kept
        assert row["returned"] == one.moved - one.final
    assert check_timeline(found)["ok"]


@pytest.mark.parametrize("rule", ["exact", "atol=0.5", "ulp=1"])
def test_twin(rule: str, tmp_path: Path) -> None:
    run = some_run(1, 5)
    paths = write_run(tmp_path, run)
    found = timeline(paths, tmp_path / "out", rule=rule)
    agrees(found, run, rule)
    agrees(open_timeline(tmp_path / "out"), run, rule)


def test_two_checkpoints_and_one_that_does_not_move(tmp_path: Path) -> None:
    run = some_run(2, 2, share=0)
    found = timeline(write_run(tmp_path, run), tmp_path / "out")
    agrees(found, run, "exact")
    assert found.steps[0]["coverage"] is None
    assert found.steps[0]["lasting"] is None
    assert found.never == found.elements


@pytest.mark.parametrize("rule", ["exact", "atol=0.5"])
def test_stores_are_those_of_diff(rule: str, tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(3, 4))
    timeline(paths, tmp_path / "out", rule=rule)
    for step, path in enumerate(paths[1:], 1):
        ckdiff.diff(paths[0], path, tmp_path / f"{step}.zarr", rules=[rule])
        there = tmp_path / "out" / "masks" / f"step-{step:05d}.zarr"
        assert files_of(there) == files_of(tmp_path / f"{step}.zarr")


def test_any_window_and_workers_give_the_same_bytes(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(4, 3))
    timeline(paths, tmp_path / "one", workers=1)
    timeline(paths, tmp_path / "two", workers=2, memory="900MiB")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_zarr_reads_the_arrays(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(5, 4))
    found = timeline(paths, tmp_path / "out")
    group = zarr.open_group(tmp_path / "out", mode="r")
    flat = np.asarray(group["first_moves"])
    for record in found.store(1).tensors:
        here = flat[record.start : record.start + record.elements]
        assert here.tolist() == found.first_moves(record.name).reshape(-1).tolist()
    assert np.asarray(group["counts"]).tolist() == found.counts.tolist()


def test_other_dtypes_on_the_way(tmp_path: Path) -> None:
    """A run saved in float32 first and in bfloat16 later is compared by value."""
    chance = np.random.default_rng(3)
    first = chance.standard_normal(700).astype("<f4")
    narrow = first.view("<u4") & 0xFFFF0000  # values that bfloat16 has
    moved = narrow.copy()
    moved[10:20] ^= 1 << 16
    sides = [
        ("F32", narrow.tobytes()),
        ("BF16", (moved >> 16).astype("<u2").tobytes()),
        ("BF16", (narrow >> 16).astype("<u2").tobytes()),
        ("F32", moved.tobytes()),
    ]
    paths = []
    for i, (dtype, data) in enumerate(sides):
        paths.append(tmp_path / f"c{i}")
        write_safetensors(paths[-1] / "model.safetensors", {"w": (dtype, (700,), data)})
    found = timeline(paths, tmp_path / "out")
    assert [s["changed_since_first"] for s in found.steps] == [10, 0, 10]
    assert [s["changed_since_previous"] for s in found.steps] == [10, 10, 10]
    assert (found.never, found.returned, found.final) == (690, 0, 10)
    for step, path in enumerate(paths[1:], 1):
        ckdiff.diff(paths[0], path, tmp_path / f"{step}.zarr")
        there = tmp_path / "out" / "masks" / f"step-{step:05d}.zarr"
        assert files_of(there) == files_of(tmp_path / f"{step}.zarr")
    assert check_timeline(found)["ok"]


def test_tensors_that_are_not_everywhere_are_left_out(tmp_path: Path) -> None:
    run = some_run(6, 3)
    paths = write_run(tmp_path, run)
    name = "model.layers.1.mlp.weight"
    some = {n: (d, s, sides[1]) for n, (d, s, sides) in run.items() if n != name}
    write_safetensors(paths[1] / "model.safetensors", some)
    notes: list[str] = []
    found = timeline(paths, tmp_path / "out", observer=ckdiff.Observer(note=notes.append))
    assert any("1 tensor is not in all checkpoints" in note for note in notes)
    assert name not in [record.name for record in found.store(1).tensors]
    agrees(found, {n: kept for n, kept in run.items() if n != name}, "exact")
    ckdiff.diff(paths[0], paths[2], tmp_path / "2.zarr", exclude=[name])
    there = tmp_path / "out" / "masks" / "step-00002.zarr"
    assert files_of(there) == files_of(tmp_path / "2.zarr")


def test_without_first_moves(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(7, 3))
    found = timeline(paths, tmp_path / "out", first_moves=False)
    assert not (tmp_path / "out" / "first_moves").exists()
    assert check_timeline(found)["ok"]
    with pytest.raises(ckdiff.UsageError, match="keeps no first moves"):
        found.first_moves("model.embed.weight")


def test_a_glob_in_natural_order(tmp_path: Path) -> None:
    run = some_run(8, 12)  # checkpoint-1000 comes after checkpoint-200
    paths = write_run(tmp_path, run)
    found = timeline([], tmp_path / "out", glob=str(tmp_path / "checkpoint-*"))
    assert found.checkpoints == [str(path) for path in paths]
    agrees(found, run, "exact")
    with pytest.raises(ckdiff.UsageError, match="nothing matches"):
        timeline([], tmp_path / "o", glob=str(tmp_path / "nothing-*"))
    with pytest.raises(ckdiff.UsageError, match="two checkpoints or more"):
        timeline([paths[0]], tmp_path / "o")


def test_what_is_in_the_way(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(9, 3))
    timeline(paths, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(ckdiff.StoreExists, match="of just these checkpoints"):
        timeline(paths, tmp_path / "out")
    with pytest.raises(ckdiff.StoreExists, match="of other checkpoints"):
        timeline([paths[0], paths[2], paths[1]], tmp_path / "out")
    with pytest.raises(ckdiff.StoreExists, match="under the rule exact"):
        timeline(paths, tmp_path / "out", rule="atol=1")
    assert files_of(tmp_path / "out") == before
    timeline(paths, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == before
    (tmp_path / "out" / "masks" / "mine.txt").write_text("keep")
    with pytest.raises(ckdiff.StoreExists, match=r"mine\.txt"):
        timeline(paths, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "masks" / "mine.txt").read_text() == "keep"
    ckdiff.diff(paths[0], paths[1], tmp_path / "store")
    with pytest.raises(ckdiff.StoreExists, match="not a timeline"):
        timeline(paths, tmp_path / "store", overwrite=True)
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def test_appending_is_the_same_as_one_go(tmp_path: Path) -> None:
    run = some_run(10, 6)
    paths = write_run(tmp_path, run)
    timeline(paths, tmp_path / "whole")
    timeline(paths[:2], tmp_path / "out")
    for upto in range(3, 7):
        found = timeline(paths[:upto], tmp_path / "out")
        sizes = sum((path / "model.safetensors").stat().st_size for path in paths[:3])
        assert found.to_dict()["bytes_read"] <= sizes
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    agrees(found, run, "exact")
    # several at a time
    timeline(paths[:3], tmp_path / "other")
    timeline(paths, tmp_path / "other")
    assert files_of(tmp_path / "other") == files_of(tmp_path / "whole")


def test_appending_to_something_that_changed(tmp_path: Path) -> None:
    run = some_run(11, 4)
    paths = write_run(tmp_path, run)
    timeline(paths[:3], tmp_path / "out")
    before = files_of(tmp_path / "out")
    weights = paths[1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # its modification time is another one
    with pytest.raises(ckdiff.StoreExists, match="is not what is given"):
        timeline(paths, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_damage_is_noticed(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(12, 4))
    timeline(paths[:3], tmp_path / "out")
    for key in sorted(files_of(tmp_path / "out")):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "out", copy)
        data = bytearray((copy / key).read_bytes())
        data[len(data) // 2] ^= 0x10
        (copy / key).write_bytes(data)
        with pytest.raises(ckdiff.CkdiffError):
            check_timeline(copy)
        if key.startswith("masks/step-00001"):
            with pytest.raises(ckdiff.CkdiffError):
                timeline(paths, copy)
        shutil.rmtree(copy)


def test_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Also where the second comes later: the first is called by more of its path from then on."""
    written = write_run(tmp_path, some_run(13, 3))
    paths = [tmp_path / name for name in ("base", "run1/tuned", "run2/tuned")]
    for one, other in zip(written, paths, strict=True):
        other.parent.mkdir(exist_ok=True)
        one.rename(other)
    timeline(paths[:2], tmp_path / "out")
    assert open_timeline(tmp_path / "out").checkpoints == ["base", "tuned"]
    timeline(paths, tmp_path / "out")
    assert open_timeline(tmp_path / "out").checkpoints == ["base", "run1/tuned", "run2/tuned"]
    timeline(paths, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
