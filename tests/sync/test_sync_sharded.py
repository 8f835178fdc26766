"""A model that FSDP2 spreads over two processes: what they publish together is the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_publisher import at, raw
from training_processes import run_together


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes published, with a base and without one."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("base", "none"):
        (folder / name).mkdir()
    run_together("publishing_worker.py", "base+none", 2, folder)
    return folder


@pytest.mark.parametrize("what", ["base", "none"])
def test_two_processes_publish_together(published: Path, what: str) -> None:
    folder = published / what
    found = torch.load(folder / "found.pt")
    first = what == "none"
    assert found["fulls"] == [first, False, False, not first, first, False]
    for version, wanted in enumerate(found["wanted"], 1):
        have = at(folder / "base", folder / "s", version)
        assert {n: have[n] for n in wanted} == raw(wanted), version
        extra = {"head.weight": have["embed.weight"]} if first else {}
        assert {n: data for n, data in have.items() if n not in wanted} == extra
    names = sorted(path.name for path in (folder / "s").iterdir())
    assert names == [f"weight_v{i:06d}" for i in range(1, 8)]
    for version_folder in (folder / "s").iterdir():
        assert all(path.is_file() for path in version_folder.iterdir())
    if not first:
        assert (folder / "s" / "weight_v000004" / "config.json").read_text() == "{}"
