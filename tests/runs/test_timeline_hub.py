"""A timeline of the revisions of a repository on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_pairs import files_of
from hub_server import Hub, only_hub
from test_timeline import agrees
from timelines import some_run, write_run

import ckdiff
from ckdiff.cli.timeline_text import lines
from ckdiff.runs.timeline import timeline
from ckdiff.runs.timelines.result import open_timeline

RUN = some_run(21, 4)
REVISIONS = ["base", "step-100", "step-200", "step-300"]
ADDRESSES = [f"hf://me/run@{revision}" for revision in REVISIONS]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        paths = write_run(tmp_path / "local", RUN)
        for path, revision in zip(paths, REVISIONS, strict=True):
            data = (path / "model.safetensors").read_bytes()
            hub.put("me/run", {"model.safetensors": data}, revision)
        yield hub


def test_revisions_are_steps(hub: Hub, tmp_path: Path) -> None:
    found = timeline(ADDRESSES, tmp_path / "out")
    agrees(found, RUN, "exact")
    commits = [hub.repositories["me/run"][revision].sha for revision in REVISIONS]
    assert found.checkpoints == [f"hf://me/run@{commit}" for commit in commits]
    assert open_timeline(tmp_path / "out").checkpoints == ADDRESSES
    text = "\n".join(lines(found, "model", found.summary("model")))
    for address in ADDRESSES:  # a commit says nothing to people
        assert address in text
    assert [c["commit"] for c in found.manifest["checkpoints"]] == commits
    assert len(hub.downloaded()) == 4, "each once"


def test_a_revision_is_appended(hub: Hub, tmp_path: Path) -> None:
    timeline(ADDRESSES, tmp_path / "whole")
    timeline(ADDRESSES[:3], tmp_path / "out")
    timeline(ADDRESSES, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # a branch that has moved on is another checkpoint
    hub.put("me/run", {"model.safetensors": b"\0" * 8}, "step-100")
    data = (tmp_path / "local" / "checkpoint-300" / "model.safetensors").read_bytes()
    hub.put("me/run", {"model.safetensors": data}, "step-100")
    with pytest.raises(ckdiff.StoreExists, match="is not what is given"):
        timeline([*ADDRESSES, "hf://me/run@step-100"], tmp_path / "out")
