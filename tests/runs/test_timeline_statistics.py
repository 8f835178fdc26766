"""``timeline --stats``: how far a run went and which way, against its naive twin."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr
from checkpoint_pairs import files_of, write_sparse
from cli_support import run as cli
from naive_timeline import Way, ways
from support import write_safetensors
from test_timeline_resuming import killed
from timelines import Run, some_run, went, write_run

import ckdiff
from ckdiff.kernels.abi import PATHS_BLOCK
from ckdiff.layout import CHUNK
from ckdiff.runs.timeline import timeline
from ckdiff.runs.timelines.check import check_timeline
from ckdiff.runs.timelines.result import Timeline, open_timeline
from ckdiff.stores.sealed import seal

KEYS = (
    "step_length", "distance", "path_length", "path_ratio", "onward", "back", "sign_agreement",
    "nonfinite",
)  # fmt: skip


def numbers(run: Run) -> Run:
    """A run with finite numbers, one of them infinite at one step."""
    chance, found = np.random.default_rng(len(run)), dict(run)
    for name, (dtype, shape, sides) in run.items():
        if dtype != "BF16" or not len(sides[0]):
            continue
        now = chance.standard_normal(len(sides[0]) // 2).astype("<f4").view("<u4") >> 16
        made = [now.astype("<u2")]
        for _ in sides[1:]:
            moved = chance.random(len(now)) < 0.3
            now = np.where(moved, now + chance.integers(-2, 3, len(now)), now)
            back = chance.random(len(now)) < 0.1
            now = np.where(back, made[0], now).astype(np.uint32) & 0xFFFF
            made.append(now.astype("<u2"))
        made[1][3] = 0x7F80
        found[name] = dtype, shape, [side.tobytes() for side in made]
    return found


def hold(steps: Sequence[Mapping[str, Any]], every: Sequence[Sequence[Way]]) -> None:
    """Hold the steps of a group against the twins of its tensors."""
    path = 0.0
    for number, step in enumerate(steps):
        here = [one[number] for one in every]
        onward, back = sum(w.onward for w in here), sum(w.back for w in here)
        assert (step["onward"], step["back"]) == (onward, back)
        assert step["nonfinite"] == sum(w.nonfinite for w in here)
        agreement = onward / (onward + back) if onward + back else None
        assert step["sign_agreement"] == agreement
        length = float(sum(w.step_length for w in here))
        distance = float(sum(w.distance for w in here))
        path += length
        for key, value in (("step_length", length), ("distance", distance), ("path_length", path)):
            assert step[key] == pytest.approx(value, rel=1e-12)
        if distance:
            assert step["path_ratio"] == pytest.approx(path / distance, rel=1e-12)
        else:
            assert step["path_ratio"] is None


def agrees(found: Timeline, run: Run) -> None:
    every = went(run)
    said = found.to_dict()
    hold(said["steps"], list(every.values()))
    for row in found.summary("tensor"):
        hold(row["steps"], [every[row["group"]]])
        assert row["onward"] == sum(step["onward"] for step in row["steps"])
    (whole,) = found.summary("model")
    for key in ("distance", "path_length", "path_ratio", "onward", "back", "sign_agreement"):
        assert said[key] == whole[key]
        if key in ("distance", "path_length", "path_ratio"):
            assert said[key] == said["steps"][-1][key]
    assert said["onward"] == sum(step["onward"] for step in said["steps"])
    assert check_timeline(found)["ok"]


@pytest.mark.parametrize("rule", ["exact", "atol=0.5"])
def test_twin(rule: str, tmp_path: Path) -> None:
    run = numbers(some_run(1, 5))
    paths = write_run(tmp_path, run)
    found = timeline(paths, tmp_path / "out", rule=rule, stats=True)
    agrees(found, run)
    agrees(open_timeline(tmp_path / "out"), run)


def test_random_bytes_and_two_checkpoints(tmp_path: Path) -> None:
    run = some_run(2, 2)
    found = timeline(write_run(tmp_path, run), tmp_path / "out", stats=True)
    agrees(found, run)
    assert found.steps[0]["sign_agreement"] is None
    assert found.steps[0]["step_length"] == found.steps[0]["distance"]


def test_what_a_timeline_without_them_has(tmp_path: Path) -> None:
    paths = write_run(tmp_path, numbers(some_run(3, 3)))
    plain = timeline(paths, tmp_path / "plain")
    assert not set(KEYS) & {*plain.to_dict(), *plain.steps[0], *plain.summary("model")[0]}
    with pytest.raises(ckdiff.UsageError, match="has no statistics"):
        _ = plain.paths
    found = timeline(paths, tmp_path / "out", stats=True)
    same = [{k: v for k, v in step.items() if k not in KEYS} for step in found.steps]
    assert same == plain.steps
    group = zarr.open_group(tmp_path / "out", mode="r")
    for name, array in zip(("lengths", "ways"), found.paths, strict=True):
        assert np.asarray(group[name]).tolist() == array.tolist()


def test_any_window_and_workers_give_the_same_bytes(tmp_path: Path) -> None:
    """Floats too: over more than one chunk, and windows of several sizes."""
    size, paths = CHUNK + 3 * PATHS_BLOCK + 700, []
    chance = np.random.default_rng(4)
    for i in range(3):
        pieces = []
        for at in (0, CHUNK // 2, CHUNK - 4096, CHUNK + PATHS_BLOCK):
            values = chance.standard_normal(2000).astype("<f4") if i else np.zeros(2000, "<f4")
            pieces.append((4 * at, values.tobytes()))
        file = tmp_path / f"c{i}.safetensors"
        paths.append(write_sparse(file, {"w": ("F32", (size,))}, {"w": pieces}))
    timeline(paths, tmp_path / "one", workers=1, stats=True)
    timeline(paths, tmp_path / "two", workers=2, memory="180MiB", stats=True)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    steps = open_timeline(tmp_path / "one").steps
    assert all(step["step_length"] > 0 for step in steps)


def test_appending_is_the_same_as_one_go(tmp_path: Path) -> None:
    run = numbers(some_run(5, 6))
    paths = write_run(tmp_path, run)
    timeline(paths, tmp_path / "whole", stats=True)
    timeline(paths[:2], tmp_path / "out", stats=True)
    for upto in (3, 4, 6):
        timeline(paths[:upto], tmp_path / "out", stats=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    agrees(open_timeline(tmp_path / "out"), run)


def test_statistics_come_and_go(tmp_path: Path) -> None:
    paths = write_run(tmp_path, numbers(some_run(6, 4)))
    timeline(paths[:3], tmp_path / "out")
    with pytest.raises(ckdiff.StoreExists, match="without statistics"):
        timeline(paths, tmp_path / "out", stats=True)
    timeline(paths, tmp_path / "whole")
    timeline(paths[:3], tmp_path / "with", stats=True)
    timeline(paths, tmp_path / "with")
    assert files_of(tmp_path / "with") == files_of(tmp_path / "whole")


def test_killed_and_resumed(tmp_path: Path) -> None:
    paths = write_run(tmp_path, numbers(some_run(7, 3)))
    timeline(paths, tmp_path / "whole", stats=True)
    killed("tables", paths, tmp_path / "out", stats=True)
    assert (tmp_path / "out.ckdiff-partial").is_dir()
    found = timeline(paths, tmp_path / "out", stats=True)
    assert found.to_dict()["bytes_resumed"] == found.to_dict()["bytes_read"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_dtypes_on_the_way(tmp_path: Path) -> None:
    chance = np.random.default_rng(8)
    values = [chance.standard_normal(700).astype("<f4") for _ in range(4)]
    narrow = [(v.view("<u4") & 0xFFFF0000).view("<f4") for v in values]
    sides = [
        ("F32", values[0].tobytes()),
        ("BF16", (values[1].view("<u4") >> 16).astype("<u2").tobytes()),
        ("F16", values[2].astype("<f2").tobytes()),
        ("F32", values[3].tobytes()),
    ]
    paths = []
    for i, (dtype, data) in enumerate(sides):
        paths.append(tmp_path / f"c{i}")
        write_safetensors(paths[-1] / "model.safetensors", {"w": (dtype, (700,), data)})
    found = timeline(paths, tmp_path / "out", stats=True)
    wide = [values[0], narrow[1], values[2].astype("<f2").astype("<f4"), values[3]]
    hold(found.steps, [ways("F32", [side.tobytes() for side in wide])])


def test_on_the_command_line(tmp_path: Path) -> None:
    run = numbers(some_run(9, 4))
    paths, out = list(map(str, write_run(tmp_path, run))), str(tmp_path / "out")
    done = cli("timeline", *paths, "-o", out, "--stats", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    every = went(run)
    hold(found["steps"], list(every.values()))
    done = cli("timeline", *paths, "-o", out, "--stats", "--overwrite", "--csv", "--by", "tensor")
    for row in csv.DictReader(io.StringIO(done.stdout)):
        way = every[row["tensor"]][int(row["step"]) - 1]
        assert (int(row["onward"]), int(row["back"])) == (way.onward, way.back)
    done = cli("timeline", *paths, "-o", out, "--stats", "--overwrite")
    assert "onward" in done.stdout
    assert "times as long as" in done.stdout
    assert "onward" not in cli("timeline", *paths, "-o", out, "--overwrite").stdout
    done = cli("timeline", *paths, "-o", f"{out}2", "--stats", "--dry-run", "--json")
    assert json.loads(done.stdout)["refusal"] is None


@pytest.mark.parametrize("name", ["lengths", "ways"])
def test_tables_that_somebody_made_up(name: str, tmp_path: Path) -> None:
    """Sealed again after each change: what no run can have is refused all the same."""
    paths = write_run(tmp_path, numbers(some_run(10, 3)))
    out = tmp_path / "out"
    timeline(paths, out, stats=True)
    file, sound = out / name / "c" / "0" / "0", (out / name / "c" / "0" / "0").read_bytes()
    manifest = json.loads((out / "manifest.json").read_bytes())
    del manifest["digest"]
    odd = [-1.0, float("nan")] if name == "lengths" else [-1, 1 << 40]
    for value in odd:
        kind = "<f8" if name == "lengths" else "<i8"
        data = np.array([value], kind).tobytes() + sound[8:]
        file.write_bytes(data)
        key = f"{name}/c/0/0"
        manifest["objects"][key] = [os.path.getsize(file), xxhash.xxh3_128_hexdigest(data)]
        (out / "manifest.json").write_bytes(seal(manifest))
        with pytest.raises(ckdiff.StoreCorrupt, match="makes no sense"):
            check_timeline(out)
