"""The base of a delta, found in a directory by what it holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_support import run
from support import write_safetensors
from version_models import start, step, write_model, write_steps
from weight_streams import read_model

import ckdiff
from ckdiff.errors import CkdiffError, DeltaError, UsageError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Checkpoints of one kind in a tree, one of which a delta was made from."""
    steps = write_steps(tmp_path / "made", 3)
    ckdiff.delta(steps[1], steps[2], tmp_path / "d")
    tree = tmp_path / "tree"
    for at, to in ((0, "a/one"), (3, "b"), (1, "models--o--n/snapshots/0123")):
        (tree / to).parent.mkdir(parents=True, exist_ok=True)
        steps[at].rename(tree / to)
    blobs = tree / "models--o--n" / "blobs"
    blobs.mkdir()
    snapshot = tree / "models--o--n" / "snapshots" / "0123" / "model.safetensors"
    snapshot.rename(blobs / "f00d")
    snapshot.symlink_to("../../blobs/f00d")
    (tree / "loop").symlink_to(tree)
    (tree / "model.safetensors").write_bytes(b"x")
    return tmp_path


def test_it_is_found_among_others_like_it(made: Path) -> None:
    out = made / "out"
    done = run("apply", str(made / "tree"), str(made / "d"), "--find-base", "-o", str(out))
    assert done.exit_code == 0, done.output
    assert "snapshots/0123" in done.stderr
    assert read_model(out) == read_model(made / "made" / "m2")
    assert (out / "config.json").exists()


def test_one_bit_is_another_base(made: Path, tmp_path: Path) -> None:
    blob = made / "tree" / "models--o--n" / "blobs" / "f00d"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DeltaError, match="3 have files of its names and sizes") as caught:
        ckdiff.apply(made / "tree", made / "d", tmp_path / "out", find_base=True)
    assert "model.safetensors of" in str(caught.value)
    shutil.rmtree(made / "tree")
    (made / "tree").mkdir()
    with pytest.raises(DeltaError, match="none has files like its"):
        ckdiff.apply(made / "tree", made / "d", tmp_path / "out", find_base=True)
    assert not (tmp_path / "out").exists()


def test_what_says_no_base(made: Path, tmp_path: Path) -> None:
    two = made / "made" / "m2"
    ckdiff.delta(two, made / "tree" / "b", made / "s", encoding="xor")
    ckdiff.delta(dict_of(1), dict_of(2), made / "memory")
    for delta, said in (("s", "does not say what it was made"), ("memory", "which files it was")):
        with pytest.raises(UsageError, match=said):
            ckdiff.apply(made / "tree", made / delta, tmp_path / "out", find_base=True)
    for where in (two / "model.safetensors", made / "nowhere"):
        with pytest.raises(UsageError, match="not a directory to search for the base"):
            ckdiff.apply(where, made / "d", tmp_path / "out", find_base=True)
    with pytest.raises(CkdiffError):
        ckdiff.apply(made / "tree", two / "model.safetensors", tmp_path / "out", find_base=True)
    done = run("apply", str(two), str(made / "d"), "--in-place", "--find-base")
    assert done.exit_code == 2
    assert "--find-base is for a new checkpoint" in done.stderr


def dict_of(seed: int) -> dict[str, object]:
    import numpy as np

    return {"w": np.arange(seed, seed + 100, dtype=np.int32)}


def test_a_file_and_a_packed_version(made: Path, tmp_path: Path) -> None:
    model = start(7)
    one = tmp_path / "files" / "weights.safetensors"
    one.parent.mkdir()
    write_safetensors(one, model)
    write_safetensors(one.with_name("weights2.safetensors"), step(model, 2))
    tuned = write_model(tmp_path / "tuned", step(model, 1))
    ckdiff.delta(one, tuned, tmp_path / "s", as_version=True)
    ckdiff.delta(one, tuned, tmp_path / "e")
    for number, delta in enumerate(("s", "s/weight_v000001", "e")):
        out = tmp_path / f"out{number}"
        ckdiff.apply(tmp_path, tmp_path / delta, out, find_base=True)
        found = read_model(out) if out.is_dir() else None
        assert found is None or found == step(model, 1)
