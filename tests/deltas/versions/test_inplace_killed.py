"""Changes in place that are killed at any moment: finished or undone, and never taken for whole."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from inplace_runs import (
    bf16_model,
    calls_of,
    killed,
    killed_after,
    marker_of,
    ready,
    stepped,
    write_local,
)
from support import Tensor, write_safetensors
from weight_streams import read_model, tree_digest, write_version

from ckdiff.checkpoints.halfway import is_half_way, refuse_half_way
from ckdiff.deltas.versions.inplace import apply_in_place, recover
from ckdiff.errors import CheckpointError, DeltaError, OutputError

KINDS = ("xor", "overwrite", "mixed", "seed")
MOMENTS = 8  #: of each kind at which it is killed


class Scene:
    """A local checkpoint at version 0, a stream to version 2, and what it is to be."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.stream = folder / "stream"
        one = bf16_model(tensors=3, rows=150)
        two = stepped(one, 0.02, 1)
        three = stepped(two, 0.3, 2)
        first, second = ("xor", "overwrite") if kind in ("mixed", "seed") else (kind, kind)
        write_version(self.stream, 1, one, two, encoding=first)
        if kind == "seed":
            shutil.rmtree(self.stream / "weight_v000001")
            (self.stream / "weight_v000001").mkdir()
            write_safetensors(self.stream / "weight_v000001" / "model.safetensors", two)
        write_version(self.stream, 2, two, three, encoding=second)
        self.models: dict[int, dict[str, Tensor]] = {0: one, 2: three}
        #: what is killed
        self.work = partial(apply_in_place, folder / "local", self.stream, workers=1)
        self.fresh()
        ready(self.work)
        self.trees = {0: self.digest(self.fresh()), 2: self.digest(self.done())}
        assert read_model(self.folder / "local") == three

    def fresh(self) -> Path:
        """The local checkpoint as it was."""
        shutil.rmtree(self.folder / "local", ignore_errors=True)
        return write_local(self.folder / "local", self.models[0], version=0)

    def done(self) -> Path:
        """The same, changed without being stopped."""
        apply_in_place(self.fresh(), self.stream, workers=1)
        return self.folder / "local"

    def digest(self, local: Path) -> dict[str, str]:
        """All that has to be the same to the last byte."""
        found = tree_digest(local)
        return {k: v for k, v in found.items() if k != ".weight_sync/lock"}

    def check(self, local: Path) -> None:
        """What is called whole is whole."""
        version = marker_of(local)
        if version is None:
            assert is_half_way(local)
            with pytest.raises(CheckpointError, match="halfway"):
                refuse_half_way(local)
            return
        assert is_half_way(local) is None
        refuse_half_way(local)
        assert read_model(local) == self.models[version]


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return Scene(tmp_path, request.param)


def moments(work: Callable[[], object], count: int) -> list[int]:
    """Some of the calls of ``work``, which runs to its end."""
    total = calls_of(work)
    assert total > 10
    return sorted(random.Random(total).sample(range(1, total + 1), min(count, total)))


def test_killed_and_run_again(scene: Scene) -> None:
    scene.fresh()
    half = 0
    for i, at in enumerate(moments(scene.work, MOMENTS)):
        local = scene.fresh()
        assert killed(scene.work, at, torn=i % 2 == 0)
        scene.check(local)
        half += marker_of(local) is None
        scene.work()
        assert scene.digest(local) == scene.trees[2]
    assert half


def test_killed_and_undone(scene: Scene) -> None:
    scene.fresh()
    for at in moments(scene.work, MOMENTS):
        local = scene.fresh()
        killed(scene.work, at)
        version = recover(local, undo=True, workers=1).version
        scene.check(local)
        assert scene.digest(local) == scene.trees[2 if version else 0]


def test_killed_while_it_is_repaired(scene: Scene) -> None:
    local = scene.fresh()
    total = calls_of(scene.work)
    chance = random.Random(5)
    for _ in range(MOMENTS):
        local = scene.fresh()
        killed(scene.work, chance.randint(total // 2, total))
        for undo in (chance.random() < 0.5, chance.random() < 0.5):
            killed(partial(recover, local, undo=undo, workers=1), chance.randint(1, 30))
            scene.check(local)
        recover(local, workers=1)
        scene.check(local)
        scene.work()
        assert scene.digest(local) == scene.trees[2]


def test_killed_at_any_time(scene: Scene) -> None:
    """By the clock, with two threads."""
    chance = random.Random(7)
    for _ in range(6):
        local = scene.fresh()
        killed_after(partial(scene.work, workers=2), chance.random() * 0.05)
        scene.check(local)
        scene.work()
        assert scene.digest(local) == scene.trees[2]


# journals that are not believed


_last: list[int] = []  #: at which call it is killed that is half-way then: always the same


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint that is half-way."""
    found = Scene(tmp_path, "xor")
    local = found.fresh()
    for at in _last or range(calls_of(found.work), 0, -1):
        local = found.fresh()
        killed(found.work, at)
        if is_half_way(local):
            _last[:] = [at]
            return local
    raise AssertionError("it is never half-way")


def distrusted(local: Path, match: str) -> None:
    """Nothing is done with the journal, and the checkpoint stays half-way."""
    before = tree_digest(local)
    for undo in (False, True):
        with pytest.raises((DeltaError, OutputError), match=match):
            recover(local, undo=undo, workers=1)
    with pytest.raises((DeltaError, OutputError), match=match):
        apply_in_place(local, local.parent / "stream", workers=1)
    assert tree_digest(local) == before
    assert is_half_way(local)


def test_a_journal_that_others_may_write(half: Path) -> None:
    (half / ".weight_sync" / "ckdiff-journal").chmod(0o666)
    distrusted(half, "others may write")


def test_a_journal_with_another_link(half: Path, tmp_path: Path) -> None:
    os.link(half / ".weight_sync" / "ckdiff-journal", tmp_path / "second")
    distrusted(half, "another link")


def test_a_journal_that_is_a_link(half: Path, tmp_path: Path) -> None:
    path = half / ".weight_sync" / "ckdiff-journal"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    distrusted(half, "cannot be opened")


def test_a_journal_that_was_copied(half: Path) -> None:
    path = half / ".weight_sync" / "ckdiff-journal"
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").chmod(0o600)
    path.with_name("copy").replace(path)
    distrusted(half, "copied")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_damaged_journal(half: Path, fraction: float) -> None:
    path = half / ".weight_sync" / "ckdiff-journal"
    raw = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(int(len(raw) * fraction))
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    with pytest.raises(DeltaError, match=r"damaged|cut|no journal"):
        recover(half, workers=1)
    assert marker_of(half) is None
    path.write_bytes(raw)
    assert recover(half, workers=1).version == 2


@pytest.mark.parametrize("left", [0, 5, 40, 0.5, 0.99])
def test_a_journal_that_was_cut(half: Path, left: float) -> None:
    path = half / ".weight_sync" / "ckdiff-journal"
    size = path.stat().st_size
    os.truncate(path, int(size * left) if left < 1 and left else int(left))
    distrusted(half, r"cut|no journal|damaged")


def test_shards_that_others_changed(half: Path) -> None:
    shard = half / "model-00001-of-00002.safetensors"
    with open(shard, "r+b") as file:
        file.seek(-700, os.SEEK_END)
        file.write(bytes(700))
    with pytest.raises(DeltaError, match="others have changed"):
        recover(half, workers=1)
    assert is_half_way(half)


def test_shards_that_were_replaced(half: Path) -> None:
    shard = half / "model-00001-of-00002.safetensors"
    shutil.copy(shard, half / "copy")
    (half / "copy").replace(shard)
    distrusted(half, "replaced by another file")


def test_an_engine_seeds_anew(half: Path, tmp_path: Path) -> None:
    """Whoever puts a marker there says that it is whole: the journal is nobody's any more."""
    model = bf16_model(tensors=3, rows=150)
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    again = write_local(tmp_path / "again", model, version=0)
    for path in again.glob("*.safetensors"):
        shutil.copyfile(path, half / path.name)
    shutil.copy(again / ".weight_sync" / "state.json", half / ".weight_sync" / "state.json")
    assert is_half_way(half) is None
    apply_in_place(half, tmp_path / "stream", workers=1)
    assert marker_of(half) == 2
