"""Set algebra on stores, against numpy."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_support import stopped
from derived_stores import fails_after, first_bits, tree
from mask_stores import Flags, make_store, random_base

import ckdiff
from ckdiff.errors import (
    Interrupted,
    PairingError,
    StoreCorrupt,
    StoreError,
    StoreExists,
    StoreIncomplete,
    UsageError,
)
from ckdiff.layout import CHUNK
from ckdiff.masks.combine import Combination
from ckdiff.options import Observer
from ckdiff.outputs.ownership import SUFFIX
from ckdiff.stores import objects

SHAPES = {
    "embed": ("BF16", (37, 41)),
    "layers.0.a": ("BF16", (513,)),
    "layers.0.b": ("U8", (7,)),
    "layers.1.a": ("BF16", (1024,)),
    "layers.10.a": ("BF16", (70_001, 9)),  # more than an inner chunk
    "layers.2.empty": ("U8", (0, 5)),
    "norm": ("BF16", (1,)),
    "scalar": ("U8", ()),
}
EXTRA = {"a.first": ("BF16", (1000,)), "layers.1.b": ("U8", (3,))}


def flags(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> Flags:
    found = rng.random(shape) < density
    return np.asarray(found, bool)


def make_stores(
    folder: Path, number: int, seed: int = 0
) -> tuple[list[ckdiff.MaskStore], list[dict[str, Flags]]]:
    """Stores of one base. All but the first have tensors that the first has not."""
    rng = np.random.default_rng(seed)
    base = random_base(rng, SHAPES | EXTRA)
    stores, masks = [], []
    for i in range(number):
        density = float(rng.choice([0.02, 0.3, 0.7]))
        masks.append({name: flags(rng, shape, density) for name, (_, shape, _) in base.items()})
        skip = tuple(EXTRA) if i == 0 else ()
        stores.append(make_store(folder / f"run{i}.zarr", base, masks[-1], skip))
    return stores, masks


def expected(operation: str, masks: list[Flags]) -> Flags:
    votes = np.sum(np.stack(masks), axis=0)
    first = masks[0]
    found = {
        "intersection": lambda: votes == len(masks),
        "union": lambda: votes > 0,
        "difference": lambda: first & (votes == 1),
        "symmetric-difference": lambda: votes % 2 == 1,
    }
    if operation in found:
        return np.asarray(found[operation](), bool)
    return np.asarray(votes >= int(operation.removeprefix("at-least=")), bool)


OPERATIONS = ["intersection", "union", "difference", "symmetric-difference"]


@pytest.mark.parametrize("number", [2, 3, 7, 64])
def test_against_numpy(number: int, tmp_path: Path) -> None:
    stores, masks = make_stores(tmp_path, number, seed=number)
    least = sorted({1, 2, number // 2 + 1, number})
    for operation in [*OPERATIONS, *(f"at-least={k}" for k in least)]:
        notes: list[str] = []
        out = tmp_path / f"{operation}.zarr"
        made = ckdiff.combine(operation, stores, out, observer=Observer(note=notes.append))
        made.check()
        assert made.path == out
        assert [t.name for t in made.tensors] == [t.name for t in stores[0].tensors]
        assert made.rules == made.masks == ("exact",)
        for tensor in made.tensors:
            wanted = expected(operation, [mask[tensor.name] for mask in masks])
            assert np.array_equal(made.mask(tensor.name), wanted)
            assert tensor.changed["exact"] == np.count_nonzero(wanted)
            assert tensor.base_hash == stores[0].tensors[made.table.find(tensor.name)].base_hash
            assert len(tensor.base_hash) == 32
            assert tensor.tuned_hash == ""
        (note,) = notes
        assert note == (
            "warning: 2 tensors are not in all stores with one shape and are left out: "
            "a.first, layers.1.b"
        )


def test_provenance(tmp_path: Path) -> None:
    stores, _ = make_stores(tmp_path, 3)
    made = ckdiff.combine("at-least=02", [store.path for store in stores], tmp_path / "c.zarr")
    assert made.manifest["made_by"] == {
        "operation": "at-least=2",
        "rule": "exact",
        "stores": [
            {"label": f"run{i}.zarr", "digest": store.manifest_digest()}
            for i, store in enumerate(stores)
        ],
        "left_out": [
            {"name": "a.first", "reason": "missing", "stores": [0]},
            {"name": "layers.1.b", "reason": "missing", "stores": [0]},
        ],
    }
    assert not {"base", "tuned", "selection"} & made.manifest.keys()
    assert str(tmp_path).encode() not in b"".join(tree(made.path).values())
    # what is made can be combined and compared again
    again = ckdiff.combine("difference", [made, stores[0]], tmp_path / "d.zarr")
    found = ckdiff.overlap([made, again, stores[1]], by="model")
    assert found.counts[0, 1] == again.manifest["changed"]["exact"]
    assert not found.other_base


def big(folder: Path) -> list[ckdiff.MaskStore]:
    """Three stores with bits in three chunks; the layout of the last is another one."""
    shared = {"a": (1000, 500), "b": (CHUNK + 12_345, CHUNK // 7), "c": (CHUNK - 77, 9_000_000)}
    like = first_bits(folder / "like.zarr", shared)
    more = first_bits(folder / "more.zarr", {"a.0": (513, 100), **shared, "z": (9, 1)})
    return [
        ckdiff.random_mask(like, folder / "one.zarr", seed=1),
        ckdiff.random_mask(like, folder / "two.zarr", seed=2),
        ckdiff.random_mask(more, folder / "three.zarr", seed=3),
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[ckdiff.MaskStore]:
    return big(tmp_path_factory.mktemp("large"))


def bitwise(operation: str, a: Any, b: Any, c: Any) -> npt.NDArray[np.uint8]:
    found = {
        "intersection": lambda: a & b & c,
        "union": lambda: a | b | c,
        "difference": lambda: a & ~(b | c),
        "symmetric-difference": lambda: a ^ b ^ c,
        "at-least=2": lambda: (a & b) | (a & c) | (b & c),
    }
    return np.asarray(found[operation](), np.uint8)


@pytest.mark.parametrize("operation", [*OPERATIONS, "at-least=2"])
def test_across_chunks(operation: str, large: list[ckdiff.MaskStore], tmp_path: Path) -> None:
    made = ckdiff.combine(operation, large, tmp_path / "out.zarr")
    assert made.manifest["layout"]["addresses"] > 2 * CHUNK
    for name in ("a", "b", "c"):
        wanted = bitwise(operation, *(store.packed(name) for store in large))
        assert np.array_equal(made.packed(name), wanted)
    made.check()


def test_workers_do_not_matter(large: list[ckdiff.MaskStore], tmp_path: Path) -> None:
    trees = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers) / "out.zarr"
        out.parent.mkdir()
        ckdiff.combine("union", large, out, workers=workers)
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
def test_a_run_that_failed_is_resumed(
    error: BaseException,
    large: list[ckdiff.MaskStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(Combination, "make", fails_after(2, Combination, error))
        with pytest.raises((RuntimeError, Interrupted)) as caught:
            ckdiff.combine("union", large, out, workers=1)
    if isinstance(caught.value, Interrupted):
        assert caught.value.hint == "the same command resumes"
    assert not out.exists()
    with pytest.raises(StoreIncomplete):
        ckdiff.open_store(out)
    notes: list[str] = []
    seen: list[ckdiff.Progress] = []
    observer = Observer(note=notes.append, progress=seen.append)
    ckdiff.combine("union", large, out, workers=2, observer=observer)
    assert notes[-1] == "resuming: 2 of 3 chunks were done already"
    assert 0 < seen[0].resumed < seen[-1].done == seen[-1].total
    fresh = tmp_path / "fresh.zarr"
    ckdiff.combine("union", large, fresh)
    assert tree(out) == tree(fresh)
    assert sorted(os.listdir(tmp_path)) == ["fresh.zarr", "out.zarr"]


def test_another_run_in_its_place_starts_anew(
    large: list[ckdiff.MaskStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(Combination, "make", fails_after(1, Combination, RuntimeError()))
        with pytest.raises(RuntimeError):
            ckdiff.combine("union", large, out, workers=1)
    notes: list[str] = []
    made = ckdiff.combine("intersection", large, out, observer=Observer(note=notes.append))
    assert "starting again" in notes[-1]
    made.check()


def test_kill_9(large: list[ckdiff.MaskStore], tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    paths = [str(store.path) for store in large]
    killed = stopped(signal.SIGKILL, "combine", "difference", *paths, "-o", str(out))
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [out.name + SUFFIX]
    notes: list[str] = []
    made = ckdiff.combine("difference", large, out, observer=Observer(note=notes.append))
    assert "resuming: 1 of 3" in notes[-1]
    fresh = ckdiff.combine("difference", large, tmp_path / "fresh.zarr")
    assert tree(made.path) == tree(fresh.path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores, _ = make_stores(tmp_path, 2)
    out = tmp_path / "out.zarr"

    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(objects, "write_all", full)
        with pytest.raises(StoreError, match="No space left") as caught:
            ckdiff.combine("union", stores, out)
    assert caught.value.hint == "free some space; the same command then resumes"
    assert not out.exists()
    ckdiff.combine("union", stores, out).check()


def test_overwriting(tmp_path: Path) -> None:
    stores, _ = make_stores(tmp_path, 2)
    out = tmp_path / "out.zarr"
    first = ckdiff.combine("union", stores, out)
    with pytest.raises(StoreExists, match="exists"):
        ckdiff.combine("intersection", stores, out)
    second = ckdiff.combine("intersection", stores, out, overwrite=True)
    assert second.manifest_digest() != first.manifest_digest()
    second.check()


def test_outputs_that_would_harm_an_input(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    stores, _ = make_stores(tmp_path / "runs", 2)
    before = [tree(store.path) for store in stores]
    (tmp_path / "link").symlink_to(stores[1].path)
    cases: Mapping[Path, str] = {
        stores[1].path: "would replace the input",
        tmp_path / "link": "would replace the input",
        stores[0].path / "masks" / "new.zarr": "lies inside the input",
        tmp_path / "runs": "would replace the input",
    }
    for out, problem in cases.items():
        with pytest.raises(StoreError, match=problem):
            ckdiff.combine("union", stores, out, overwrite=True)
    assert [tree(store.path) for store in stores] == before


def test_other_bases_are_said_and_not_recorded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = random_base(rng, {"a": ("BF16", (100,)), "b": ("BF16", (200,))})
    other = dict(base) | random_base(rng, {"b": ("BF16", (200,))})
    masks = {name: flags(rng, shape, 0.3) for name, (_, shape, _) in base.items()}
    one = make_store(tmp_path / "one.zarr", base, masks)
    two = make_store(tmp_path / "two.zarr", other, masks)
    notes: list[str] = []
    made = ckdiff.combine("union", [one, two], tmp_path / "out.zarr",
                          observer=Observer(note=notes.append))  # fmt: skip
    assert notes == [
        "warning: the stores have different bases: 1 of 2 shared tensors differ in content"
    ]
    assert [t.base_hash for t in made.tensors] == [one.tensors[0].base_hash, ""]
    made.check()
    found = ckdiff.overlap([made, one])
    assert (found.other_base, found.unknown_base) == ([], ["b"])
    # what is unknown on both sides is not known to be the same
    again = ckdiff.combine("union", [made, made], tmp_path / "again.zarr",
                           observer=Observer(note=notes.append))  # fmt: skip
    assert [t.base_hash for t in again.tensors] == [one.tensors[0].base_hash, ""]
    assert len(notes) == 2


def test_rules(tmp_path: Path) -> None:
    first = {"w": (1000, 10)}
    exact = first_bits(tmp_path / "exact.zarr", first)
    ulp = first_bits(tmp_path / "ulp.zarr", first, rule="ulp=1")
    more = first_bits(tmp_path / "more.zarr", {"w": (1000, 50)}, rule="ulp=1")
    made = ckdiff.combine("difference", [more, ulp], tmp_path / "out.zarr")
    assert made.masks == ("ulp=1",)
    assert made.mask("w").nonzero()[0].tolist() == list(range(10, 50))
    with pytest.raises(UsageError, match="different rules"):
        ckdiff.combine("union", [exact, ulp], tmp_path / "no.zarr")
    with pytest.raises(UsageError, match="no mask for the rule ulp=1"):
        ckdiff.combine("union", [exact, ulp], tmp_path / "no.zarr", rule="ulp=1")


def test_bad_arguments(tmp_path: Path) -> None:
    one = first_bits(tmp_path / "one.zarr", {"w": (1000, 10)})
    alien = first_bits(tmp_path / "alien.zarr", {"v": (1000, 10)})
    out = tmp_path / "out.zarr"
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ("xor", [one, one], UsageError, "no operation 'xor'"),
        ("at-least", [one, one], UsageError, "no operation"),
        ("at-least=-1", [one, one], UsageError, "no operation"),
        ("at-least=0", [one, one], UsageError, "at-least=0 makes no sense with 2 stores"),
        ("at-least=3", [one, one], UsageError, "at-least=3 makes no sense with 2 stores"),
        (3, [one, one], UsageError, "must be text"),
        ("union", [one], UsageError, "not 1"),
        ("union", [], UsageError, "not 0"),
        ("union", one, UsageError, "a list of stores"),
        ("union", [one] * 65, UsageError, "not 65"),
        ("union", [one, alien], PairingError, "no tensor in common"),
        ("union", [one, tmp_path / "none"], StoreIncomplete, "no store"),
    ]
    for operation, stores, error, message in cases:
        with pytest.raises(error, match=message):
            ckdiff.combine(operation, stores, out)
    with pytest.raises(UsageError, match="workers"):
        ckdiff.combine("union", [one, one], out, workers=0)
    with pytest.raises(UsageError, match="overwrite"):
        ckdiff.combine("union", [one, one], out, overwrite="no")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no directory"):
        ckdiff.combine("union", [one, one], tmp_path / "no" / "out.zarr")
    assert sorted(os.listdir(tmp_path)) == ["alien.zarr", "one.zarr"]


def test_damaged_inputs(tmp_path: Path) -> None:
    one = first_bits(tmp_path / "one.zarr", {"w": (1_000_000, 1000)})
    two = first_bits(tmp_path / "two.zarr", {"w": (1_000_000, 5000)})
    path = two.path / "masks" / "exact" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"two\.zarr"):
        ckdiff.combine("union", [one, two], tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("elements", [1, 7, 8, 513, 70_000])
def test_padding_bits_of_a_strange_store_are_not_counted(elements: int, tmp_path: Path) -> None:
    tensors = {"a": (512, 3), "b": (elements, 1), "c": (1024, 0)}
    sound = first_bits(tmp_path / "sound.zarr", tensors)
    strange = first_bits(tmp_path / "strange.zarr", {**tensors, "a": (511, 3)}, padding=True)
    other = first_bits(tmp_path / "other.zarr", {**tensors, "a": (511, 3)})
    with pytest.raises(StoreCorrupt, match="padding bits that are set"):
        ckdiff.combine("union", [strange, other], tmp_path / "out.zarr")
    ckdiff.combine("union", [sound, sound], tmp_path / "fine.zarr").check()


def test_stores_without_elements(tmp_path: Path) -> None:
    empty = first_bits(tmp_path / "empty.zarr", {"a": (0, 0), "b": (0, 0)})
    made = ckdiff.combine("union", [empty, empty], tmp_path / "out.zarr")
    assert made.check() > 0
    assert made.manifest["changed"] == {"exact": 0}
