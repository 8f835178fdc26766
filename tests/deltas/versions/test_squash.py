"""Several versions as one, against the naive way: what an independent reader makes of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import run
from hypothesis import given, settings
from hypothesis import strategies as st
from version_models import start, step
from weight_streams import read_stream, write_version

import ckdiff
from ckdiff.deltas.versions import merging
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.errors import DeltaError, OutputError, UsageError


def make(folder: Path, count: int, encoding: str, seed: int = 0) -> list[dict[str, Any]]:
    """A stream in ``folder``; the models it goes through."""
    models = [start(seed)]
    for number in range(1, count + 1):
        models.append(step(models[-1], seed + number, 0.2))
        write_version(folder, number, models[-2], models[-1], encoding=encoding)
    return models


def squashed_is_right(stream: Path, out: Path, models: list[Any], first: int, last: int) -> Any:
    made = ckdiff.squash(stream, first, last, out)
    assert made.path == out / f"weight_v{last:06d}"
    assert (made.version, made.base_version) == (last, first - 1)
    # the same chain with the one version in the place of the others
    mixed = out.parent / f"mixed-{first}-{last}"
    shutil.copytree(stream, mixed)
    for number in range(first, last + 1):
        shutil.rmtree(mixed / f"weight_v{number:06d}")
    shutil.copytree(made.path, mixed / made.path.name)
    assert read_stream(models[0], mixed, len(models) - 1) == models[-1]
    return made


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), ends=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_squashed_versions_do_what_they_did(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, seed: int, ends: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("squash")
    models = make(folder / "s", 4, encoding, seed)
    squashed_is_right(folder / "s", folder / "o", models, min(ends), max(ends))


def test_changes_that_are_taken_back_are_gone(tmp_path: Path) -> None:
    one = start()
    two = step(one, 1)
    for number, (base, tuned) in enumerate([(one, two), (two, one)], 1):
        write_version(tmp_path / "s", number, base, tuned)
    made = ckdiff.squash(tmp_path / "s", 1, 2, tmp_path / "o")
    assert (made.tensors, made.changed_bytes) == (0, 0)
    assert read_stream(one, tmp_path / "o", 2) == one


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_tensors_of_many_windows_and_more_versions_than_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    size = 2 * WINDOW + 999
    rng = np.random.default_rng(0)
    models = [{"w": ("U8", (size,), rng.bytes(size))}]
    for number in range(1, 5):
        data = np.frombuffer(models[-1]["w"][2], np.uint8).copy()
        data[rng.integers(0, size, 1000)] ^= 3
        models.append({"w": ("U8", (size,), data.tobytes())})
        write_version(tmp_path / "s", number, models[-2], models[-1], encoding=encoding)
    squashed_is_right(tmp_path / "s", tmp_path / "at once", models, 1, 4)
    monkeypatch.setattr(merging, "DECODERS_MEMORY", 1)
    squashed_is_right(tmp_path / "s", tmp_path / "one by one", models, 1, 3)


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    models = make(tmp_path / "s", 2, "xor")
    more = [models[-1], step(models[-1], 7), step(models[-1], 8)]
    write_version(tmp_path / "s", 3, more[0], more[1], encoding="overwrite")
    write_version(tmp_path / "s", 5, more[1], more[2], base_version=3, encoding="overwrite",
                  checksum="adler32")  # fmt: skip
    wrong = {
        "has the encoding xor, and .* overwrite": (1, 3),
        "has the checksum xxh3-128, and .* adler32": (3, 5),
        "is made from version 3, so version 4 is not": (4, 5),
        "has no weight_v000009": (1, 9),
    }
    for match, (first, last) in wrong.items():
        with pytest.raises(DeltaError, match=match):
            ckdiff.squash(tmp_path / "s", first, last, tmp_path / "o")
    with pytest.raises(UsageError, match="version 2 is after version 1"):
        ckdiff.squash(tmp_path / "s", 2, 1, tmp_path / "o")
    with pytest.raises(UsageError, match="the result is version 2"):
        ckdiff.squash(tmp_path / "s", 1, 2, tmp_path / "weight_v000001")
    with pytest.raises(OutputError, match="weight_v000005"):
        ckdiff.squash(tmp_path / "s", 1, 2, tmp_path / "s")
    assert not (tmp_path / "o").exists()


def test_the_command(tmp_path: Path) -> None:
    models = make(tmp_path / "s", 3, "xor")
    out = tmp_path / "weight_v000003"
    done = run("squash", str(tmp_path / "s"), "2", "3", "-o", str(out), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["version"], found["base_version"]) == ("000003", "000001")
    assert found["versions"] == ["000002", "000003"]
    assert out.is_dir()
    text = run("squash", str(tmp_path / "s"), "1", "3", "-o", str(tmp_path / "o"))
    assert "3 versions in one" in text.stdout
    assert read_stream(models[0], tmp_path / "o", 3) == models[3]
