"""What a result says of its sides, whatever they were given as."""

from __future__ import annotations

from pathlib import Path

import pytest
from diff_results import lacking, result
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.result import asked_for

COMMIT = "0123456789abcdef" * 2 + "01234567"


class OnTheHub(Checkpoint):
    label = "hf://org/name@main"

    def __init__(self, path: str = "") -> None:
        self.origin = {"repository": "org/name", "commit": COMMIT} | (
            {"path": path} if path else {}
        )

    def reader(self) -> None:  # type: ignore[override]
        raise NotImplementedError

    def fingerprint(self) -> list[object]:
        return []


@pytest.mark.parametrize("given", ["hf://org/name@main", "hf://org/name"])
def test_the_commit_stands_for_a_branch(given: str) -> None:
    assert asked_for(given, OnTheHub()) == f"hf://org/name@{COMMIT}"
    assert asked_for(given + "/sub", OnTheHub("sub")) == f"hf://org/name@{COMMIT}/sub"
    assert asked_for(OnTheHub(), OnTheHub()) == f"hf://org/name@{COMMIT}"


def test_local_ones_are_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a" / "model.safetensors", {"x": ("U8", (2,), b"12")})
    monkeypatch.chdir(tmp_path)
    for given in ("a", "a/", "./a/model.safetensors", str(path)):
        assert ckdiff.diff(given, path).base == given
    assert ckdiff.diff(path, path).tuned == str(path)
    with ckdiff.open_checkpoint("a") as opened:
        assert ckdiff.diff(opened, opened).base == "a"


def test_what_differs() -> None:
    assert not result({"a": 0}).differs
    assert result({"a": 1}).differs
    assert result({"a": 0}, unpaired=[lacking("b")]).differs
    assert result({"a": 0}, retyped=[{"name": "a", "base": "F32", "tuned": "F16"}]).differs
    assert result({"a": 0}, resized=[{"name": "a", "base": [1], "tuned": [2], "rows": 1}]).differs
