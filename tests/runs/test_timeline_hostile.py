"""Timelines that somebody made up: an error in one line, never a crash, never believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from timelines import some_run, write_run

import ckdiff
from ckdiff.runs.timeline import timeline
from ckdiff.runs.timelines.check import check_timeline
from ckdiff.runs.timelines.result import Timeline
from ckdiff.stores.sealed import seal

ODD: list[Any] = [None, True, -1, 3, 2**70, 1.5, "x", [], {}, [[]], {"x": 1}, ["\udc80"]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, (dict, list)):
        for key, inner in items:
            if isinstance(inner, (dict, list)):
                yield from places(inner, (*path, key))
            else:
                yield (*path, key)


def look(path: Path) -> None:
    """All that can be asked of one."""
    opened = Timeline(path)
    opened.to_dict()
    opened.summary("layer")
    for step in range(1, len(opened) + 1):
        opened.store(step)
    for record in opened.store(1).tensors:
        opened.first_moves(record.name)


def test_sealed_mutations(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(1, 4))
    out = tmp_path / "out"
    timeline(paths[:3], out)
    sound = json.loads((out / "manifest.json").read_bytes())
    del sound["digest"]
    said: list[str] = []
    for number, way in enumerate(places(sound)):
        manifest = json.loads(json.dumps(sound))
        inner = manifest
        for key in way[:-1]:
            inner = inner[key]
        odd = ODD[number % len(ODD)]
        if inner[way[-1]] == odd:
            continue
        inner[way[-1]] = odd
        try:
            (out / "manifest.json").write_bytes(seal(manifest))
        except ValueError:  # no document says this
            continue
        try:
            look(out)
        except ckdiff.CkdiffError as error:
            said.append(error.one_line())
        try:
            check_timeline(out)
        except ckdiff.CkdiffError as error:
            said.append(error.one_line())
        else:  # what nothing else says is believed: how checkpoints are called
            assert way[0] in ("checkpoints", "ckdiff_version")
    assert len(said) > 40
    assert not [line for line in said if "\n" in line]


@pytest.mark.parametrize("content", [b"", b"{", b'{"format":"ckdiff-timeline"', b"[" * 9999, b"\0"])
def test_what_is_no_manifest(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_bytes(content)
    with pytest.raises(ckdiff.CkdiffError):
        look(tmp_path / "out")
    paths = write_run(tmp_path, some_run(2, 2))
    with pytest.raises(ckdiff.StoreExists):
        timeline(paths, tmp_path / "out", overwrite=True)


def test_pipes_and_absent_ones(tmp_path: Path) -> None:
    with pytest.raises(ckdiff.StoreIncomplete, match="there is no timeline"):
        look(tmp_path / "absent")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    with pytest.raises(ckdiff.CkdiffError):
        look(tmp_path / "out")


def test_stores_that_changed_places(tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(3, 4))
    out = tmp_path / "out"
    timeline(paths[:3], out)
    stores = out / "masks"
    shutil.copytree(stores / "step-00002.zarr", stores / "other", dirs_exist_ok=True)
    shutil.rmtree(stores / "step-00001.zarr")
    os.rename(stores / "other", stores / "step-00001.zarr")
    with pytest.raises(ckdiff.StoreCorrupt):
        look(out)
    with pytest.raises(ckdiff.CkdiffError):
        timeline(paths, out)


@pytest.mark.parametrize("count", [2, 5])
def test_as_much_memory_as_the_hint_says_is_enough(count: int, tmp_path: Path) -> None:
    paths = write_run(tmp_path, some_run(4, count))
    with pytest.raises(ckdiff.BudgetError) as raised:
        timeline(paths, tmp_path / "out", memory="1MiB")
    assert raised.value.hint is not None
    assert ("append" in raised.value.hint) == (count > 3)
    timeline(paths, tmp_path / "out", memory=raised.value.hint.split()[1])


def test_many_checkpoints_take_smaller_windows(tmp_path: Path) -> None:
    run = some_run(4, 2)
    first, second = write_run(tmp_path, run)
    few = timeline([first, second], tmp_path / "few", workers=1)
    many = [first, *[second] * 255]
    with pytest.raises(ckdiff.BudgetError, match="256 checkpoints side by side"):
        timeline(many, tmp_path / "many", memory="110MiB", workers=1)
    name = "model.embed.weight"
    found = timeline(many, tmp_path / "many", workers=1, include=[name])
    assert len(found) == 255
    assert found.first_moves(name).dtype.itemsize == 2
    assert found.first_moves(name).tolist() == few.first_moves(name).tolist()
