"""Finished stores that lost, changed or swapped some of their bytes.

Zarr by itself reads a missing chunk as zeros: "nothing changed". The numbers of the sections
are rows of the list of faults that the project keeps.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zstandard
from support import write_sparse
from zarr.core.buffer import default_buffer_prototype

import ckdiff
from ckdiff.errors import CkdiffError, StoreCorrupt, StoreError, StoreIncomplete, UsageError
from ckdiff.layout import CHUNK
from ckdiff.outputs.ownership import SUFFIX
from ckdiff.stores import manifest as manifests
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.objects import INNER, OBJECT, ObjectWriter, file_digest
from ckdiff.stores.verified import VerifiedObjects
from ckdiff.stores.zarrview import VerifiedStore

FIRST, SECOND = "masks/exact/c/0", "masks/exact/c/1"
TAIL = 100_000  #: elements of ``w`` in the second chunk


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two chunks and two rules."""
    folder = tmp_path_factory.mktemp("sound")
    elements = CHUNK + TAIL - 512
    tensors = {"a": ("I8", (10, 10), 100), "w": ("I8", (elements,), elements)}
    edits = {"a": {3: b"\1\2"}, "w": {5: b"\2", elements - 1: b"\1"}}
    sides = [
        write_sparse(folder / "base.safetensors", tensors),
        write_sparse(folder / "tuned.safetensors", tensors, edits),
    ]
    out = folder / "run.zarr"
    ckdiff.diff(*sides, out, rules=["exact", "ulp=1"])
    return out


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run.zarr"))


Reader = Callable[[MaskStore], Any]
READERS: dict[str, Reader] = {
    "mask": lambda store: store.mask("w", "exact"),
    "range": lambda store: store.mask("w", "exact", start=CHUNK - 800, stop=CHUNK + 10),
    "packed": lambda store: store.packed("w", "exact"),
    "array": lambda store: store.array("exact")[:],
    "slice": lambda store: store.array("exact")[OBJECT - 8 : OBJECT + 8],
    "dask": lambda store: store.dask("exact").compute(scheduler="threads"),
    "processes": lambda store: pickle.loads(pickle.dumps(store.dask("exact"))).sum().compute(),
    "check": lambda store: store.check(),
}


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def become(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / SECOND).unlink()
        make(root / SECOND)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda root: (root / SECOND).unlink(),
    "emptied": lambda root: os.truncate(root / SECOND, 0),
    "cut": lambda root: os.truncate(root / SECOND, (root / SECOND).stat().st_size - 1),
    "grown": lambda root: (root / SECOND).write_bytes((root / SECOND).read_bytes() + b"\0"),
    "first byte": lambda root: flip(root / SECOND, 0),
    "frame": lambda root: flip(root / SECOND, 20),
    "index": lambda root: flip(root / SECOND, -1000),
    "checksum": lambda root: flip(root / SECOND, -1),
    "swapped": lambda root: swap(root / FIRST, root / SECOND),
    "rule swapped": lambda root: swap(root / SECOND, root / "masks/ulp=1/c/1"),
    "directory": become(Path.mkdir),
    "pipe": become(os.mkfifo),
    "dangling": become(lambda path: path.symlink_to("nowhere")),
    "all gone": lambda root: shutil.rmtree(root / "masks/exact/c"),
}


# 27, 28: a chunk deleted, flipped, cut, grown, swapped


def test_sound_store_is_read(root: Path) -> None:
    store = open_store(root)
    for reader in READERS.values():
        reader(store)
    assert np.flatnonzero(store.mask("w")).tolist() == [5, CHUNK + TAIL - 513]
    flat = np.unpackbits(store.array("exact")[:], bitorder="little")
    assert np.array_equal(flat[store.tensors[1].start :][: CHUNK + TAIL - 512], store.mask("w"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_chunk_under_an_open_store(root: Path, damage: str) -> None:
    """Also where everything was read, and found sound, before."""
    for warm in (False, True):
        store = open_store(root)
        array = store.array("exact")
        if warm:
            READERS["check"](store)
            READERS["mask"](store)
            assert array[:].any()
        saved = root.with_name("saved")
        shutil.copytree(root, saved)
        DAMAGES[damage](root)
        for name, reader in READERS.items():
            with pytest.raises(StoreCorrupt, match=r"/c/[01]") as caught:
                reader(store)
            assert str(root) in str(caught.value), name
        with pytest.raises(StoreCorrupt, match=r"/c/[01]"):
            array[:]
        shutil.rmtree(root)
        saved.rename(root)


@pytest.mark.parametrize("damage", DAMAGES)
def test_store_with_a_damaged_chunk_is_opened(root: Path, damage: str) -> None:
    size = (root / SECOND).stat().st_size
    DAMAGES[damage](root)
    shows = not (root / SECOND).is_file() or (root / SECOND).stat().st_size != size
    if shows:
        with pytest.raises(StoreCorrupt, match=r"masks/.*/c/[01]"):
            open_store(root)
    else:
        store = open_store(root)
        for reader in READERS.values():
            with pytest.raises(StoreCorrupt, match=r"masks/.*/c/[01]"):
                reader(store)
    with pytest.raises(StoreCorrupt, match=r"masks/.*/c/[01]"):
        ckdiff.check_store(root)


def test_what_does_not_touch_the_damage_still_works(root: Path) -> None:
    flip(root / SECOND)
    store = open_store(root)
    assert store.mask("a").sum() == 2
    assert store.mask("w", "exact", start=0, stop=1000).sum() == 1
    assert store.mask("w", "ulp=1").sum() == 1


def test_every_flipped_byte_is_found(root: Path) -> None:
    """In any file of the store, by ``check`` or already when it is opened."""
    step = 0
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        size = path.stat().st_size
        for at in range(step % 7, size, max(1, size // 12)):
            flip(path, at)
            with pytest.raises(StoreCorrupt):
                ckdiff.check_store(root)
            flip(path, at)
            step += 1
    assert ckdiff.check_store(root)["ok"]


def test_stranger_in_the_store(root: Path) -> None:
    (root / "masks/exact/c/2").write_bytes(b"")
    assert open_store(root).mask("a").any()
    with pytest.raises(StoreCorrupt, match="masks/exact/c/2"):
        ckdiff.check_store(root)


def test_chunk_lost_between_verifying_and_reading(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = VerifiedObjects.verify

    def and_lose(self: VerifiedObjects, key: str) -> None:
        verify(self, key)
        if "/c/" in key:
            (root / key).unlink()

    monkeypatch.setattr(VerifiedObjects, "verify", and_lose)
    saved = Path(shutil.copytree(root, root.with_name("saved")))
    store = open_store(root)
    for name in ("mask", "packed", "array", "dask"):
        shutil.copytree(saved, root, dirs_exist_ok=True)
        with pytest.raises(StoreCorrupt, match=r"/c/[01]"):
            READERS[name](store)


def test_verified_store_has_no_way_around(root: Path) -> None:
    store = open_store(root)
    view = store.array("exact").store
    assert isinstance(view, VerifiedStore)
    prototype = default_buffer_prototype()
    assert view.get_sync(SECOND, prototype=prototype) is not None
    (root / SECOND).unlink()
    with pytest.raises(StoreCorrupt, match=SECOND):
        view.get_sync(SECOND, prototype=prototype)
    with pytest.raises(StoreCorrupt, match=SECOND):
        zarr.core.sync.sync(view.get_partial_values(prototype, [(SECOND, None)]))
    with pytest.raises(StoreCorrupt, match="c/99"):
        view.get_sync("masks/exact/c/99", prototype=prototype)
    assert view.with_read_only(True).read_only
    with pytest.raises(StoreError, match="cannot be written"):
        view.with_read_only(False)
    with pytest.raises(ValueError, match="read-only"):
        store.array("exact")[0] = 1


@pytest.mark.parametrize("name", ["zarr.json", "masks/zarr.json", "masks/exact/zarr.json"])
def test_metadata_damaged(root: Path, name: str) -> None:
    flip(root / name, 30)
    store = open_store(root)
    assert store.mask("a").any()  # it needs none
    with pytest.raises(StoreCorrupt, match=name):
        store.check()
    if name == "masks/exact/zarr.json":
        with pytest.raises(StoreCorrupt, match=name):
            store.array("exact")
    (root / name).unlink()
    with pytest.raises(StoreCorrupt, match=name):
        open_store(root)


def test_objects_are_shown_and_cannot_be_changed(root: Path) -> None:
    store = open_store(root)
    assert store.objects[FIRST] == ((root / FIRST).stat().st_size, file_digest(root / FIRST))
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert set(store.objects) == files - {"manifest.json"}
    with pytest.raises(TypeError):
        store.objects[FIRST] = (0, "")  # type: ignore[index]


def test_an_object_is_verified_once_while_its_file_stays_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[str] = []

    def digest(path: Path) -> str:
        digested.append(str(path.relative_to(root)))
        return file_digest(path)

    store = open_store(root)
    monkeypatch.setattr("ckdiff.stores.verified.file_digest", digest)
    for _ in range(2):
        store.mask("w", "exact")
        store.array("exact")[:]  # shares what was found
        store.check()
    assert sorted(digested) == sorted(set(digested))
    assert SECOND in digested
    digested.clear()
    (root / SECOND).touch()
    store.mask("w", "exact")
    assert digested == [SECOND]


def test_what_was_verified_does_not_travel(root: Path) -> None:
    """Another machine may see other files under the same names."""
    verified = VerifiedObjects(root, dict(open_store(root).objects))
    flip(root / SECOND)
    verified._verified[SECOND] = verified.check_size(SECOND)  # sound on this machine, say
    verified.verify(SECOND)
    sent = pickle.loads(pickle.dumps(verified))
    with pytest.raises(StoreCorrupt, match=SECOND):
        sent.verify(SECOND)


# 29: the manifest


def test_manifest_missing(root: Path, tmp_path: Path) -> None:
    (root / "manifest.json").unlink()
    with pytest.raises(StoreIncomplete, match=r"manifest\.json") as caught:
        open_store(root)
    assert caught.value.hint
    partial = tmp_path / f"other.zarr{SUFFIX}"
    (partial / "journal").mkdir(parents=True)
    for path in (partial, tmp_path / "other.zarr"):
        with pytest.raises(StoreIncomplete, match=r"did not finish|stopped or is still running"):
            open_store(path)
    with pytest.raises(StoreIncomplete, match="there is no store"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreIncomplete, match="a file"):
        open_store(tmp_path / "file")


def test_manifest_cut_anywhere(root: Path) -> None:
    path = root / "manifest.json"
    data = path.read_bytes()
    for size in [*range(0, len(data), 53), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(StoreCorrupt, match=r"manifest\.json"):
            open_store(root)


def test_manifest_flipped_anywhere(root: Path) -> None:
    path = root / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        for bit in (0, 5, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(StoreCorrupt):
                open_store(root)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_manifest_is_no_file(root: Path, make: Callable[[Path], object]) -> None:
    """It is neither waited for nor read without end."""
    (root / "manifest.json").unlink()
    make(root / "manifest.json")
    with pytest.raises((StoreCorrupt, StoreIncomplete), match=r"manifest\.json"):
        open_store(root)


@pytest.mark.parametrize("version", [3, 10**30])
def test_manifest_of_a_newer_format(root: Path, version: int) -> None:
    change_manifest(root, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(StoreCorrupt, match="format") as caught:
        open_store(root)
    assert caught.value.hint == "upgrade ckdiff"


@pytest.mark.parametrize("version", ["2", None, 1.5, True])
def test_manifest_whose_version_is_no_number(root: Path, version: object) -> None:
    """No ckdiff writes that, a newer one neither: upgrading would not help."""
    change_manifest(root, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(StoreCorrupt, match=r"manifest\.json is damaged"):
        open_store(root)


@pytest.mark.parametrize("place", [".", "", "/"])
def test_places_that_are_no_store(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((StoreIncomplete, UsageError)):
        open_store(place)


def change_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again, as somebody would who means to deceive."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["digest"]
    change(manifest)
    (root / "manifest.json").write_bytes(manifests.seal(manifest))


def change_table(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "tensors.json"
    table = json.loads(path.read_bytes())
    change(table)
    path.write_text(json.dumps(table))
    renew(root, "tensors.json")


def renew(root: Path, key: str) -> None:
    entry = [(root / key).stat().st_size, file_digest(root / key)]
    change_manifest(root, lambda manifest: manifest["objects"].update({key: entry}))


@pytest.mark.parametrize(
    "change",
    [
        {"objects": []},
        {"objects": None},
        {"objects": {"../run.zarr/tensors.json": [1, "x"]}},
        {"objects": {"/etc/passwd": [1, "x"]}},
        {"objects": {"masks/\0": [1, "x"]}},
        {"objects": {"a": 5}},
        {"objects": {"a": [None, None]}},
        {"objects": {}},
        {"masks": 7},
        {"masks": [["exact"]]},
        {"masks": ["exact", "atol=1"]},
        {"rules": None},
        {"rules": ["exact"]},
        {"layout": []},
        {"layout": {}},
        {"layout": {"addresses": 1 << 80}},
        {"layout": {"addresses": -(1 << 40)}},
        {"layout": {"addresses": 8 * OBJECT}},
        {"layout": {"addresses": float("1e300")}},
    ],
)
def test_hostile_manifest(root: Path, change: dict[str, Any]) -> None:
    change_manifest(root, lambda manifest: manifest.update(change))
    with pytest.raises(StoreCorrupt):
        open_store(root)


@pytest.mark.parametrize(
    "text",
    [
        '{"format":"ckdiff-mask-store","format_version":1,"x":NaN}',
        '{"format":"ckdiff-mask-store","format_version":1,"x":"\\ud800"}',
        '{"format":"ckdiff-mask-store","format_version":1,"x":' + "9" * 5000 + "}",
        '{"format":"ckdiff-mask-store","format_version":1,"x":' + "[" * 10**5 + "]" * 10**5 + "}",
        "[]",
        "null",
        '{"format":"ckdiff-mask-store"}',
        "\ufeff{}",
    ],
)  # fmt: skip
def test_manifest_that_is_hardly_json(root: Path, text: str) -> None:
    (root / "manifest.json").write_text(text)
    with pytest.raises(StoreCorrupt):
        open_store(root)


@pytest.mark.parametrize(
    "change",
    [
        {"elements": [100, 1 << 62]},
        {"elements": [100, 1 << 70]},
        {"elements": [100, -5]},
        {"elements": [101, CHUNK + TAIL - 512]},
        {"elements": ["x", "y"]},
        {"elements": [100]},
        {"start": [0, 0]},
        {"start": [512, 1024]},
        {"start": None},
        {"shape": [[10, 11], [CHUNK + TAIL - 512]]},
        {"shape": [[10, 10], 7]},
        {"shape": [[10, 10], ["x"]]},
        {"shape": [[-10, -10], [CHUNK + TAIL - 512]]},
        {"changed": []},
        {"changed": {"exact": [1, 2]}},
        {"changed": {"exact": [1, 2], "ulp=1": [1, None]}},
        {"name": 5},
        {"name": ["a"]},
        {"dtype": None},
    ],
)
def test_hostile_table(root: Path, change: dict[str, Any]) -> None:
    change_table(root, lambda table: table.update(change))
    with pytest.raises(StoreCorrupt):
        open_store(root)


def test_table_that_is_no_table(root: Path) -> None:
    for text in ("[]", "{}", "null", "nonsense", "[" * 100_000):
        (root / "tensors.json").write_text(text)
        renew(root, "tensors.json")
        with pytest.raises(StoreCorrupt):
            open_store(root)


def test_count_that_disagrees_with_the_mask(root: Path) -> None:
    """With everything else made to fit, so that nothing but the bits can tell."""
    change_table(root, lambda table: table["changed"].update(exact=[2, 4]))
    with pytest.raises(StoreCorrupt, match="does not add up"):
        open_store(root)
    change_manifest(root, lambda manifest: manifest["changed"].update(exact=6))
    store = open_store(root)
    with pytest.raises(StoreCorrupt, match=r"exact mask of w .* disagrees"):
        store.check()


@pytest.mark.parametrize(("byte", "words"), [(OBJECT - 1, "disagrees"), (13, "padding")])
def test_mask_bits_that_were_added(root: Path, byte: int, words: str) -> None:
    """With every digest made to fit: the counts tell."""
    packed = open_store(root).array("exact")[:OBJECT]
    packed[byte] |= 0x80
    writer = ObjectWriter(root / FIRST)
    compress = zstandard.ZstdCompressor(level=1, write_checksum=True).compress
    writer.add([compress(packed[at : at + INNER].tobytes()) for at in range(0, OBJECT, INNER)])
    writer.finish()
    renew(root, FIRST)
    with pytest.raises(StoreCorrupt, match=words):
        ckdiff.check_store(root)


@pytest.mark.parametrize("frame", [b"", b"not zstd", None])
def test_frame_that_does_not_decode(root: Path, frame: bytes | None) -> None:
    """With every digest and checksum made to fit, and a frame that promises a gigabyte."""
    if frame is None:
        frame = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 25))
    writer = ObjectWriter(root / SECOND)
    writer.add([frame] * (-(-TAIL // 8) // INNER + 1))
    writer.finish()
    renew(root, SECOND)
    store = open_store(root)
    with pytest.raises(StoreCorrupt, match=SECOND):
        store.mask("w", "exact")
    with pytest.raises(StoreCorrupt, match=SECOND):
        store.check()


def test_errors_survive_pickling() -> None:
    """They cross process borders when Dask raises them."""
    for error in (StoreCorrupt("what", hint="do"), ckdiff.Interrupted("now", exit_code=143)):
        again = pickle.loads(pickle.dumps(error))
        assert isinstance(again, CkdiffError)
        assert (str(again), again.hint, again.exit_code) == (
            str(error), error.hint, error.exit_code,
        )  # fmt: skip
