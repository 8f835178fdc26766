"""Weight versions against a reader and a writer made from the format's description alone."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import weight_streams
from support import Tensor, write_sparse
from weight_models import KINDS, first_model, save, stepped
from weight_streams import read_model, read_stream, tree_digest

from ckdiff import Observer
from ckdiff.deltas.versions import decoding, folding
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.form import CHECKSUMS, ENCODINGS, read_marker
from ckdiff.deltas.versions.reading import open_stream
from ckdiff.deltas.versions.writing import VersionReport, write_version
from ckdiff.errors import BudgetError, CkdiffError, DeltaError, OutputError, UsageError
from ckdiff.outputs.place import Place

Model = dict[str, Tensor]


@pytest.fixture(scope="module")
def models() -> list[Model]:
    found = [first_model()]
    for seed in range(1, 5):
        found.append(stepped(found[-1], seed))
    return found


@pytest.fixture(scope="module")
def saved(models: list[Model], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("steps")
    return [save(root / f"c{i}", model, 1 + i % 2) for i, model in enumerate(models)]


def publish(saved: list[Path], stream: Path, **options: object) -> list[VersionReport]:
    """Every step of the models, as a stream."""
    return [write_version(a, b, stream, **options) for a, b in pairwise(saved)]  # type: ignore[arg-type]


def small(model: Model, share: float = 0.1) -> tuple[Model, Model]:
    """Some small tensors, and the same a step later."""
    base = {name: model[name] for name in ("model.scale", "model.four", "model.bytes")}
    return base, stepped(base, 9, share)


def two(tmp_path: Path, model: Model) -> tuple[Path, Path, Model, Model]:
    base, tuned = small(model)
    return save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), base, tuned


# both ways


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_what_is_written_is_read_by_others(
    encoding: str, checksum: str, models: list[Model], saved: list[Path], tmp_path: Path
) -> None:
    reports = publish(saved, tmp_path, encoding=encoding, checksum=checksum, shard_bytes=20_000)
    assert [report.version for report in reports] == [1, 2, 3, 4]
    for target in range(5):
        assert read_stream(models[0], tmp_path, target) == models[target]
    assert len(list((tmp_path / "weight_v000001").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_what_others_write_is_applied(
    encoding: str, checksum: str, models: list[Model], saved: list[Path], tmp_path: Path
) -> None:
    for i in range(1, 5):
        weight_streams.write_version(
            tmp_path / "s", i, models[i - 1], models[i],
            encoding=encoding, checksum=checksum, shards=i, level=2 * i - 1,
        )  # fmt: skip
    for target in (3, None):
        found = apply_anew(saved[0], tmp_path / "s", tmp_path / f"o{target}", target=target)
        assert found.version == (target or 4)
        assert found.versions == list(range(1, found.version + 1))
        assert read_model(tmp_path / f"o{target}") == models[found.version]
        assert found.copied == ["config.json"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_written_is_applied_byte_for_byte(
    encoding: str, saved: list[Path], models: list[Model], tmp_path: Path
) -> None:
    publish(saved, tmp_path / "s", encoding=encoding)
    apply_anew(saved[0], tmp_path / "s", tmp_path / "out", target=2)
    apply_anew(saved[1], tmp_path / "s", tmp_path / "far", target=3, base_version=1)
    assert read_model(tmp_path / "far") == models[3]
    for path in saved[2].glob("*.safetensors"):  # the base's files, as those of step 2 are
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("level", [1, 3])
def test_a_chain_with_a_full_version(
    level: int, models: list[Model], saved: list[Path], tmp_path: Path
) -> None:
    stream = tmp_path / "s"
    for i in range(1, 5):
        report = write_version(saved[i - 1], saved[i], stream, full=i == 2, level=level)
        assert (report.full, report.version) == (i == 2, i)
    for target in range(1, 5):
        assert read_stream(models[0], stream, target) == models[target]
    assert (stream / "weight_v000002" / "config.json").exists()
    found = apply_anew(saved[0], stream, tmp_path / "out")
    assert (found.seed, found.versions) == (2, [3, 4])
    assert read_model(tmp_path / "out") == models[4]
    # one that is further than the full version begins where it is
    found = apply_anew(saved[3], stream, tmp_path / "near", base_version=3)
    assert (found.seed, found.versions) == (None, [4])
    assert read_model(tmp_path / "near") == models[4]


def test_models_in_memory_are_published(
    models: list[Model], saved: list[Path], tmp_path: Path
) -> None:
    names = ("model.bytes", "model.long")
    kinds = {"model.bytes": np.uint8, "model.long": np.int64}
    states = [
        {name: np.frombuffer(model[name][2], kinds[name]) for name in names} for model in models
    ]
    write_version(states[0], states[1], tmp_path)
    write_version(None, states[2], tmp_path, full=True)
    write_version(states[2], states[3], tmp_path, encoding="overwrite")
    first = {name: models[0][name] for name in names}
    assert read_stream(first, tmp_path, 1) == {name: models[1][name] for name in names}
    assert read_stream(first, tmp_path, 3) == {name: models[3][name] for name in names}


def test_many_changed_bytes_are_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More positions and values than are compressed, or looked at, in one go."""
    monkeypatch.setattr(decoding, "_SORTED_HERE", 1000)
    rng, size = np.random.default_rng(3), 5 << 19
    base: Model = {"w": ("U8", (size,), rng.integers(0, 256, size, np.uint8).tobytes())}
    tuned = stepped(base, 4, 0.2)
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    write_version(tmp_path / "base", tmp_path / "tuned", tmp_path / "s", encoding="overwrite")
    assert read_stream(base, tmp_path / "s", 1) == tuned
    apply_anew(tmp_path / "base", tmp_path / "s", tmp_path / "out")
    assert read_model(tmp_path / "out") == tuned


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_more_versions_than_decoders_fit(
    encoding: str, models: list[Model], saved: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    publish(saved, tmp_path / "s", encoding=encoding)
    monkeypatch.setattr(folding, "DECODERS_MEMORY", 1)
    monkeypatch.setattr(folding, "COMMON_WINDOW", 1)
    apply_anew(saved[0], tmp_path / "s", tmp_path / "out")
    assert read_model(tmp_path / "out") == models[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]


# what a version is


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_version_does_not_depend_on_who_made_it(
    encoding: str, saved: list[Path], tmp_path: Path
) -> None:
    found = []
    for workers in (1, 2):
        stream = tmp_path / str(workers)
        publish(saved[:3], stream, encoding=encoding, workers=workers)
        found.append(tree_digest(stream))
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_what_is_reported(models: list[Model], saved: list[Path], tmp_path: Path) -> None:
    for encoding in ENCODINGS:
        stream = tmp_path / encoding
        report = write_version(saved[0], saved[1], stream, encoding=encoding)
        old, new = models[0], models[1]
        changed = [name for name in old if old[name] != new[name]]
        bits = {"BOOL": 8, "F32": 32, "F16": 16, "BF16": 16, "F4": 4, "F6_E2M3": 6, "U8": 8,
                "F8_E4M3": 8, "I64": 64, "C64": 64, "F64": 64}  # fmt: skip
        elements = total = nbytes = 0
        for name, (dtype, _, raw) in old.items():
            width = bits[dtype]
            one, other = (np.unpackbits(np.frombuffer(x, np.uint8), bitorder="little")
                          for x in (raw, new[name][2]))  # fmt: skip
            elements += int((one != other).reshape(-1, width).any(axis=1).sum())
            total += len(one) // width
            nbytes += int((one != other).reshape(-1, 8).any(axis=1).sum())
        assert report.tensors == len(changed) == len(KINDS) - 2
        assert report.changed_bytes == nbytes
        assert report.density == elements / total
        version = stream / "weight_v000001"
        assert report.bytes == sum(path.stat().st_size for path in version.iterdir())
        assert json.loads(json.dumps(report.to_dict()))["version"] == "000001"


def test_a_step_without_changes_is_a_version(saved: list[Path], tmp_path: Path) -> None:
    report = write_version(saved[0], saved[0], tmp_path / "s")
    assert (report.tensors, report.changed_bytes, report.density) == (0, 0, 0.0)
    index = json.loads((tmp_path / "s/weight_v000001/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {}
    write_version(saved[0], saved[1], tmp_path / "s")
    found = apply_anew(saved[0], tmp_path / "s", tmp_path / "out")
    assert found.versions == [1, 2]
    assert read_model(tmp_path / "out") == read_model(saved[1])


def test_numbers(saved: list[Path], tmp_path: Path) -> None:
    assert write_version(saved[0], saved[1], tmp_path, number=7).version == 7
    assert write_version(saved[1], saved[2], tmp_path).version == 8
    for number, why in ((8, "exists"), (3, "older")):
        with pytest.raises(OutputError, match=why):
            write_version(saved[2], saved[3], tmp_path, number=number)
    for number in (0, -1, 10**9):
        with pytest.raises(UsageError, match="from 1"):
            write_version(saved[2], saved[3], tmp_path, number=number)
    with open_stream(tmp_path) as stream:
        assert stream.numbers == [7, 8]
        assert [version.said.base_version for version in stream if version.said] == [0, 7]


# what is refused


@pytest.mark.parametrize("second", CHECKSUMS)
def test_another_base_is_found(
    second: str, saved: list[Path], models: list[Model], tmp_path: Path
) -> None:
    write_version(saved[0], saved[1], tmp_path / "s", checksum="adler32")
    before = tree_digest(tmp_path)
    wrong = save(tmp_path / "wrong", models[1] | {"model.long": models[3]["model.long"]})
    for base in (saved[0], saved[2], wrong):
        with pytest.raises(DeltaError, match="is not the newest version"):
            write_version(base, saved[3], tmp_path / "s", checksum=second)
    assert tree_digest(tmp_path / "s") == {
        name.removeprefix("s/"): digest for name, digest in before.items()
    }
    write_version(saved[1], saved[2], tmp_path / "s", checksum=second)


def test_what_no_delta_says(models: list[Model], tmp_path: Path) -> None:
    base, tuned, one, other = two(tmp_path, models[0])
    dtype, _, raw = other["model.bytes"]
    cases = {
        "added": other | {"new": ("U8", (1,), b"x")},
        "removed": {name: value for name, value in other.items() if name != "model.four"},
        "reshaped": other | {"model.bytes": (dtype, (777, 1), raw)},
        "retyped": other | {"model.bytes": ("I8", (777,), raw)},
    }
    for what, model in cases.items():
        folder = save(tmp_path / what, model)
        with pytest.raises(DeltaError, match=f"is {what}"):
            write_version(base, folder, tmp_path / "s")
        assert not (tmp_path / "s").exists()
    notes: list[str] = []
    for i, (what, model) in enumerate(cases.items(), 1):
        report = write_version(
            base, tmp_path / what, tmp_path / "s", full_when_needed=True,
            observer=Observer(note=notes.append),
        )  # fmt: skip
        assert (report.full, report.version) == (True, i)
        assert what in notes[-1]
        assert read_stream(one, tmp_path / "s", i) == model
    assert not write_version(base, tuned, tmp_path / "t", full_when_needed=True).full


def test_tensors_of_4_gib_are_not_overwritten(tmp_path: Path) -> None:
    sizes = {"w": ("U8", (1 << 32,), 1 << 32)}
    paths = [write_sparse(tmp_path / f"{side}.safetensors", sizes) for side in "ab"]
    with pytest.raises(DeltaError, match="too large"):
        write_version(*paths, tmp_path / "s", encoding="overwrite")


def test_arguments_that_make_no_sense(saved: list[Path], tmp_path: Path) -> None:
    for options in ({"encoding": "indices"}, {"checksum": "md5"}, {"level": 0}, {"level": 23},
                    {"workers": 0}):  # fmt: skip
        with pytest.raises(UsageError):
            write_version(saved[0], saved[1], tmp_path / "s", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="base"):
        write_version(None, saved[1], tmp_path / "s")
    with pytest.raises(BudgetError):
        write_version(saved[0], saved[1], tmp_path / "s", memory="64MiB")
    assert not (tmp_path / "s").exists()


def test_blake3_is_asked_for_by_its_name(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(UsageError, match=r"ckdiff\[blake3\]"):
        write_version(saved[0], saved[1], tmp_path / "s", checksum="blake3")


@pytest.mark.parametrize("name", ["notes.txt", "weight_v1", "weight_v0000001", "weight_vX"])
def test_other_directories_are_no_streams(name: str, saved: list[Path], tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DeltaError, match=r"stream|version"):
        write_version(saved[0], saved[1], tmp_path)


def test_incomplete_versions_of_others_are_errors(
    saved: list[Path], models: list[Model], tmp_path: Path
) -> None:
    stream = tmp_path / "s"
    folder = weight_streams.write_version(stream, 1, models[0], models[1])
    index = folder / "model.safetensors.index.json"
    index.rename(tmp_path / "kept")
    for _ in range(2):
        with pytest.raises(DeltaError, match="incomplete"):
            write_version(saved[1], saved[2], stream)
        with pytest.raises(DeltaError, match="incomplete"):
            apply_anew(saved[0], stream, tmp_path / "out")
        for path in folder.iterdir():
            path.unlink()
    assert not (tmp_path / "out").exists()


# stopped


def test_an_interrupted_run_leaves_nothing(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(place: Place) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Place, "commit", interrupted)
        with pytest.raises(CkdiffError, match="nothing was published"):
            write_version(saved[0], saved[1], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from ckdiff.deltas.versions import shards, writing
from ckdiff.outputs.place import Place
where = {"commit": (Place, "commit"), "finish": (shards.Shards, "finish")}[sys.argv[4]]
setattr(*where, lambda *args: os._exit(9))
writing.write_version(*sys.argv[1:4], shard_bytes=1000)
"""


@pytest.mark.parametrize("where", ["commit", "finish"])
def test_a_killed_run_leaves_no_version(where: str, saved: list[Path], tmp_path: Path) -> None:
    stream = tmp_path / "s"
    write_version(saved[0], saved[1], stream)
    command = [sys.executable, "-c", KILLED, saved[1], saved[2], stream, where]
    assert subprocess.run(command).returncode == 9
    left = [path.name for path in stream.iterdir()]
    assert sorted(left) == ["weight_v000001", "weight_v000002.ckdiff-partial"]
    found = apply_anew(saved[0], stream, tmp_path / "out")
    assert found.version == 1
    assert write_version(saved[1], saved[2], stream).version == 2
    assert sorted(path.name for path in stream.iterdir()) == ["weight_v000001", "weight_v000002"]


# markers


@pytest.fixture
def marked(saved: list[Path], models: list[Model], tmp_path: Path) -> Path:
    folder = save(tmp_path / "local", models[2])
    (folder / ".weight_sync").mkdir()
    return folder


def test_a_marker_says_where_a_checkpoint_is(
    marked: Path, saved: list[Path], models: list[Model], tmp_path: Path
) -> None:
    publish(saved, tmp_path / "s")
    marker = marked / ".weight_sync" / "state.json"
    assert read_marker(str(marked)) is None
    marker.write_text('{"version": "000002"}')
    assert read_marker(str(marked)) == 2
    found = apply_anew(marked, tmp_path / "s", tmp_path / "out")
    assert found.versions == [3, 4]
    assert read_model(tmp_path / "out") == models[4]
    assert apply_anew(marked, tmp_path / "s", tmp_path / "same", target=2).versions == []
    for text in ("", "{}", '{"version": 2}', '{"version": "x"}', "[1]", '{"version": "2"'):
        marker.write_text(text)
        with pytest.raises(DeltaError, match=r"state\.json"):
            apply_anew(marked, tmp_path / "s", tmp_path / "again")
