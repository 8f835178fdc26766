"""Packed versions: in streams with others, through every command; and damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import run
from support import Tensor
from weight_models import first_model, save, stepped
from weight_streams import read_model, read_stream

import ckdiff
from ckdiff.deltas.checking import check
from ckdiff.errors import CkdiffError, DeltaError, UsageError
from ckdiff.sync import follow

Model = dict[str, Tensor]
INDEX, SHARD = "model.safetensors.index.json", "model-00000-of-00001.safetensors"
ENCODINGS = ["packed", "xor", "packed", "packed", "overwrite"]


def publish(base: Path, tuned: Path, stream: Path, encoding: str) -> Any:
    return ckdiff.delta(base, tuned, stream, encoding=encoding, as_version=True)


@pytest.fixture(scope="module")
def models() -> list[Model]:
    first = first_model()
    # of more than one window
    first["model.many"] = "BF16", (4250, 1000), bytes(range(250)) * 34_000
    found = [first]
    for seed in range(1, 6):
        found.append(stepped(found[-1], seed, 0.005))
    return found


@pytest.fixture(scope="module")
def made(models: list[Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints c0 to c5, and their stream."""
    root = tmp_path_factory.mktemp("packed")
    saved = [save(root / f"c{i}", model, 1 + i % 2) for i, model in enumerate(models)]
    for (base, tuned), encoding in zip(pairwise(saved), ENCODINGS, strict=True):
        report = publish(base, tuned, root / "s", encoding)
        assert not report.full
    return root


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "s", tmp_path / "s")
    return tmp_path


@pytest.mark.parametrize("target", range(1, 6))
def test_every_version_is_rebuilt(
    made: Path, models: list[Model], tmp_path: Path, target: int
) -> None:
    found = ckdiff.apply(made / "c0", made / "s", tmp_path / "out", target=target)
    assert found.tensors == len(models[0])
    assert read_model(tmp_path / "out") == models[target]


def test_a_local_checkpoint_follows(made: Path, models: list[Model], tmp_path: Path) -> None:
    local = Path(shutil.copytree(made / "c0", tmp_path / "local"))
    for target in (1, 3, 5):
        assert follow(local, made / "s", target) == target
        assert read_model(local) == models[target]


def test_it_is_checked_with_and_without_a_base(made: Path) -> None:
    without = check(made / "s")
    changed = len(first_model()) - 1  # all but what stays, and what is empty; and model.many
    assert (without["versions"], without["digests"]) == (5, 0)
    assert without["frames"] == 5 * changed
    assert check(made / "s", base=made / "c0")["digests"] == 5 * changed
    for number in (1, 3):
        one = made / "s" / f"weight_v{number:06d}"
        with pytest.raises(DeltaError, match="is not what the version was made from"):
            check(one, base=made / "c5", base_version=number - 1)


def test_info_and_size(made: Path, tmp_path: Path) -> None:
    done = run("info", str(made / "s"), "--json")
    rows = json.loads(done.stdout)["versions"]
    assert [row["encoding"] for row in rows] == ENCODINGS
    publish(made / "c0", made / "c1", tmp_path / "xor", "xor")
    xor = json.loads(run("info", str(tmp_path / "xor"), "--json").stdout)["versions"][0]
    assert rows[0]["tensors"] == xor["tensors"]
    assert rows[0]["changed_bytes"] >= xor["changed_bytes"]  # whole elements
    one = made / "s" / "weight_v000001" / SHARD
    ckdiff.delta(made / "c0", made / "c1", tmp_path / "one.delta")
    assert one.read_bytes() == (tmp_path / "one.delta").read_bytes()


def test_it_is_the_smallest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, 1 << 20).astype("<f4").view("<u4") >> 16
    tuned = base + rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 0, 1], len(base)).astype("<u4")
    for name, values in (("a", base), ("b", tuned)):
        model = {"w": ("BF16", (1 << 20,), values.astype("<u2").tobytes())}
        save(tmp_path / name, model)
    sizes = {
        encoding: publish(tmp_path / "a", tmp_path / "b", tmp_path / encoding, encoding).bytes
        for encoding in ("packed", "xor", "overwrite")
    }
    assert sizes["packed"] < 0.85 * min(sizes["xor"], sizes["overwrite"])


def test_one_tensor_and_other_encodings(made: Path, models: list[Model], tmp_path: Path) -> None:
    version = made / "s" / "weight_v000001"
    with ckdiff.Delta(version) as delta:
        assert delta.encoding == "packed"
        found = delta.tensor("model.matrix", made / "c0")
    assert np.asarray(found).tobytes() == models[1]["model.matrix"][2]
    for encoding in ("xor", "overwrite"):
        ckdiff.convert_delta(version, tmp_path / encoding, base=made / "c0", encoding=encoding)
        assert read_stream(models[0], tmp_path / encoding, 1) == models[1]
    ckdiff.convert_delta(version, tmp_path / "f.delta", base=made / "c0", encoding="indices")
    ckdiff.apply(made / "c0", tmp_path / "f.delta", tmp_path / "out")
    assert read_model(tmp_path / "out") == models[1]
    done = run("convert-delta", str(tmp_path / "xor" / "weight_v000001"), "--base",
               str(made / "c0"), "--encoding", "packed", "--as-version", "-o",
               str(tmp_path / "p"))  # fmt: skip
    assert done.exit_code == 0, done.output
    ckdiff.apply(made / "c0", tmp_path / "p", tmp_path / "again")
    assert read_model(tmp_path / "again") == models[1]


def test_what_needs_more_than_it_says(made: Path, tmp_path: Path) -> None:
    stream = made / "s"
    done = run("squash", str(stream), "1", "4", "-o", str(tmp_path / "q"))
    assert done.exit_code == 2
    assert "--base CHECKPOINT" in done.stderr
    done = run("import", str(stream / "weight_v000001"), "--base", str(made / "c0"), "-o",
               str(tmp_path / "z.zarr"))  # fmt: skip
    assert done.exit_code == 2
    assert "convert-delta" in done.stderr


@pytest.mark.parametrize("encoding", ["xor", "overwrite", "packed", None])
def test_versions_of_any_encoding_become_one_with_the_base(
    made: Path, tmp_path: Path, encoding: str | None
) -> None:
    stream, models = made / "s", [read_model(made / f"c{n}") for n in range(6)]
    found = ckdiff.squash(stream, 1, 4, tmp_path / "q", base=made / "c0", encoding=encoding)
    assert (found.version, found.base_version, found.versions) == (4, 0, [1, 2, 3, 4])
    assert os.listdir(tmp_path) == ["q"]
    ckdiff.apply(made / "c0", tmp_path / "q", tmp_path / "again")
    assert read_model(tmp_path / "again") == models[4]
    with pytest.raises(DeltaError):
        ckdiff.squash(stream, 1, 4, tmp_path / "r", base=made / "c1", encoding=encoding)
    assert sorted(os.listdir(tmp_path)) == ["again", "q"]


def test_the_base_has_to_be_the_newest_version(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    for encoding in ("packed", "xor"):  # after a packed version, and after one that engines read
        publish(made / "c0", made / "c1", out, encoding)
        for second in ("packed", "xor"):
            with pytest.raises(DeltaError, match="is not the newest version of the stream"):
                publish(made / "c0", made / "c2", out, second)
        shutil.rmtree(out)
    ckdiff.delta(made / "c0", made / "c1", out, encoding="packed", as_version=True, full=True)
    with pytest.raises(DeltaError, match="is not what weight_v000001 says"):
        publish(made / "c0", made / "c2", out, "packed")
    publish(made / "c1", made / "c2", out, "packed")
    ckdiff.apply(made / "c5", out, tmp_path / "o")
    assert read_model(tmp_path / "o") == read_model(made / "c2")


def test_what_a_version_cannot_say(made: Path, tmp_path: Path) -> None:
    grown = save(tmp_path / "grown", first_model() | {"new": ("U8", (3,), b"abc")})
    with pytest.raises(DeltaError, match="full"):
        publish(made / "c0", grown, tmp_path / "s", "packed")
    assert not (tmp_path / "s").exists()
    given: Any
    for given, said in (
        ({"encoding": "indices"}, "cannot have the indices encoding"),
        ({"checksum": "adler32"}, "has digests of its own"),
        ({"overwrite": True}, "is not for weight versions"),
    ):
        with pytest.raises(UsageError, match=said):
            ckdiff.delta(made / "c0", made / "c1", tmp_path / "s", as_version=True, **given)
    with pytest.raises(UsageError, match="--version is not for the packed encoding"):
        ckdiff.delta(made / "c0", made / "c1", tmp_path / "s", version=3)


def said(folder: Path, **metadata: str) -> None:
    found = json.loads((folder / INDEX).read_text())
    found["metadata"] |= metadata
    (folder / INDEX).write_text(json.dumps(found))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def other_file(made: Path, folder: Path, encoding: str) -> None:
    (folder / SHARD).unlink()
    ckdiff.delta(made / "c0", made / "c1", folder / SHARD, encoding=encoding)


def grown(made: Path, folder: Path) -> None:
    (folder / SHARD).unlink()
    model = first_model() | {"new": ("U8", (3,), b"abc")}
    more = save(folder.parent.parent / "more", model)
    ckdiff.delta(made / "c0", more, folder / SHARD)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "another compression": lambda made, v: said(v, compression_format="zstd"),
    "zstd and its encoding": lambda made, v: said(
        v, compression_format="zstd", delta_encoding="xor", checksum_format="xxh3-128"
    ),
    "another encoding": lambda made, v: said(v, delta_encoding="xor"),
    "another checksum": lambda made, v: said(v, checksum_format="xxh3-128"),
    "an unknown compression": lambda made, v: said(v, compression_format="ckdiff-other"),
    "a frame": lambda made, v: flip(v / SHARD, 4000),
    "the end": lambda made, v: flip(v / SHARD, -1),
    "a delta of indices": lambda made, v: other_file(made, v, "indices"),
    "a delta that adds": grown,
    "a model": lambda made, v: shutil.copy(made / "c0" / "model.safetensors", v / SHARD),
    "another delta": lambda made, v: shutil.copy(made / "s" / "weight_v000003" / SHARD, v / SHARD),
    "two files": lambda made, v: (
        shutil.copy(v / SHARD, v / "model-00001-of-00002.safetensors"),
        (v / SHARD).rename(v / "model-00000-of-00002.safetensors"),
    ),
    "no file": lambda made, v: (v / SHARD).unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_versions(made: Path, at: Path, what: str) -> None:
    DAMAGE[what](made, at / "s" / "weight_v000001")
    local = Path(shutil.copytree(made / "c0", at / "local"))
    before = read_model(local)
    with pytest.raises(CkdiffError) as caught:
        ckdiff.apply(made / "c0", at / "s", at / "out", target=1)
    assert "weight_v000001" in str(caught.value)
    assert "\n" not in caught.value.one_line()
    with pytest.raises(CkdiffError):
        follow(local, at / "s", 1)
    assert read_model(local) == before
    assert not (at / "out").exists()
    with pytest.raises(CkdiffError):
        check(at / "s", base=made / "c0")


def test_a_packed_file_where_an_engine_looks_for_xor(made: Path, at: Path) -> None:
    """The description's reader finds nothing in it that it could take for a tensor."""
    with pytest.raises(AssertionError):
        read_stream(read_model(made / "c0"), at / "s", 1)
