"""A timeline of a stream of weight versions: as if each version had been made a checkpoint."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from checkpoint_pairs import files_of, write_sparse
from cli_support import run
from support import write_safetensors
from version_models import start, write_steps
from version_models import step as stepped

import ckdiff
from ckdiff.layout import CHUNK
from ckdiff.runs.timeline import timeline
from ckdiff.runs.timelines.check import check_timeline
from ckdiff.runs.timelines.result import Timeline


def published(tmp_path: Path, encoding: str, count: int = 4) -> tuple[list[Path], Path]:
    """Checkpoints, and the stream that leads from the first through all others."""
    models, stream = write_steps(tmp_path, count), tmp_path / "stream"
    for one, other in pairwise(models):
        publish(one, other, stream, encoding)
    return models, stream


def publish(one: Path, other: Path, stream: Path, encoding: str) -> None:
    """A version of the stream."""
    if encoding == "packed":
        ckdiff.delta(one, other, stream, encoding="packed", as_version=True)
    else:
        ckdiff.delta(one, other, stream, encoding=encoding)


def same(found: Timeline, wanted: Timeline) -> None:
    """Hold two timelines of the same weights against each other."""
    keys = "changed_since_first", "changed_since_previous", "kept"
    for one, other in zip(found.steps, wanted.steps, strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
    assert (found.counts == wanted.counts).all()
    for step in range(1, len(wanted) + 1):
        table, other_table = found.store(step).table, wanted.store(step).table
        assert table.tuned_hashes == other_table.tuned_hashes
        assert table.base_hashes == other_table.base_hashes
        for name in table.names:
            mask, other_mask = found.store(step).mask(name), wanted.store(step).mask(name)
            assert (mask == other_mask).all()
    for name in wanted.store(1).table.names:
        assert (found.first_moves(name) == wanted.first_moves(name)).all()


ENCODINGS = ["xor", "overwrite", "packed"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_versions_are_what_apply_makes(encoding: str, tmp_path: Path) -> None:
    models, stream = published(tmp_path, encoding)
    wanted = timeline(models, tmp_path / "wanted")
    found = timeline([models[0], stream], tmp_path / "found")
    same(found, wanted)
    assert check_timeline(found)["ok"]
    base = (models[0] / "model.safetensors").stat().st_size
    assert found.to_dict()["bytes_read"] <= base


@pytest.mark.parametrize("encoding", ["xor", "packed"])
def test_a_version_is_appended(encoding: str, tmp_path: Path) -> None:
    models, stream = published(tmp_path, encoding, 3)
    timeline([models[0], stream], tmp_path / "out")
    publish(models[3], models[2], stream, encoding)
    found = timeline([models[0], stream], tmp_path / "out")
    same(found, timeline([*models, models[2]], tmp_path / "wanted"))
    timeline([models[0], stream], tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_on_the_command_line(tmp_path: Path) -> None:
    models, stream = published(tmp_path, "xor", 2)
    done = run("timeline", str(models[0]), str(stream), "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "weight_v000002" in done.stdout


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damage_and_another_base_are_noticed(encoding: str, tmp_path: Path) -> None:
    models, stream = published(tmp_path, encoding, 3)
    for base in models[2:]:
        with pytest.raises(ckdiff.CkdiffError):
            timeline([base, stream], tmp_path / "out")
    (shard,) = (stream / "weight_v000002").glob("*.safetensors")
    sound = shard.read_bytes()
    for at in range(len(sound) // 2, len(sound), max(1, len(sound) // 15)):
        damaged = bytearray(sound)
        damaged[at] ^= 0x40
        shard.write_bytes(damaged)
        with pytest.raises(ckdiff.CkdiffError):
            timeline([models[0], stream], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def anchored(tmp_path: Path, full: tuple[int, ...], count: int) -> tuple[list[Path], Path]:
    """Checkpoints, and a stream of which some versions, from 1 on, are full."""
    models, stream = write_steps(tmp_path, count), tmp_path / "stream"
    for number, (one, other) in enumerate(pairwise(models), 1):
        ckdiff.delta(one, other, stream, encoding="xor", full=number in full)
    return models, stream


@pytest.mark.parametrize("full", [(1,), (3,), (2, 4), (1, 2, 3, 4)])
def test_full_versions_are_checkpoints(full: tuple[int, ...], tmp_path: Path) -> None:
    """At the beginning of a stream and on its way; also where it is continued beyond them."""
    models, stream = anchored(tmp_path, full, 4)
    wanted = timeline(models, tmp_path / "wanted", stats=True)
    found = timeline([models[0], stream], tmp_path / "found", stats=True)
    same(found, wanted)
    for one, other in zip(found.paths, wanted.paths, strict=True):
        assert one.tobytes() == other.tobytes()
    assert check_timeline(found)["ok"]
    size = (models[0] / "model.safetensors").stat().st_size
    assert found.to_dict()["bytes_read"] <= size * (1 + len(full))
    ckdiff.delta(models[4], models[1], stream, encoding="xor")
    found = timeline([models[0], stream], tmp_path / "found", stats=True)
    same(found, timeline([*models, models[1]], tmp_path / "more"))
    timeline([models[0], stream], tmp_path / "whole", stats=True)
    assert files_of(tmp_path / "found") == files_of(tmp_path / "whole")


def test_a_full_version_in_another_order(tmp_path: Path) -> None:
    """What it has is found by name; what follows it is made from it and not from the base."""
    models, stream = anchored(tmp_path, (1,), 2)
    (written,) = (stream / "weight_v000001").glob("*.safetensors")
    content = stepped(start(), 0)
    write_safetensors(written, {name: content[name] for name in reversed(content)})
    found = timeline([models[0], stream], tmp_path / "found")
    same(found, timeline(models, tmp_path / "wanted"))


def test_what_a_stream_cannot_be(tmp_path: Path) -> None:
    models, stream = published(tmp_path, "xor", 3)
    with pytest.raises(ckdiff.UsageError, match="begins with"):
        timeline([models[0], models[1], stream], tmp_path / "out")
    shutil.rmtree(stream / "weight_v000002")
    with pytest.raises(ckdiff.DeltaError, match="is made from version 2, and version 1"):
        timeline([models[0], stream], tmp_path / "out")
    ckdiff.delta(models[0], models[1], tmp_path / "d.safetensors")
    with pytest.raises(ckdiff.CheckpointError, match="is a delta"):
        timeline([models[0], tmp_path / "d.safetensors"], tmp_path / "out")


def test_versions_of_all_encodings_follow_each_other(tmp_path: Path) -> None:
    models, stream = write_steps(tmp_path, 4), tmp_path / "stream"
    for (one, other), encoding in zip(
        pairwise(models), ["packed", "xor", "packed", "overwrite"], strict=True
    ):
        publish(one, other, stream, encoding)
    found = timeline([models[0], stream], tmp_path / "found", stats=True)
    same(found, timeline(models, tmp_path / "wanted", stats=True))
    assert check_timeline(found)["ok"]


@pytest.mark.parametrize("encodings", [("xor", "xor"), ("packed", "packed"), ("xor", "packed")])
def test_tensors_that_no_chunk_holds_whole(encodings: tuple[str, str], tmp_path: Path) -> None:
    """They are folded from their beginning in each chunk, and their digests are held too."""
    size, models, stream = CHUNK + (1 << 20), [], tmp_path / "stream"
    edits: list[list[tuple[int, bytes]]] = [
        [],
        [(5, b"\1"), (CHUNK - 1, b"\1\1")],
        [(5, b"\1"), (CHUNK, b"\2"), (size - 1, b"\3")],
    ]
    for i, pieces in enumerate([*edits, [(CHUNK - 9, b"\7")]]):
        file = tmp_path / f"m{i}" / "model.safetensors"
        write_sparse(file, {"a": ("I8", (700,)), "w": ("I8", (size,))}, {"w": pieces})
        models.append(file.parent)
    for (one, other), encoding in zip(pairwise(models[:3]), encodings, strict=True):
        publish(one, other, stream, encoding)
    found = timeline([models[0], stream], tmp_path / "found", workers=1)
    moves = found.first_moves("w")
    assert {int(at): int(moves[at]) for at in moves.nonzero()[0]} == {
        5: 1, CHUNK - 1: 1, CHUNK: 1, size - 1: 2,
    }  # fmt: skip
    assert [step["changed_since_first"] for step in found.steps] == [3, 3]
    assert [step["changed_since_previous"] for step in found.steps] == [3, 3]
    for step, model in enumerate(models[1:3], 1):
        there = ckdiff.diff(models[0], model, tmp_path / f"{step}.zarr").store
        assert there is not None
        assert found.store(step).table.tuned_hashes == there.table.tuned_hashes
    # another base: nothing that the stream changes tells it, only the digest of the tensor
    with pytest.raises(ckdiff.DeltaError, match=r"another digest|not what the version"):
        timeline([models[3], stream], tmp_path / "other", workers=1)
    assert not (tmp_path / "other").exists()
