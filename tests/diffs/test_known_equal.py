"""What is known to be equal is not read: one inode on the disk, one content hash at the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import bf16, bump, ok, run
from distributed import Client, LocalCluster
from hub_server import Hub, etag_of, only_hub, safetensors, sharded
from support import write_index, write_safetensors

import ckdiff
from ckdiff.checkpoints.places.mapped import MappedReader
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import PairingError

A, B, C = bf16((256, 512)), bf16((100, 3), 1), bf16((64, 64), 2)
SHARED = {"a": A, "b": B}
BYTES = 2 * sum(len(tensor[2]) for tensor in SHARED.values())  # of both sides
HUB_BASE = {"one.safetensors": SHARED, "two.safetensors": {"c": C}}
HUB_TUNED = {"one.safetensors": SHARED, "two.safetensors": {"c": bump(C, 9)}}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[str, str]:
    """Two directories that share one of two shards by a hard link."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, c in ((base, C), (tuned, bump(C, 9))):
        write_index(
            folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
        )
        write_safetensors(folder / "two.safetensors", {"c": c})
    write_safetensors(base / "one.safetensors", SHARED)
    os.link(base / "one.safetensors", tuned / "one.safetensors")
    return str(base), str(tuned)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes readers were asked for."""
    sizes: list[int] = []
    acquire = MappedReader.acquire

    def counted(self: Any, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        sizes.append(int(nbytes.sum()))
        return acquire(self, tensors, starts, nbytes)

    monkeypatch.setattr(MappedReader, "acquire", counted)
    return sizes


def same_result(one: ckdiff.DiffResult, other: ckdiff.DiffResult) -> None:
    assert one.rules == other.rules
    assert (one.store is None) == (other.store is None)
    for a, b in zip(one.table, other.table, strict=True):
        assert (a.name, a.shape, a.changed, a.start) == (b.name, b.shape, b.changed, b.start)
        if one.store is not None and other.store is not None:
            for rule in one.store.masks:
                assert np.array_equal(one.store.mask(a.name, rule), other.store.mask(a.name, rule))


def test_a_hard_link(sides: tuple[str, str], tmp_path: Path, read: list[int]) -> None:
    rules = ["exact", "ulp=1", "atol=1e-3@f16"]
    found = ckdiff.diff(*sides, tmp_path / "x.zarr", rules=rules)
    assert found.bytes_known_equal == BYTES
    assert found.bytes_read == sum(read) == 2 * len(C[2])
    read.clear()
    verified = ckdiff.diff(*sides, tmp_path / "y.zarr", rules=rules, verify=True)
    assert verified.bytes_known_equal == 0
    assert verified.bytes_read == sum(read) == BYTES + 2 * len(C[2])
    same_result(found, verified)
    by_name = {record.name: record for record in found.table}
    assert (by_name["a"].base_hash, by_name["a"].tuned_hash) == ("", "")
    assert [by_name["c"].base_hash] == [r.base_hash for r in verified.table if r.name == "c"]
    ckdiff.check_store(tmp_path / "x.zarr")


def test_a_symbolic_link_and_the_same_path(tmp_path: Path, read: list[int]) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", SHARED)
    (tmp_path / "link.safetensors").symlink_to(path)
    for other in (path, tmp_path / "link.safetensors"):
        found = ckdiff.diff(path, other)
        assert (found.bytes_read, found.bytes_known_equal) == (0, BYTES)
        assert not found.differs
    assert sum(read) == 0


def test_a_copy_is_read(tmp_path: Path) -> None:
    one = write_safetensors(tmp_path / "one.safetensors", SHARED)
    two = write_safetensors(tmp_path / "two.safetensors", SHARED)
    assert ckdiff.diff(one, two).bytes_known_equal == 0


def test_another_tensor_of_the_same_file_is_read(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"x.0": C, "y.0": bump(C, 5), "z": B})
    found = ckdiff.diff(path, path, rename=["^x=t", "^y=x", "^t=y"])
    assert found.bytes_known_equal == 2 * len(B[2])
    assert found.rules["exact"]["changed"] == 10


def test_statistics_need_the_bytes(sides: tuple[str, str]) -> None:
    found, wanted = (ckdiff.diff(*sides, stats=True, verify=v) for v in (False, True))
    assert found.bytes_known_equal == 0
    assert found.table == wanted.table


def test_equal_chunks_among_others(
    sides: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and chunks of which nothing, a part or all is read."""
    chunk = 1 << 16
    monkeypatch.setattr("ckdiff.layout.CHUNK", chunk)
    for module in ("schema", "maskbits"):  # such stores are none: readers must believe in them
        monkeypatch.setattr(f"ckdiff.stores.{module}.OBJECT", chunk // 8)
    tensors = {f"t.{i}": bf16((n,), i) for i, n in enumerate([5, 70_000, 200_000, 511, 66_000])}
    base, tuned = tmp_path / "b", tmp_path / "t"
    for kept in ([0], [1], [2], [0, 2, 4], [1, 3], [0, 1, 2, 3, 4]):
        shared = {name: t for i, (name, t) in enumerate(tensors.items()) if i in kept}
        rest = {name: t for name, t in tensors.items() if name not in shared}
        moved = {name: bump(t, 3) for name, t in rest.items()}
        for folder, others in ((base, rest), (tuned, moved)):
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            if others:
                write_safetensors(folder / "rest.safetensors", others)
        write_safetensors(base / "same.safetensors", shared)
        os.link(base / "same.safetensors", tuned / "same.safetensors")
        stores = [tmp_path / f"{len(os.listdir(tmp_path))}-{v}.zarr" for v in "nv"]
        found = ckdiff.diff(base, tuned, stores[0])
        verified = ckdiff.diff(base, tuned, stores[1], verify=True)
        assert found.bytes_known_equal == 2 * sum(len(t[2]) for t in shared.values())
        same_result(found, verified)
        for key in found.store.objects if found.store else ():
            if key.startswith("masks/"):
                assert (stores[0] / key).read_bytes() == (stores[1] / key).read_bytes()


def test_what_is_said(sides: tuple[str, str]) -> None:
    assert "known to be equal were not read" in ok("diff", *sides).stdout
    assert "known to be equal" in ok("diff", *sides, "--dry-run").stdout
    assert "known" not in ok("diff", *sides, "--verify").stdout
    for more in ([], ["--dry-run"]):
        found = json.loads(ok("diff", *sides, "--json", *more).stdout)
        assert found["bytes_known_equal"] == BYTES


def test_verify_does_not_take_over_a_run_that_did_not_read(
    sides: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.zarr"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ckdiff.diffs.run.verify_sources", stop)
        with pytest.raises(ckdiff.Interrupted):
            ckdiff.diff(*sides, out)
    found = ckdiff.diff(*sides, out, verify=True)
    assert found.bytes_resumed == 0
    assert all(record.base_hash for record in found.table)


# -- one base --------------------------------------------------------------------------------------


def third(tmp_path: Path, sides: tuple[str, str], a: Any) -> str:
    """Another tuned side, that shares no file with the base."""
    folder = tmp_path / "third"
    write_safetensors(folder / "model.safetensors", {"a": a, "b": B, "c": bump(C, 30)})
    return str(folder)


def test_stores_of_which_one_did_not_read(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, all_read = (tmp_path / f"{n}.zarr" for n in ("one", "two", "read"))
    ckdiff.diff(*sides, one)
    ckdiff.diff(sides[0], third(tmp_path, sides, bump(A, 40)), two)
    ckdiff.diff(*sides, all_read, verify=True)
    result = ok("overlap", str(one), str(two))
    assert "whether the stores have one base is not known for 2 of 3" in result.stderr
    assert "different bases: 2" not in result.stderr
    assert "in content" not in result.stdout
    assert not ckdiff.overlap([two, all_read]).other_base
    # a tensor that no element of changed has no place in any null; the others are verified
    nulls = ckdiff.overlap([one, two], nulls=["magnitude"], base=sides[0], by="tensor")
    wanted = ckdiff.overlap([all_read, two], nulls=["magnitude"], base=sides[0], by="tensor")
    assert nulls.to_dict()["rows"] == wanted.to_dict()["rows"]
    assert "may have different bases: a and b" in result.stdout.replace("a, b", "a and b")
    found = ckdiff.overlap([one, two])
    assert (found.other_base, found.unknown_base) == ([], ["a", "b"])
    assert found.to_dict()["unknown_base"] == ["a", "b"]
    with pytest.raises(PairingError, match="not known for 2 of 3") as refused:
        ckdiff.overlap([one, two], require_same_base=True)
    assert "diff --verify" in str(refused.value.hint)
    ckdiff.overlap([two, all_read], require_same_base=True)


def test_chance_needs_the_base_of_what_was_not_read(hub: Hub, tmp_path: Path) -> None:
    """Masks drawn from a run have elements where the run itself had none."""
    hub.put("org/wrong", sharded(HUB_BASE | {"one.safetensors": SHARED | {"a": bump(A, 99)}}))
    ckdiff.diff("hf://org/base", "hf://org/tuned", tmp_path / "run.zarr")
    drawn = [tmp_path / f"{seed}.zarr" for seed in (1, 2)]
    for seed, path in enumerate(drawn):
        ckdiff.random_mask(tmp_path / "run.zarr", path, seed=seed, within="model")
    right = ckdiff.overlap(drawn, nulls=["magnitude"], base="hf://org/base")
    assert right.unknown_base == []
    with pytest.raises(PairingError, match="whether hf://org/wrong is its base is not known"):
        ckdiff.overlap(drawn, nulls=["magnitude"], base="hf://org/wrong")


def test_an_empty_tensor_of_one_file_has_a_content_hash(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"c": C, "none": ("BF16", (0, 4), b"")})
    found = ckdiff.diff(path, path, tmp_path / "x.zarr")
    assert found.bytes_read == 0
    assert {r.name for r in found.table if len(r.base_hash) == 32} == {"none"}


def test_a_wrong_base_is_still_noticed(sides: tuple[str, str], tmp_path: Path) -> None:
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    ckdiff.diff(*sides, one)
    ckdiff.diff(sides[0], third(tmp_path, sides, bump(A, 40)), two)
    other = write_safetensors(tmp_path / "o.safetensors", {"a": bump(A, 1), "b": B, "c": C})
    result = run("overlap", str(one), str(two), "--null", "magnitude", "--base", str(other))
    assert result.exit_code == 2
    assert "is not the base of these stores: a has other content" in result.stderr


def test_importing_for_a_base_reads_it(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"c": C})
    np.savez(tmp_path / "masks.npz", c=np.ones((64, 64), bool))
    ckdiff.import_masks(tmp_path / "masks.npz", tmp_path / "x.zarr", base=path)
    (record,) = ckdiff.open_store(tmp_path / "x.zarr").tensors
    assert len(record.base_hash) == 32


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("org/base", sharded(HUB_BASE))
        hub.put("org/tuned", sharded(HUB_TUNED))
        yield hub


def test_one_content_hash_at_the_hub(hub: Hub, tmp_path: Path, read: list[int]) -> None:
    out = tmp_path / "x.zarr"
    found = ckdiff.diff("hf://org/base", "hf://org/tuned", out)
    assert found.bytes_known_equal == BYTES
    assert found.bytes_read == sum(read) == 2 * len(C[2])
    assert found.rules["exact"]["changed"] == 9
    whole = safetensors(SHARED)
    digest, start = etag_of(whole), whole.index(A[2])
    records = {record.name: record for record in found.table}
    assert records["a"].base_hash == f"sha256:{digest}@{start}"
    assert records["b"].base_hash == f"sha256:{digest}@{start + len(A[2])}"
    assert records["a"].base_hash == records["a"].tuned_hash
    assert len(records["c"].base_hash) == 32
    verified = ckdiff.diff("hf://org/base", "hf://org/tuned", tmp_path / "y.zarr", verify=True)
    assert verified.bytes_known_equal == 0
    same_result(found, verified)


def test_a_cache_that_was_tampered_with_is_read(hub: Hub, tmp_path: Path) -> None:
    """A link to another blob than the hub's says nothing about the hub's file."""
    hub.put("org/tuned", sharded(HUB_TUNED | {"one.safetensors": {"a": bump(A, 4), "b": B}}))
    ckdiff.diff("hf://org/base", "hf://org/tuned")
    base, tuned = sorted((tmp_path / "home").rglob("snapshots/*/one.safetensors"))
    other = os.readlink(tuned)
    os.link(tuned.resolve(), base.parent.parent.parent / "blobs" / os.path.basename(other))
    base.unlink()
    base.symlink_to(other)
    found = ckdiff.diff("hf://org/base", "hf://org/tuned", tmp_path / "x.zarr", verify=True)
    assert found.rules["exact"]["changed"] == 9
    assert found.store is not None
    assert "content" not in found.store.manifest["base"]["files"][0]


def test_small_files_by_their_blob(hub: Hub) -> None:
    tiny = {"w": bf16((4, 4))}
    hub.put("org/base", {"model.safetensors": safetensors(tiny)})
    hub.put("org/tuned", {"model.safetensors": safetensors(tiny)})
    assert ckdiff.diff("hf://org/base", "hf://org/tuned").bytes_known_equal == 64


def test_two_revisions_of_one_repository(hub: Hub) -> None:
    hub.put("org/base", sharded(HUB_TUNED), "v2")
    found = ckdiff.diff("hf://org/base", "hf://org/base@v2")
    assert found.bytes_known_equal == BYTES
    assert hub.downloaded().count("one.safetensors") == 1


def test_stores_of_one_base_at_the_hub_know_it(hub: Hub, tmp_path: Path) -> None:
    """One run read a tensor of the base and the other did not: the files' hashes tell."""
    hub.put("org/other", sharded(HUB_BASE | {"one.safetensors": {"a": bump(A, 4), "b": B}}))
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    ckdiff.diff("hf://org/base", "hf://org/tuned", one)
    ckdiff.diff("hf://org/base", "hf://org/other", two)
    found = ckdiff.overlap([one, two], nulls=["magnitude"], base="hf://org/base")
    assert found.other_base == found.unknown_base == []
    made = ckdiff.combine("union", [one, two], tmp_path / "both.zarr")
    assert all(len(record.base_hash) == 32 for record in made.tensors)
    hub.put("org/base", sharded(HUB_TUNED))
    ckdiff.diff("hf://org/base", "hf://org/other", tmp_path / "three.zarr")
    assert "c" in ckdiff.overlap([two, tmp_path / "three.zarr"]).unknown_base


def test_a_local_copy_is_not_known_to_be_the_hubs(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "local"
    path.mkdir()
    for name, data in sharded(HUB_BASE).items():
        (path / name).write_bytes(data)
    found = ckdiff.diff(path, "hf://org/base")
    assert not found.differs
    assert found.bytes_known_equal == 0


def test_workers_use_the_cached_files_and_read_as_little(
    hub: Hub, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ckdiff.diff("hf://org/base", "hf://org/tuned", tmp_path / "here.zarr")
    assert here.bytes_known_equal == BYTES
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as one,
        Client(one) as client,
    ):
        hub.requests.clear()
        read.clear()
        monkeypatch.setattr("ckdiff.running.remote._KEEP", 0.0)
        there = ckdiff.diff(
            "hf://org/base", "hf://org/tuned", tmp_path / "there.zarr", scheduler=client
        )
    assert sum(read) == there.bytes_read == here.bytes_read
    assert len(hub.requests) == 2  # both sides' commits, asked for here; nothing by the worker
    same_result(here, there)
    assert here.table == there.table
