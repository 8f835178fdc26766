"""Deltas in files that are applied in place: what comes out, what is refused, and being killed."""

from __future__ import annotations

import filecmp
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cli_support import MOST_MEMORY, error, ok, python
from hypothesis import given, settings
from hypothesis import strategies as st
from inplace_runs import bf16_model, calls_of, full_disk, killed, marker_of, stepped, write_local
from support import Tensor, write_safetensors, write_sparse
from weight_streams import read_model, tree_digest, write_version

import ckdiff
from ckdiff import apply_in_place
from ckdiff.checkpoints.halfway import is_half_way, refuse_half_way
from ckdiff.deltas.versions.inplace import recover
from ckdiff.errors import CheckpointError, CkdiffError, DeltaError, OutputError, UsageError

ENCODINGS = (("packed",), ("indices",), ("packed", "indices", "packed"))
MOMENTS = 8  #: of each kind at which it is killed

Model = dict[str, Tensor]


class Scene:
    """A local checkpoint, deltas one after the other, and what they lead to."""

    def __init__(self, folder: Path, encodings: tuple[str, ...]) -> None:
        self.folder, self.local = folder, folder / "local"
        self.models = [bf16_model(tensors=3, rows=150)]
        self.deltas: list[Path] = []
        write_local(folder / "0", self.models[0])
        for i, encoding in enumerate(encodings):
            self.models.append(stepped(self.models[-1], (0.02, 0.3, 0.001)[i], i))
            write_local(folder / f"{i + 1}", self.models[-1])
            self.deltas.append(folder / f"{i}.delta")
            ckdiff.delta(folder / f"{i}", folder / f"{i + 1}", self.deltas[-1], encoding=encoding)
        self.work = partial(apply_in_place, self.local, self.deltas, workers=1)  #: is killed

    def fresh(self, version: int | None = None) -> Path:
        """The local checkpoint as it was."""
        shutil.rmtree(self.local, ignore_errors=True)
        return write_local(self.local, self.models[0], version)

    def is_at(self, step: int) -> bool:
        """Whether the local checkpoint is what some deltas lead to, to the last byte."""
        return contents(self.local) == contents(self.folder / f"{step}")

    def check(self) -> None:
        """What is called whole is whole."""
        if is_half_way(self.local):
            assert marker_of(self.local) is None
            with pytest.raises(CheckpointError, match="halfway"):
                refuse_half_way(self.local)
        else:
            assert self.is_at(0 if marker_of(self.local) == 7 else len(self.deltas))


def contents(local: Path) -> dict[str, str]:
    """All but what engines and ckdiff share."""
    return {k: v for k, v in tree_digest(local).items() if not k.startswith(".weight_sync")}


@pytest.fixture(params=ENCODINGS, ids="-".join)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return Scene(tmp_path, request.param)


def refused(scene: Scene, match: str, kind: type[CkdiffError] = OutputError) -> None:
    """Nothing at all changes."""
    before = tree_digest(scene.local)
    with pytest.raises(kind, match=match):
        apply_in_place(scene.local, scene.deltas)
    after = tree_digest(scene.local)
    for tree in (before, after):
        tree.pop(".weight_sync/lock", None)
    assert after == before


@pytest.mark.parametrize("version", [None, 7])
def test_it_is_what_the_deltas_lead_to(scene: Scene, version: int | None) -> None:
    notes: list[str] = []
    local = scene.fresh(version)
    done = apply_in_place(local, scene.deltas, observer=ckdiff.Observer(note=notes.append))
    assert scene.is_at(len(scene.deltas))
    assert marker_of(local) is done.version is None
    assert sorted(os.listdir(local / ".weight_sync")) == ["lock"]
    assert (done.before, done.deltas, done.versions) == (version, len(scene.deltas), [])
    assert done.tensors == 5
    assert done.journal_bytes > 0
    assert [("at none" in note) for note in notes] == [True] * (version is not None)
    json.dumps(done.to_dict())


def test_once_more_is_nothing_to_do(scene: Scene) -> None:
    local = scene.fresh()
    scene.work()
    times = [path.stat().st_mtime_ns for path in sorted(local.glob("m*"))]
    again = apply_in_place(local, scene.deltas)
    assert (again.deltas, again.tensors, again.journal_bytes) == (0, 0, 0)
    assert [path.stat().st_mtime_ns for path in sorted(local.glob("m*"))] == times


def test_deltas_that_change_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ())
    local = scene.fresh(version=3)
    ckdiff.delta(tmp_path / "0", tmp_path / "0", tmp_path / "same")
    before = tree_digest(local)
    done = apply_in_place(local, tmp_path / "same")
    assert (done.version, done.deltas, done.tensors) == (3, 0, 0)
    assert {k: v for k, v in tree_digest(local).items() if not k.endswith("lock")} == before


def test_one_file_of_any_name(tmp_path: Path) -> None:
    one = bf16_model(tensors=2)
    two = stepped(one, 0.1, 0)
    for name, model in (("one", one), ("two", two)):
        write_safetensors(tmp_path / f"{name}.safetensors", model)
    ckdiff.delta(tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "d")
    (tmp_path / "local").mkdir()
    shutil.copy(tmp_path / "one.safetensors", tmp_path / "local" / "model.safetensors")
    apply_in_place(tmp_path / "local", tmp_path / "d")
    made = tmp_path / "local" / "model.safetensors"
    assert made.read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_headers_and_the_index_are_rewritten_where_they_fit(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ("packed",))
    tuned = tmp_path / "1"
    shard, index = tuned / "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    raw = shard.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = dict(reversed(json.loads(raw[8 : 8 + size]).items()))
    text = json.dumps(entries).encode()
    text = text if len(text) <= size else json.dumps(entries, separators=(",", ":")).encode()
    shard.write_bytes(raw[:8] + text.ljust(size) + raw[8 + size :])
    assert shard.read_bytes() != raw
    found = json.loads((tuned / index).read_text())
    found["weight_map"] = dict(reversed(found["weight_map"].items()))
    (tuned / index).write_text(json.dumps(found))
    ckdiff.delta(tmp_path / "0", tuned, scene.deltas[0], overwrite=True)
    scene.fresh()
    scene.work()
    assert scene.is_at(1)
    scene.work()
    assert scene.is_at(1)


def reshaped(model: Model) -> Model:
    kind, (rows, columns), data = model["layers.0.weight"]
    return model | {"layers.0.weight": (kind, (columns, rows), data)}


def retyped(model: Model) -> Model:
    _, shape, data = model["layers.0.weight"]
    return model | {"layers.0.weight": ("F16", shape, data)}


def grown(model: Model) -> Model:
    kind, (rows, columns), data = model["layers.0.weight"]
    return model | {"layers.0.weight": (kind, (rows + 2, columns), data + bytes(4 * columns))}


OTHERS: dict[str, tuple[Callable[[Model], Model], str]] = {
    "added": (lambda model: model | {"more": ("U8", (3,), b"abc")}, "add more"),
    "removed": (lambda model: {k: v for k, v in model.items() if k != "odd"}, "remove odd"),
    "reshaped": (reshaped, r"layers\.0\.weight another shape"),
    "retyped": (retyped, r"layers\.0\.weight another dtype"),
    "grown": (grown, r"layers\.0\.weight another shape"),
    "moved": (lambda model: dict(reversed(model.items())), "lies elsewhere"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_are_refused(tmp_path: Path, what: str) -> None:
    scene = Scene(tmp_path, ())
    change, match = OTHERS[what]
    write_local(tmp_path / "other", change(scene.models[0]))
    scene.deltas = [tmp_path / "d"]
    ckdiff.delta(tmp_path / "0", tmp_path / "other", tmp_path / "d")
    scene.fresh(version=2)
    refused(scene, match)


def test_other_files_are_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ())
    scene.deltas = [tmp_path / "d"]
    (tmp_path / "other").mkdir()
    write_safetensors(tmp_path / "other" / "model.safetensors", scene.models[0])
    ckdiff.delta(tmp_path / "0", tmp_path / "other", tmp_path / "d")
    scene.fresh()
    refused(scene, "has the file")
    shutil.copytree(tmp_path / "0", tmp_path / "spaced")
    index = tmp_path / "spaced" / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    ckdiff.delta(tmp_path / "0", tmp_path / "spaced", tmp_path / "d", overwrite=True)
    refused(scene, "index of another name or size")
    index.unlink()
    ckdiff.delta(tmp_path / "0", tmp_path / "spaced", tmp_path / "d", overwrite=True)
    refused(scene, "has no index")


def test_another_base_is_refused(scene: Scene) -> None:
    other = stepped(scene.models[0], 0.3, 9)
    first = {name: other[name] for name in list(other)[::2]}
    write_safetensors(scene.fresh(version=1) / "model-00001-of-00002.safetensors", first)
    refused(scene, "was not made for|is damaged", DeltaError)


def test_damaged_deltas_are_refused(scene: Scene) -> None:
    path = scene.deltas[-1]
    raw = path.read_bytes()
    for at in (20, len(raw) // 3, len(raw) // 2, len(raw) - 30):
        scene.fresh(version=1)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        refused(scene, ".", CkdiffError)
        path.write_bytes(raw[:at])
        refused(scene, ".", CkdiffError)
    if len(scene.deltas) > 1:
        path.write_bytes(raw)
        scene.deltas = [scene.deltas[0], scene.deltas[-1]]
        refused(scene, "does not follow", DeltaError)


def test_links_and_shared_files_are_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ("packed",))
    shard = scene.fresh() / "model-00001-of-00002.safetensors"
    os.link(shard, tmp_path / "second")
    refused(scene, "has 2 names")
    shard.unlink()
    shard.symlink_to(tmp_path / "second")
    refused(scene, "is a link")


def test_one_kind_at_a_time(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ("packed",))
    write_version(tmp_path / "stream", 1, scene.models[0], scene.models[1])
    scene.fresh()
    with pytest.raises(UsageError, match="is a weight version, and"):
        apply_in_place(scene.local, [scene.deltas[0], tmp_path / "stream" / "weight_v000001"])
    with pytest.raises(UsageError, match="no versions"):
        apply_in_place(scene.local, scene.deltas, target=1)
    with pytest.raises(UsageError, match="no delta"):
        apply_in_place(scene.local, [])
    with pytest.raises(CheckpointError):
        apply_in_place(scene.local, tmp_path / "nothing")
    assert scene.is_at(0)


def test_a_full_disk(scene: Scene) -> None:
    scene.fresh(version=1)
    with full_disk("pwrite"):
        refused(scene, r"No space.*free some")
    scene.work()
    assert scene.is_at(len(scene.deltas))


def test_on_the_command_line(scene: Scene) -> None:
    scene.fresh()
    deltas = [str(path) for path in scene.deltas]
    assert "went through" in ok("apply", str(scene.local), *deltas, "--in-place").stdout
    assert scene.is_at(len(scene.deltas))
    again = ok("apply", str(scene.local), *deltas, "--in-place", "--json")
    assert json.loads(again.stdout)["deltas"] == 0
    assert "already" in ok("apply", str(scene.local), *deltas, "--in-place").stdout


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_change_is_what_is_made_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    kinds = st.sampled_from([("BF16", 2), ("U8", 1), ("F64", 8), ("F8_E4M3", 1)])
    chosen = data.draw(st.lists(st.tuples(kinds, st.integers(0, 9000)), min_size=1, max_size=5))
    chance = random.Random(data.draw(st.integers(0, 1000)))
    models: list[Model] = [{
        f"t{i}": (kind, (count,), chance.randbytes(count * width))
        for i, ((kind, width), count) in enumerate(chosen)
    }]  # fmt: skip
    write_local(folder / "0", models[0])
    deltas = []
    for i in range(data.draw(st.integers(1, 3))):
        models.append({
            name: (kind, shape, bytes(
                byte ^ (chance.random() < 0.01) for byte in raw
            )) for name, (kind, shape, raw) in models[-1].items()
        })  # fmt: skip
        write_local(folder / f"{i + 1}", models[-1])
        deltas.append(folder / f"{i}.delta")
        encoding = data.draw(st.sampled_from(["packed", "indices"]))
        ckdiff.delta(folder / f"{i}", folder / f"{i + 1}", deltas[-1], encoding=encoding)
    shutil.copytree(folder / "0", folder / "local")
    apply_in_place(folder / "local", deltas)
    assert contents(folder / "local") == contents(folder / f"{len(deltas)}")


IN_PLACE = """
import sys
import ckdiff
done = ckdiff.apply_in_place(sys.argv[1], sys.argv[2], workers=2)
print(done.tensors, most() >> 20)
"""


@pytest.mark.parametrize("encoding", ["packed", "xor"])
def test_memory_is_bounded(tmp_path: Path, encoding: str) -> None:
    """Of a model of 384 MiB, of which a part changes densely."""
    size = 3 << 27
    tensors = {"weight": ("BF16", (size // 2048, 1024), size), "more": ("U8", (1,), 1)}
    edits = {"weight": dict.fromkeys(range(0, size, 1 << 26), b"\1" * (1 << 20))}
    for name in ("local", "tuned"):
        (tmp_path / name).mkdir()
        write_sparse(
            tmp_path / name / "model.safetensors", tensors, edits if name[0] == "t" else {}
        )
    ckdiff.delta(tmp_path / "local", tmp_path / "tuned", tmp_path / "d", encoding=encoding)
    done = python(MOST_MEMORY + IN_PLACE, str(tmp_path / "local"), str(tmp_path / "d"))
    assert done.returncode == 0, done.stderr
    count, mebibytes = map(int, done.stdout.split())
    assert count == 1
    assert mebibytes < 200
    local, tuned = (tmp_path / name / "model.safetensors" for name in ("local", "tuned"))
    assert filecmp.cmp(local, tuned, shallow=False)


# killed


def moments(scene: Scene) -> tuple[list[int], int]:
    """Some of the calls of its work, and how many there are."""
    total = calls_of(scene.work, partial(scene.fresh, version=7))
    assert total > 10
    return sorted(random.Random(total).sample(range(1, total + 1), min(MOMENTS, total))), total


def test_killed_and_run_again(scene: Scene) -> None:
    half, (chosen, total) = 0, moments(scene)
    for i, at in enumerate([*chosen, total - 1, total]):
        scene.fresh(version=7)
        killed(scene.work, at, torn=i % 2 == 0)
        scene.check()
        half += is_half_way(scene.local) is not None
        scene.work()
        assert scene.is_at(len(scene.deltas))
        assert marker_of(scene.local) is None
        assert sorted(os.listdir(scene.local / ".weight_sync")) == ["lock"]
    assert half


def test_killed_and_undone(scene: Scene) -> None:
    for at in moments(scene)[0]:
        local = scene.fresh(version=7)
        killed(scene.work, at)
        version = recover(local, undo=True, workers=1).version
        scene.check()
        assert version == marker_of(local)
        assert scene.is_at(0 if version == 7 else len(scene.deltas))


def test_commands_refuse_it_half_way(tmp_path: Path) -> None:
    scene = Scene(tmp_path, ("packed",))
    scene.fresh()
    for at in range(calls_of(scene.work), 0, -1):
        scene.fresh()
        killed(scene.work, at)
        if is_half_way(scene.local):
            break
    assert "--in-place finishes that first" in error("info", str(scene.local))
    assert read_model(scene.local) != {}
    undone = ok("apply", str(scene.local), "--in-place", "--undo", "--json")
    assert json.loads(undone.stdout)["recovered"] == "undone"
    assert scene.is_at(0)
    again = ok("apply", str(scene.local), "--in-place", "--undo")
    assert "is whole: there was nothing to undo" in again.stdout
    scene.fresh()
    killed(scene.work, at)
    again = ok("apply", str(scene.local), str(scene.deltas[0]), "--in-place", "--json")
    assert json.loads(again.stdout)["recovered"] == "finished"
    assert scene.is_at(1)
