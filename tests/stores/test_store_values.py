"""Stores whose digests are right and whose values are not: unkeyed digests prove nothing.

Every value is checked when a store is opened; bits are held against counts by whoever reads them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from derived_stores import first_bits
from mask_stores import make_store, random_base
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

import ckdiff
from ckdiff.errors import CkdiffError, StoreCorrupt
from ckdiff.layout import CHUNK
from ckdiff.naming import natural_key
from ckdiff.stores import maskframes
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.maskstore import open_store
from ckdiff.stores.naturalorder import ascending
from ckdiff.stores.objects import INNER, ObjectWriter, file_digest
from ckdiff.stores.sealed import dump_json, own_files, seal
from ckdiff.stores.summaries import stacks
from ckdiff.stores.table import MaskTable
from ckdiff.stores.zarrview import VerifiedStore

FORMAT_1 = Path(__file__).parents[1] / "data" / "format-1"
SHAPES = {
    "layers.0.w": ("BF16", (10, 13)),
    "layers.1.w": ("BF16", (700,)),
    "layers.2.w": ("I8", (5, 5)),
}
ZARR = "masks/exact/zarr.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, another of the same tensors, and the checkpoints of the first."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(3)
    base = random_base(rng, SHAPES)
    for name in ("one", "two"):
        masks = {n: rng.random(s) < 0.1 for n, (_, s) in SHAPES.items()}
        masks["layers.2.w"][:] = False
        make_store(folder / f"{name}.zarr", base, masks)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "one.zarr", tmp_path / "run.zarr"))


def reseal(root: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Give every file the digest that it has, and change the manifest."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["digest"]
    for key in manifest["objects"]:
        manifest["objects"][key] = [(root / key).stat().st_size, file_digest(root / key)]
    change(manifest)
    (root / "manifest.json").write_bytes(seal(manifest))


def change_json(root: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((root / key).read_bytes())
    change(document)
    (root / key).write_bytes(dump_json(document))
    reseal(root)


# the manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"elements": 855.0}, "elements is not a whole number"),
        ({"tensors": True}, "tensors is not a whole number"),
        ({"tensors": 4}, "not a column of 4 values"),
        ({"elements": 856}, "not as many as the manifest says"),
        ({"changed": {"exact": 0}}, "does not add up"),
        ({"changed": {"exact": -1}}, "changed of exact"),
        ({"changed": {"exact": 1, "ulp=1": 0}}, "unknown key 'ulp=1'"),
        ({"rules": ["exact", "exact"]}, "one rule twice"),
        ({"rules": ["exact", "atol=0.00001"]}, "not a rule in its short spelling"),
        ({"rules": []}, "not counted"),
        ({"masks": ["ulp=1"]}, "not counted"),
        ({"ckdiff_version": "1.0\x1b[31m"}, "ckdiff_version cannot be"),
        ({"ckdiff_version": 1}, "ckdiff_version is not text"),
        ({"layout": {"addresses": 2048, "alignment": 64, "chunk": CHUNK}}, "alignment is not 512"),
        ({"layout": {"addresses": 1 << 70, "alignment": 512, "chunk": CHUNK}}, "addresses"),
        ({"layout": {"addresses": 2048, "alignment": 512, "chunk": float(CHUNK)}}, "chunk is no"),
        ({"unpaired": [{"name": "x", "reason": "lost"}]}, "without a reason"),
        ({"unpaired": [{"name": "x", "reason": ["added"]}]}, "without a reason"),
        ({"base": {"label": "x"}}, "base lacks files"),
        ({"base": {"label": "x", "files": [{"name": "a", "size": -1}]}}, "size in files"),
        ({"base": {"label": "x", "files": [{"name": 1, "size": 1}]}}, "is not text"),
        ({"base": {"label": "x", "files": [], "commit": "\x1b[2J"}}, "commit of base cannot be"),
        ({"selection": {"include": "all", "exclude": [], "rename": []}}, "include of selection"),
        ({"made_by": {"operation": "union"}}, "unknown key 'base'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"format_version": 0}, "is damaged"),
    ],
)  # fmt: skip
def test_manifest_value(root: Path, change: dict[str, Any], words: str) -> None:
    reseal(root, lambda manifest: manifest.update(change))
    with pytest.raises(StoreCorrupt, match=words) as caught:
        open_store(root)
    assert caught.value.one_line().isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda objects: objects.pop("zarr.json"),
        lambda objects: objects.update({"masks/exact/.zarray": objects["zarr.json"]}),
        lambda objects: objects.update({"../one": objects.pop("zarr.json")}),
        lambda objects: objects.update({"masks/exact/c/01": objects.pop("masks/exact/c/0")}),
        lambda objects: objects.update({"zarr.json": [112.0, objects["zarr.json"][1]]}),
        lambda objects: objects.update({"zarr.json": [*objects["zarr.json"], 1]}),
        lambda objects: objects.update({"zarr.json": [112, "A" * 32]}),
        lambda objects: objects.update({"masks/exact/c/0": [1 << 40, "a" * 32]}),
        lambda objects: objects.update({"tensors.json": [1 << 40, "a" * 32]}),
    ],
)
def test_objects_are_those_of_the_layout(root: Path, change: Callable[[Any], object]) -> None:
    reseal(root, lambda manifest: change(manifest["objects"]))
    with pytest.raises(StoreCorrupt, match=r"objects|entry|size|digest"):
        open_store(root)
    with pytest.raises(StoreCorrupt):
        own_files(root)


@pytest.mark.parametrize("kind", ["union", "random", "imported"])
@pytest.mark.parametrize(
    "change",
    [
        {"operation": "x\x1b[0m"}, {"rule": "atol=0.1000"}, {"seed": 1.5}, {"within": "layer"},
        {"like": "x"}, {"stores": [{"label": 1, "digest": "0" * 32}]}, {"files": ["x"]},
        {"left_out": [{"name": "x", "reason": "missing", "stores": [-1]}]},
        {"left_out": [{"name": "x", "reason": "missing", "shapes": [[1]]}]},
        {"polarity": "both"}, {"format": None}, {"operation": ["union"]}, {"x": 1},
    ],
)  # fmt: skip
def test_what_a_derived_store_says(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    root = Path(shutil.copytree(FORMAT_1 / f"{kind}.zarr", tmp_path / "x.zarr"))
    reseal(root)
    open_store(root)
    reseal(root, lambda manifest: manifest["made_by"].update(change))
    with pytest.raises(StoreCorrupt, match="made_by"):
        open_store(root)


def test_what_a_store_owns(root: Path, tmp_path: Path) -> None:
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    (root / "notes.txt").write_text("not the store's")
    for damage in (
        lambda: None,
        lambda: (root / "masks/exact/c/0").write_bytes(b"flipped"),
        lambda: (root / "tensors.json").unlink(),
        lambda: shutil.rmtree(root / "masks"),
    ):
        damage()
        assert own_files(root) == files
    (root / "manifest.json").write_bytes(
        b'{"format":"ckdiff-mask-store","objects":{"notes.txt":1}}'
    )
    for place in (root, tmp_path, tmp_path / "nowhere", root / "manifest.json"):
        with pytest.raises(StoreCorrupt):
            own_files(place)


# the table


def column(name: str, values: list[Any]) -> Callable[[dict[str, Any]], object]:
    return lambda table: table.update({name: values})


@pytest.mark.parametrize(
    "change",
    [
        column("name", ["layers.0.w", "layers.1.w", 7]),
        column("name", ["layers.0.w", "layers.0.w", "layers.2.w"]),
        column("name", ["layers.1.w", "layers.0.w", "layers.2.w"]),
        column("dtype", ["BF16", "BF16", "\x1b[31m"]),
        column("dtype", ["BF16", "BF16", ["I8"]]),
        column("shape", [[10.0, 13], [700], [5, 5]]),
        column("shape", [[10, 13], [700, True], [5, 5]]),
        column("shape", [[-10, -13], [700], [5, 5]]),
        column("shape", [[2**40, 2**40], [700], [5, 5]]),
        lambda table: table.update(
            shape=[[10, 13], [700], [0, 2**62, 4]], elements=[130, 700, 0], start=[0, 512, 1536]
        ),
        column("elements", [130, 700.0, 25]),
        column("elements", [130, 700, True]),
        column("elements", [130, 700, 10**400]),
        column("start", [0, 512, 2048]),
        column("start", [0, 512.0, 1536]),
        column("base_hash", ["0" * 32, "0" * 32, 5]),
        column("base_hash", ["0" * 32, "0" * 32, "G" * 32]),
        column("base_hash", ["0" * 32, "0" * 32, "sha256:" + "0" * 64]),
        column("tuned_hash", ["0" * 32, "0" * 32, "0" * 32]),
        lambda table: table["changed"].update(exact=[1, 1.0, 1]),
        lambda table: table["changed"].update(exact=[131, 0, 0]),
        lambda table: table["changed"].update(exact=[-1, 0, 0]),
        lambda table: table.update(statistics={}),
        lambda table: table.update(statistics=[]),
        lambda table: table.update(extra=[]),
        lambda table: table.pop("statistics"),
    ],
)
def test_table_value(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_json(root, "tensors.json", change)
    with pytest.raises(StoreCorrupt, match="makes no sense") as caught:
        open_store(root)
    assert caught.value.one_line().isprintable()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sum_abs_delta", -1.0), ("sum_abs_delta", 1), ("l2_base", "1"), ("dot", True),
        ("max_abs_delta", []), ("sign_flips", 1.0), ("sign_flips", -1), ("nonfinite", 10**6),
        ("defined", 1), ("defined", False), ("ulp_histogram", None), ("ulp_histogram", [1, 0]),
        ("ulp_histogram", [0.5]), ("ulp_histogram", [10**6]), ("ulp_histogram", [0] * 70 + [1]),
    ],
)  # fmt: skip
def test_statistics_value(tmp_path: Path, key: str, value: Any) -> None:
    root = Path(shutil.copytree(FORMAT_1 / "run.zarr", tmp_path / "run.zarr"))
    change_json(root, "tensors.json", lambda table: table["statistics"][key].__setitem__(0, value))
    with pytest.raises(StoreCorrupt, match="makes no sense"):
        open_store(root)


def test_a_numeric_rule_finds_no_more_than_the_bits(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FORMAT_1 / "run.zarr", tmp_path / "run.zarr"))

    def more(table: dict[str, Any]) -> None:
        table["changed"]["atol=1e-5"][1] = 67  # exact has 66

    change_json(root, "tensors.json", more)
    reseal(root, lambda manifest: manifest["changed"].update({"atol=1e-5": 257 + 67}))
    with pytest.raises(StoreCorrupt, match="more than differs in its bits"):
        open_store(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"dtype":', '"dtype":[],"dtype":', 1),
        lambda text: text.replace('"elements":[130', '"elements":[NaN', 1),
        lambda text: text.replace("layers.0", "layers\\ud800.0", 1),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("{", "[" * 10**5, 1),
    ],
)
def test_table_that_is_hardly_json(root: Path, edit: Callable[[str], str]) -> None:
    path = root / "tensors.json"
    path.write_text(edit(path.read_text()))
    reseal(root)
    with pytest.raises(StoreCorrupt, match="makes no sense"):
        open_store(root)


def test_natural_order_is_seen_without_keys() -> None:
    rng = np.random.default_rng(11)
    alphabet = np.array(list("0019a.~\x01"))
    ordered = 0
    for _ in range(2000):
        names = ["".join(rng.choice(alphabet, rng.integers(0, 6))) for _ in range(3)]
        if rng.random() < 0.7:
            names.sort(key=natural_key)
        keys = list(map(natural_key, names))
        expected = keys == sorted(set(keys))
        assert ascending(names) == expected, names
        ordered += expected
    assert 500 < ordered < 1950
    many = [f"layers.{i // 7}.w{i % 7}" for i in range(40_000)]
    assert ascending(many)
    many[20_000], many[20_001] = many[20_001], many[20_000]
    assert not ascending(many)
    assert not ascending(["é.1", "é.1"])
    assert ascending(["é.2", "é.10", "é" * 300])
    assert ascending([])


# Zarr metadata


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        {"fill_value": 255},
        {"fill_value": False},
        {"data_type": "int8"},
        {"shape": [257]},
        {"codecs": [{"name": "bytes"}]},
        {"zarr_format": 2},
        {"zarr_format": 3.0},
        {"node_type": "group"},
        {"storage_transformers": []},
    ],
)
def test_zarr_metadata_says_what_we_write(root: Path, change: dict[str, Any]) -> None:
    change_json(root, ZARR, lambda document: document.update(change))
    with pytest.raises(StoreCorrupt, match=r"masks/exact/zarr\.json is not what ckdiff writes"):
        open_store(root)


@pytest.mark.parametrize("key", ["zarr.json", "masks/zarr.json"])
def test_groups_say_what_we_write(root: Path, key: str) -> None:
    consolidated = {"kind": "inline", "must_understand": False, "metadata": {}}
    change_json(root, key, lambda document: document.update(consolidated_metadata=consolidated))
    with pytest.raises(StoreCorrupt, match=r"zarr\.json is not what ckdiff writes"):
        open_store(root)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CKDIFF_TEST_BOMB"],)


def test_files_of_the_other_zarr_format_are_not_looked_at(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pickle filter would run code, and its chunks would be other bits."""
    mark = tmp_path / "ran"
    monkeypatch.setenv("CKDIFF_TEST_BOMB", str(mark))
    packed = open_store(root).array()[:]
    v2 = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None,
        "order": "C", "compressor": None, "filters": [{"id": "pickle"}],
    }  # fmt: skip
    folder = root / "masks" / "exact"
    (folder / ".zarray").write_text(json.dumps(v2))
    (folder / ".zattrs").write_text("{}")
    (folder / "0").write_bytes(pickle.dumps(Bomb()))
    assert np.array_equal(open_store(root).array()[:], packed)
    assert np.array_equal(open_store(root).dask().compute(), packed)
    # nor where the other metadata is gone
    (folder / "zarr.json").unlink()
    with pytest.raises(StoreCorrupt, match=r"zarr\.json is missing"):
        open_store(root)
    assert not mark.exists()


def test_the_view_has_nothing_but_objects(root: Path) -> None:
    for stray in (".zgroup", "masks/exact/.zarray", "masks/exact/c/7", "masks/ulp=1/zarr.json"):
        (root / stray).parent.mkdir(exist_ok=True)
        (root / stray).write_text("{}")
    view = open_store(root).array().store
    assert isinstance(view, VerifiedStore)
    prototype = default_buffer_prototype()
    for key in (".zgroup", "masks/exact/.zarray", "masks/ulp=1/zarr.json", "manifest.json", "../x"):
        assert view.get_sync(key) is None
        assert sync(view.get(key, prototype)) is None
        assert not sync(view.exists(key))
    with pytest.raises(StoreCorrupt, match="c/7 is not an object"):
        view.get_sync("masks/exact/c/7")

    async def listed(names: Any) -> list[str]:
        return sorted([name async for name in names])

    objects = sorted(open_store(root).objects)
    assert sync(listed(view.list())) == objects
    assert sync(listed(view.list_prefix("masks/"))) == [k for k in objects if k[:6] == "masks/"]
    assert sync(listed(view.list_dir(""))) == ["masks", "tensors.json", "zarr.json"]
    assert sync(listed(view.list_dir("masks/exact"))) == ["c", "zarr.json"]
    assert sync(view.getsize(ZARR)) == (root / ZARR).stat().st_size
    with pytest.raises(ValueError, match="read-only"):
        sync(view.delete(ZARR))
    assert (root / ZARR).exists()


def test_the_view_of_another_process_opens_the_store_itself(root: Path, made: Path) -> None:
    dasked = open_store(root).dask()
    sent = pickle.dumps(dasked)
    assert len(sent) < 20_000  # no table, no list of objects
    assert np.array_equal(pickle.loads(sent).compute(), dasked.compute())
    shutil.rmtree(root)
    shutil.copytree(made / "two.zarr", root)
    script = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()).compute()"
    done = subprocess.run([sys.executable, "-c", script], input=sent, capture_output=True)
    assert b"is a different store here" in done.stderr


def test_object_that_becomes_something_else_is_not_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(root)
    store.mask("layers.0.w")
    os.rename(root / "masks/exact/c/0", root / "aside")
    os.mkfifo(root / "masks/exact/c/0")
    began = time.monotonic()
    for reader in (lambda: store.mask("layers.0.w"), lambda: store.array()[:], store.check):
        with pytest.raises(StoreCorrupt):
            reader()
    # also where it happens after it was looked at
    monkeypatch.setattr(store._verified, "check_size", lambda key: store._verified._verified[key])
    with pytest.raises(StoreCorrupt, match=r"changed or replaced|damaged"):
        store.mask("layers.0.w")
    assert time.monotonic() - began < 30  # it would be forever


# bits against counts


def put_bits(root: Path, edit: Callable[[Any], object]) -> None:
    """Change the mask, with every digest and checksum made to fit."""
    packed = np.asarray(open_store(root).array()[:])
    whole = np.zeros(INNER, np.uint8)
    whole[: len(packed)] = packed
    edit(whole)
    writer = ObjectWriter(root / "masks/exact/c/0")
    writer.add([zstandard.ZstdCompressor(level=1, write_checksum=True).compress(whole.data)])
    writer.finish()
    reseal(root)


def flip(bit: int) -> Callable[[Any], object]:
    def edit(packed: Any) -> None:
        packed[bit // 8] ^= 1 << bit % 8

    return edit


def swap(one: int, other: int) -> Callable[[Any], object]:
    """Two bits that differ change places: a count of both together stays what it was."""

    def edit(packed: Any) -> None:
        flags = np.unpackbits(packed, bitorder="little")
        first = int(np.flatnonzero(flags[one : one + 100])[0]) + one
        second = int(np.flatnonzero(flags[other : other + 20] == 0)[0]) + other
        flags[first], flags[second] = 0, 1
        packed[:] = np.packbits(flags, bitorder="little")

    return edit


def walkers(root: Path, made: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Whoever reads all bits of a store."""
    sides = made / "one.checkpoints" / "base", made / "one.checkpoints" / "tuned"
    two = made / "two.zarr"
    return {
        "check": lambda: ckdiff.check_store(root),
        "array": lambda: open_store(root).array()[:],
        "dask": lambda: open_store(root).dask().compute(),
        "overlap": lambda: ckdiff.overlap([root, two]),
        "overlap by model": lambda: ckdiff.overlap([two, root], by="model"),
        "union": lambda: ckdiff.combine("union", [root, two], out / "u.zarr"),
        "intersection": lambda: ckdiff.combine("intersection", [two, root], out / "i.zarr"),
        "difference": lambda: ckdiff.combine("difference", [root, two], out / "d.zarr"),
        "random": lambda: ckdiff.random_mask(root, out / "r.zarr", seed=1),
        "export": lambda: ckdiff.export_masks(root, out / "m.npz", to="npz"),
        "delta": lambda: ckdiff.delta(*sides, out / "d.ckdelta", mask=root),
        "graft": lambda: ckdiff.graft(*sides, root, out / "g", rule="exact"),
    }


@pytest.mark.parametrize(
    "edit", [flip(3), flip(512 + 699), flip(1536 + 7), swap(0, 1536), swap(512, 0)]
)
def test_bits_that_the_table_does_not_count(
    root: Path, made: Path, tmp_path: Path, edit: Callable[[Any], object]
) -> None:
    """Also of a tensor that is said to have none, and where the total is right."""
    put_bits(root, edit)
    for name, walk in walkers(root, made, tmp_path).items():
        with pytest.raises(StoreCorrupt, match="disagrees with its count"):
            pytest.fail(f"{name} gives {walk()}")
    refused = 0
    for record in open_store(root).tensors:
        for read in (open_store(root).mask, open_store(root).packed):
            try:
                assert int(np.unpackbits(read(record.name).view(np.uint8)).sum()) >= 0
            except StoreCorrupt:
                refused += 1
    assert refused in (2, 4)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.zarr", "u.zarr.ckdiff-partial",
        "i.zarr.ckdiff-partial", "d.zarr.ckdiff-partial"}  # fmt: skip


@pytest.mark.parametrize("bit", [130, 136, 511, 1536 + 25])
def test_padding_bits(root: Path, made: Path, tmp_path: Path, bit: int) -> None:
    """Refused by whoever could count them; nobody else sees them."""
    put_bits(root, flip(bit))
    sound = open_store(made / "one.zarr")
    for name, walk in walkers(root, made, tmp_path).items():
        if name in ("export", "delta", "graft"):
            continue
        with pytest.raises(StoreCorrupt, match="padding bits"):
            pytest.fail(f"{name} gives {walk()}")
    for record in sound.tensors:
        try:
            found = open_store(root).mask(record.name)
        except StoreCorrupt:
            continue
        assert np.array_equal(found, sound.mask(record.name))


def test_an_inner_chunk_that_is_marked_absent(tmp_path: Path, made: Path) -> None:
    """Zarr would take it for zeros."""
    rng = np.random.default_rng(0)
    base = random_base(rng, {"w": ("I8", (3 * 8 * INNER,))})
    masks = {"w": np.zeros(3 * 8 * INNER, np.bool_)}
    masks["w"][5 :: 8 * INNER] = True
    root = make_store(tmp_path / "run.zarr", base, masks).path
    key = root / "masks/exact/c/0"
    frames = [zstandard.ZstdCompressor(write_checksum=True).compress(
        np.packbits(part, bitorder="little").data) for part in np.split(masks["w"], 3)]  # fmt: skip
    for index in ((0, 1), (0, 1, 2, 2)):  # too few; and one beyond the end
        writer = ObjectWriter(key)
        writer.add([frames[i] for i in index])
        writer.finish()
        reseal(root)
        for reader in (
            lambda: open_store(root).array()[2 * INNER :],
            lambda: open_store(root).dask()[2 * INNER :].sum().compute(),
            lambda: ckdiff.check_store(root),
        ):
            with pytest.raises(StoreCorrupt, match="inner chunk"):
                reader()


@pytest.mark.parametrize(
    "frame",
    [
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(INNER)),
        zstandard.ZstdCompressor(write_checksum=False).compress(bytes(INNER)),
        zstandard.ZstdCompressor(write_checksum=True).compress(bytes(INNER)) + b"more",
        zstandard.ZstdCompressor(write_checksum=True).compress(bytes(INNER)) * 2,
        # a content of 2**60 bytes
        b"\x28\xb5\x2f\xfd\xe4" + (1 << 60).to_bytes(8, "little") + b"\1\0\0" + bytes(4),
        b"\x50\x2a\x4d\x18\1\0\0\0x",
    ],
)  # fmt: skip
def test_frame_that_is_not_one_of_a_mask(
    root: Path, made: Path, tmp_path: Path, frame: bytes
) -> None:
    """Neither a foreign exception nor the memory that it asks for."""
    writer = ObjectWriter(root / "masks/exact/c/0")
    writer.add([frame])
    writer.finish()
    reseal(root)
    readers = walkers(root, made, tmp_path)
    for name in ("check", "array", "dask"):
        with pytest.raises(StoreCorrupt, match="inner chunk"):
            readers[name]()
    with pytest.raises(StoreCorrupt, match="inner chunk"):
        open_store(root).mask("layers.0.w")
    for name in ("overlap", "union", "graft", "delta", "export"):
        with pytest.raises(CkdiffError):
            readers[name]()


def half_frames(bits: bytes) -> bytes:
    return b"".join(zstd_frame(bits[at : at + INNER // 2]) for at in (0, INNER // 2))


def zstd_frame(bits: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True, **options).compress(bits)


@pytest.mark.parametrize(
    "make",
    [
        lambda bits: zstd_frame(bits) + b"\x50\x2a\x4d\x18\x01\0\0\0x",  # a skippable frame behind
        lambda bits: zstd_frame(bits, write_content_size=False),
        half_frames,
        lambda bits: zstd_frame(bits) + zstd_frame(b""),
        lambda bits: zstandard.ZstdCompressor(level=1).compress(bits),
    ],
    ids=["skippable", "no size", "halves", "empty behind", "no checksum"],
)
def test_a_frame_with_the_right_bits_in_another_form(
    root: Path, made: Path, tmp_path: Path, make: Callable[[bytes], bytes]
) -> None:
    """The decoder would take it; but all readers refuse it, or none does."""
    bits = np.zeros(INNER, np.uint8)
    packed = np.asarray(open_store(root).array()[:])
    bits[: len(packed)] = packed[:INNER]
    for frame, wanted in ((zstd_frame(bits.tobytes()), True), (make(bits.tobytes()), False)):
        (tmp_path / str(wanted)).mkdir()
        writer = ObjectWriter(root / "masks/exact/c/0")
        writer.add([frame])
        writer.finish()
        reseal(root)
        for name, reader in walkers(root, made, tmp_path / str(wanted)).items():
            if wanted:
                reader()
                continue
            with pytest.raises(CkdiffError):
                pytest.fail(f"{name} takes it: {reader()}")


def test_frames_of_ours_are_sound_in_both_ways_of_looking() -> None:
    rng = np.random.default_rng(4)
    frames = []
    for density in (0, 1e-3, 0.01, 0.1, 0.5, 0.99, 1):
        bits = np.packbits(rng.random(8 * INNER) < density)
        frames += [MaskEncoder().encode(bits), zstd_frame(bits.tobytes())]
    cut = [frame[:-1] for frame in frames] + [b"", b"\x28", frames[0][:9]]
    for kinds, wanted in ((frames, True), (cut, False), ([*frames, *cut], None)):
        sizes = np.array([len(frame) for frame in kinds])
        buffer = np.frombuffer(b"".join(kinds), np.uint8)
        places = np.cumsum(sizes) - sizes
        found = maskframes.sound(buffer, places, sizes)
        assert (found == maskframes._looked_through(buffer, places, sizes)).all()
        if wanted is None:
            wanted = np.arange(len(kinds)) < len(frames)
        assert (found == wanted).all()


def test_counts_of_a_tensor_that_goes_on_in_other_chunks(tmp_path: Path) -> None:
    """Its ones are added up over chunks, also where a run is resumed."""
    tensors = {"a": (CHUNK - 1024, 7), "b": (CHUNK, 400), "c": (CHUNK, 12)}
    made = [first_bits(tmp_path / f"{name}.zarr", tensors).path for name in ("one", "two")]
    assert ckdiff.combine("union", made, tmp_path / "u.zarr").manifest["changed"]["exact"] == 419
    assert ckdiff.overlap(made).counts[0, 1] == 419
    root = made[1]
    change_json(root, "tensors.json", lambda table: table["changed"].update(exact=[7, 401, 12]))
    reseal(root, lambda manifest: manifest["changed"].update(exact=420))
    for by in ("model", "tensor"):
        with pytest.raises(StoreCorrupt, match=r"mask of b in .*two\.zarr.* disagrees"):
            ckdiff.overlap(made, by=by)
    # twice: what the first run did of chunks is not done again, but must be known to be sound
    for _ in range(2):
        with pytest.raises(StoreCorrupt, match=r"mask of b in .*two\.zarr.* disagrees"):
            ckdiff.combine("union", made, tmp_path / "v.zarr", workers=1)
        assert (tmp_path / "v.zarr.ckdiff-partial" / "journal" / "0").exists()
    with pytest.raises(StoreCorrupt, match="disagrees"):
        open_store(root).packed("b")
    assert open_store(root).packed("c").any()


# memory


MEASURE = """
import sys, threading
import ckdiff
try:
    ckdiff.open_store(sys.argv[1])
    said = "opened"
except ckdiff.CkdiffError as error:
    said = type(error).__name__
values = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(said, int(values["VmHWM"].split()[0]) >> 10)
"""


def opened(root: Path) -> tuple[str, int]:
    """What a process says that opens a store, and the most memory that it had: MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True
    )
    said, peak = done.stdout.split()
    return said, int(peak)


@pytest.mark.parametrize("key", ["manifest.json", "tensors.json", "masks/exact/c/0", "zarr.json"])
def test_file_that_is_only_declared_to_be_large(root: Path, key: str) -> None:
    for size in (500 << 20, 1 << 40):
        os.truncate(root / key, size)
        if key != "manifest.json":
            manifest = json.loads((root / "manifest.json").read_bytes())
            del manifest["digest"]
            manifest["objects"][key] = [size, "0" * 32]
            (root / "manifest.json").write_bytes(seal(manifest))
        said, peak = opened(root)
        assert said == "StoreCorrupt"
        assert peak < 400


@pytest.mark.parametrize("piece", ["[],", "{},", '"ab",', "1000,", "[1],"])
@pytest.mark.parametrize(("key", "size"), [("manifest.json", 60 << 20), ("tensors.json", 15 << 20)])
def test_file_that_would_be_many_times_as_large_in_memory(
    root: Path, key: str, piece: str, size: int
) -> None:
    text = '{"format":"ckdiff-mask-store","format_version":1,"name":['
    (root / key).write_text(text + (piece * (size // len(piece)))[:-1] + "]}")
    if key != "manifest.json":
        reseal(root)
    said, peak = opened(root)
    assert said == "StoreCorrupt"
    assert peak < 400


def test_map_of_layers_that_have_nothing_in_common() -> None:
    names = sorted((f"l.{i}.m{i}.w" for i in range(3000)), key=natural_key)
    zeros = np.zeros(len(names), np.int64)
    shapes: list[tuple[int, ...]] = [(1,)] * len(names)
    table = MaskTable(names, ["I8"] * 3000, shapes, zeros + 1, zeros, {"exact": zeros}, [], [])
    assert stacks(table, "exact") == []
