"""``ckdiff apply --in-place``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_support import error, ok
from support import write_safetensors


def put(folder: Path, seed: int) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 1 << 16, 5000, np.uint16)
    noise[::50] ^= seed
    write_safetensors(folder / "model.safetensors", {"w": ("BF16", (50, 100), noise.tobytes())})
    return folder


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    a, b, c = (put(tmp_path / name, i) for i, name in enumerate("abc"))
    for base, tuned in ((a, b), (b, c)):
        ok("delta", str(base), str(tuned), "--encoding", "xor", "-o", str(tmp_path / "stream"))
    return tmp_path / "stream"


def test_to_the_newest_and_to_a_version(stream: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    shutil.copytree(tmp_path / "a", local)
    said = ok("apply", str(local), str(stream), "--in-place", "--to", "1").stdout
    assert "is at version 1 now, by 1 version; 1 tensor changed" in said
    data = (local / "model.safetensors").read_bytes()
    assert data == (tmp_path / "b" / "model.safetensors").read_bytes()
    found = json.loads(ok("apply", str(local), str(stream), "--in-place", "--json").stdout)
    assert (found["before"], found["version"], found["versions"]) == (
        "000001",
        "000002",
        ["000002"],
    )
    data = (local / "model.safetensors").read_bytes()
    assert data == (tmp_path / "c" / "model.safetensors").read_bytes()
    assert "is at version 2 already" in ok("apply", str(local), str(stream), "--in-place").stdout


def test_what_is_asked_for(stream: Path, tmp_path: Path) -> None:
    a = str(tmp_path / "a")
    assert "give -o PATH" in error("apply", a, str(stream))
    assert "give -o PATH" in error("apply", a, str(stream), "-o", str(tmp_path / "x"), "--in-place")
    assert "--overwrite is for a new checkpoint" in error(
        "apply", a, str(stream), "--in-place", "--overwrite"
    )
    ok("delta", a, str(tmp_path / "b"), "-o", str(tmp_path / "d.delta"))
    done = ok("apply", a, str(tmp_path / "d.delta"), "--in-place")
    assert "went through 1 delta, verified" in done.stdout


def test_another_base(stream: Path, tmp_path: Path) -> None:
    before = (tmp_path / "c" / "model.safetensors").read_bytes()
    error("apply", str(tmp_path / "c"), str(stream), "--in-place")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == before
