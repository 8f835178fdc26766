"""What Python callers hand over: a wrong argument is a UsageError that names it, on one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Pair, write_pair

import ckdiff
from ckdiff.errors import UsageError
from ckdiff.options import Observer, Options


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def store(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> ckdiff.MaskStore:
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    opened = ckdiff.diff(*pair, path, include="*.0.*").store
    assert opened is not None
    return opened


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rules": None}, "rules"),
        ({"rules": 3}, "rules"),
        ({"rules": [3]}, "rule"),
        ({"include": 3}, "include"),
        ({"include": [None]}, "include"),
        ({"include": [np.zeros((3, 3))]}, "include"),
        ({"exclude": b"*"}, "exclude"),
        ({"rename": [("a", "b")]}, "rename"),
        ({"rename": None}, "rename"),
        ({"workers": "2"}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"workers": 0}, "workers"),
        ({"workers": -1}, "workers"),
        ({"memory": 1.5}, "size"),
        ({"stats": "no"}, "stats"),
        ({"overwrite": "no"}, "overwrite"),
        ({"observer": print}, "observer"),
        ({"out": 3}, "output"),
        ({"out": b"out.zarr"}, "output"),
        ({"out": ""}, "output"),
        ({"out": "a\0b"}, "output"),
        ({"base": None}, "checkpoint"),
    ],
)
def test_wrong_arguments_of_diff(pair: Pair, arguments: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"base": pair[0], "tuned": pair[1], **arguments}
    with pytest.raises(UsageError, match=says) as caught:
        ckdiff.diff(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("mask", {"name": 3}, "name"),
        ("mask", {"name": None}, "name"),
        ("mask", {"name": "?", "start": "0"}, "start"),
        ("mask", {"name": "?", "stop": 1.5}, "stop"),
        ("mask", {"name": "?", "rule": 3}, "rule"),
        ("packed", {"name": ["a"]}, "name"),
        ("packed", {"name": "?", "rule": b"exact"}, "rule"),
        ("array", {"rule": 3}, "rule"),
        ("dask", {"rule": ["exact"]}, "rule"),
        ("summary", {"by": None}, "by"),
        ("summary", {"by": "nonsense"}, "group by"),
        ("summary", {"sort": 3}, "sort"),
        ("summary", {"top": "5"}, "top"),
        ("summary", {"top": 0}, "top"),
        ("check", {"progress": 3}, "progress"),
    ],
)
def test_wrong_arguments_of_a_store(
    store: ckdiff.MaskStore, method: str, arguments: dict[str, Any], says: str
) -> None:
    if arguments.get("name") == "?":
        arguments = {**arguments, "name": store.tensors[0].name}
    with pytest.raises(UsageError, match=says) as caught:
        getattr(store, method)(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [3, None, b"run.zarr", "", "a\0b"])
def test_what_is_no_path_of_a_store(path: Any) -> None:
    for opening in (ckdiff.open_store, ckdiff.check_store):
        with pytest.raises(UsageError, match="the store"):
            opening(path)


def test_observers_are_called() -> None:
    for wrong in ({"progress": None}, {"note": 3}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Observer(**wrong)  # type: ignore[arg-type]


def test_one_text_is_a_list_of_one(store: ckdiff.MaskStore) -> None:
    assert store.manifest["selection"] == {"include": ["*.0.*"], "exclude": [], "rename": []}
    assert Options(rules="ulp=1").rules == ["ulp=1"]
    assert Options(rules=ckdiff.Rule.parse("ulp=1")).rules == [ckdiff.Rule.parse("ulp=1")]  # type: ignore[arg-type]
    assert Options(exclude=(glob for glob in "ab")).exclude == ["a", "b"]  # type: ignore[arg-type]


def test_whole_numbers_of_numpy_will_do(pair: Pair, store: ckdiff.MaskStore) -> None:
    assert ckdiff.diff(*pair, workers=np.int64(1), stats=np.True_).differs  # type: ignore[arg-type]
    name = store.tensors[0].name
    assert store.mask(name, start=np.int64(1), stop=np.uint8(3)).shape == (2,)  # type: ignore[arg-type]


def test_an_observer_that_fails_is_not_the_output(pair: Pair, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, "the log is full")

    out = tmp_path / "out.zarr"
    for observer in (Observer(progress=fail), Observer(note=fail)):
        # the second finds what the first left, and says so
        with pytest.raises(OSError, match="the log is full"):
            ckdiff.diff(*pair, out, observer=observer)
    notes: list[str] = []
    result = ckdiff.diff(*pair, out, observer=Observer(note=notes.append))
    assert notes == ["resuming: 1 of 1 chunks were done already"]
    assert result.bytes_resumed == result.bytes_read
    assert json.dumps(result.to_dict())
