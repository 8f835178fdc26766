"""Stores that were changed on purpose, with every digest made anew: a seeded fuzzer.

Whatever a store says, a reader refuses it with one of our errors, or all readers say the same of
it: the masks have the bits that the array has, as many as are counted, and none is padding.
``CKDIFF_FUZZ=20000`` runs the whole campaign.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zstandard
from derived_stores import tree
from mask_stores import make_base, make_store, random_base
from two_sides import TIED, UNPAIRED, some_pairs, two_sided

import ckdiff
from ckdiff.cli import made, show_text
from ckdiff.errors import CkdiffError
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.objects import INNER, ObjectWriter, file_digest
from ckdiff.stores.sealed import dump_json, seal
from ckdiff.stores.summaries import By

SHAPES = {
    "a.0.w": ("BF16", (10, 13)),
    "a.1.w": ("BF16", (700,)),
    "a.10.w": ("I8", (5, 5)),
    "b": ("BF16", (0, 3)),
}
ESCAPES = "\x1b[31mred\x07"
COUNT = int(os.environ.get("CKDIFF_FUZZ", "300"))  # of each seed


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small stores of each kind, and what they were made from."""
    folder = tmp_path_factory.mktemp("honest")
    rng = np.random.default_rng(5)
    base = random_base(rng, SHAPES)
    masks = [{n: rng.random(s) < 0.2 for n, (_, s) in SHAPES.items()} for _ in range(2)]
    one, two = (
        make_store(folder / f"{name}.zarr", base, mask)
        for name, mask in zip(("one", "two"), masks, strict=True)
    )
    tuned = folder / "one.checkpoints" / "tuned"
    sides = make_base(folder / "base", base), tuned
    rules = ["exact", "atol=1e-3", "ulp=2@bf16"]
    ckdiff.diff(*sides, folder / "diff.zarr", rules=rules, stats=True, exclude=["b"])
    ckdiff.combine("union", [one, two], folder / "union.zarr")
    ckdiff.random_mask(one, folder / "random.zarr", seed=1)
    ckdiff.export_masks(one, folder / "masks.npz", to="npz")
    ckdiff.import_masks(folder / "masks.npz", folder / "import.zarr")
    sides_differ = two_sided(folder / "sides.zarr", some_pairs(1), unpaired=UNPAIRED, tied=TIED)
    ckdiff.combine("union", [sides_differ, sides_differ], folder / "rows.zarr")
    return {path.stem: path for path in folder.glob("*.zarr")} | {
        "base": sides[0],
        "tuned": tuned,
    }


# a store as a document that can be changed anywhere


class Opened:
    """The JSON of a store, and where it is; ``write`` seals it again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = json.loads((root / "manifest.json").read_bytes())
        del self.manifest["digest"]
        self.files: dict[str, Any] = {
            key: json.loads((root / key).read_bytes())
            for key in self.manifest["objects"]
            if key.endswith(".json")
        }
        self.raw: dict[str, bytes] = {}  #: files whose bytes are given
        self.renewed: set[str] = set()  #: objects that were changed

    def write(self) -> None:
        for key, content in self.files.items():
            data = self.raw.get(key)
            if data is None:
                # escaped, as other writers do: a file may then name half a surrogate pair
                data = json.dumps(content, separators=(",", ":")).encode() + b"\n"
            put(self.root / key, data)
            self.renewed.add(key)
        objects = self.manifest.get("objects")
        for key in self.renewed:
            if isinstance(objects, dict) and isinstance(objects.get(key), list):
                objects[key][:2] = [(self.root / key).stat().st_size, file_digest(self.root / key)]
        with contextlib.suppress(ValueError):  # half a surrogate pair: it cannot be sealed
            (self.root / "manifest.json").write_bytes(seal(self.manifest))


Mutation = Callable[[Opened, random.Random], None]

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, -(2**70), 1.0, 0.5, 1e300, "", "x", "exact",
    ESCAPES, "\ud800", "../x", "0" * 32, "Z" * 32, [], {}, [0], [[]], [1, "x"], {"a": 1}, ["exact"],
    "sha256:" + "0" * 64 + "@7", "a" * 5000, "0" * 32 + "/20", "F32", [1, 20, 24], [[0, 40, 41]],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something to change: keys and positions from the top."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield (*path, i)
            yield from places(value[i], (*path, i))


def some_place(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A container of a document and a key in it, each key of the top as likely as any other."""
    key = rng.choice(list(document))
    inner = list(places(document[key], (key,)))
    path = rng.choice([(key,), *inner])
    target = document
    for part in path[:-1]:
        target = target[part]
    return target, path[-1]


def documents(store: Opened) -> list[Any]:
    table = store.files["tensors.json"]
    return [store.manifest, store.manifest, table, table, store.files[some_metadata(store)]]


def some_metadata(store: Opened) -> str:
    return next(key for key in store.files if key.startswith("masks/") and key.count("/") == 2)


def retype(store: Opened, rng: random.Random) -> None:
    target, key = some_place(rng, rng.choice(documents(store)))
    target[key] = copy.deepcopy(rng.choice(ODD))


def nudge(store: Opened, rng: random.Random) -> None:
    """A number that is a little wrong, or of another type."""
    document = rng.choice(documents(store))
    for _ in range(20):
        target, key = some_place(rng, document)
        value = target[key]
        if isinstance(value, int) and not isinstance(value, bool):
            target[key] = rng.choice(
                [value + 1, value - 1, -value, float(value), value * 2, str(value)]
            )
            return
        if isinstance(value, float):
            target[key] = rng.choice([-value, value * 2, 0.0, int(value), None, str(value)])
            return


def drop(store: Opened, rng: random.Random) -> None:
    target, key = some_place(rng, rng.choice(documents(store)))
    del target[key]


def insert(store: Opened, rng: random.Random) -> None:
    target, key = some_place(rng, rng.choice(documents(store)))
    value = copy.deepcopy(rng.choice([*ODD, target[key]]))
    if isinstance(target, dict):
        target[rng.choice(["x", "made_by", "base", "attributes", "exact", "ulp=1", ESCAPES])] = (
            value
        )
    else:
        target.insert(key, value)


def swap(store: Opened, rng: random.Random) -> None:
    """Two values of one column change places: names, hashes, counts."""
    table = store.files["tensors.json"]
    columns = [c for c in [*table.values(), *table["changed"].values()] if isinstance(c, list)]
    column = rng.choice(columns)
    i, j = rng.sample(range(len(column)), 2)
    column[i], column[j] = column[j], column[i]


def copy_name(store: Opened, rng: random.Random) -> None:
    names = store.files["tensors.json"]["name"]
    i, j = rng.sample(range(len(names)), 2)
    names[i] = names[j]


def escape(store: Opened, rng: random.Random) -> None:
    """Control characters at the end of any text."""
    document = rng.choice(documents(store))
    for _ in range(20):
        target, key = some_place(rng, document)
        if isinstance(target[key], str):
            target[key] += rng.choice([ESCAPES, "\n", "\u202e", "\0"])
            return


def recount(store: Opened, rng: random.Random) -> None:
    """A count that is wrong, with the total made to fit."""
    changed = store.files["tensors.json"]["changed"]
    rule = rng.choice(list(changed))
    i, step = rng.randrange(len(changed[rule])), rng.choice([-1, 1, 7])
    changed[rule][i] += step
    store.manifest["changed"][rule] += step


def move_count(store: Opened, rng: random.Random) -> None:
    """Two wrong counts that leave the total as it is."""
    counts = rng.choice(list(store.files["tensors.json"]["changed"].values()))
    i, j = rng.sample(range(len(counts)), 2)
    counts[i] += 1
    counts[j] -= 1


def rule_text(store: Opened, rng: random.Random) -> None:
    """A rule gets another spelling, everywhere."""
    old = rng.choice(store.manifest["rules"])
    new = rng.choice(
        ["atol=0.001", "EXACT", "ulp=02", "x", "", "ulp=1", "exact@f16", "../x", ESCAPES]
    )
    for texts in (store.manifest["rules"], store.manifest["masks"]):
        texts[:] = [new if text == old else text for text in texts]
    for document in (store.manifest, store.files["tensors.json"]):
        document["changed"] = {
            (new if rule == old else rule): counts for rule, counts in document["changed"].items()
        }


def zarr_detail(store: Opened, rng: random.Random) -> None:
    """Zarr metadata by which other bits would be read."""
    document = store.files[rng.choice([key for key in store.files if key.endswith("zarr.json")])]
    length = document.get("shape", [0])[0]
    changes: list[dict[str, Any]] = [
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        {"chunk_key_encoding": {"name": "default"}},
        {"fill_value": 255}, {"fill_value": 0.0}, {"fill_value": False},
        {"data_type": "int8"}, {"data_type": "bool"}, {"data_type": "uint16"},
        {"shape": [length + 1]}, {"shape": [length - 64]}, {"shape": [length * 2]},
        {"shape": [1, length]}, {"shape": [2**62]}, {"shape": []},
        {"codecs": [{"name": "bytes"}]}, {"codecs": []},
        {"zarr_format": 2}, {"zarr_format": 3.0}, {"node_type": "array"}, {"node_type": "group"},
        {"attributes": {}}, {"attributes": {"bit_order": "big"}}, {"dimension_names": None},
        {"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}}},
        {"storage_transformers": [{"name": "x"}]}, {"extra": {"must_understand": False}},
    ]  # fmt: skip
    document.update(rng.choice(changes))
    if "codecs" in document and document["codecs"] and rng.random() < 0.3:
        sharding = document["codecs"][0].get("configuration", {})
        sharding.update(
            rng.choice(
                [
                    {"index_location": "start"},
                    {"chunk_shape": [1 << 15]},
                    {"index_codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
                    {
                        "codecs": [
                            {"name": "bytes"},
                            {"name": "gzip", "configuration": {"level": 1}},
                        ]
                    },
                ]
            )
        )


def twice(store: Opened, rng: random.Random) -> None:
    """A key that is there twice: parsers take the one or the other."""
    key = rng.choice(list(store.files))
    text = dump_json(store.files[key]).decode().strip()
    first = json.loads(text)
    name = rng.choice(list(first))
    store.raw[key] = f"{{{json.dumps(name)}:{json.dumps(rng.choice(ODD))},{text[1:]}".encode()


def hardly_json(store: Opened, rng: random.Random) -> None:
    key = rng.choice(list(store.files))
    raw = dump_json(store.files[key])
    store.raw[key] = rng.choice(
        [
            b"", b"null", b"[]", b"{}", b"[" * 50_000, b"\xff" + raw, b"\xef\xbb\xbf" + raw,
            raw.replace(b"0", b"NaN", 1), raw.replace(b"0", b"1e999", 1), raw + b"x",
            raw.replace(b"0", b"0" * 5000, 1), raw.replace(b"1", b"9" * 5000, 1),
            raw.decode().encode("utf-16"), raw + b"\0" * 100, raw.replace(b":", b" : "),
        ]
    )  # fmt: skip


@cache
def compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=1, write_checksum=True)


def put_bits(store: Opened, key: str, bits: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    whole = np.zeros(-(-len(bits) // INNER) * INNER, np.uint8)
    whole[: len(bits)] = bits
    frames = [compressor().compress(whole[i : i + INNER].data) for i in range(0, len(whole), INNER)]
    put_frames(store, key, frames)


def put_frames(store: Opened, key: str, frames: list[bytes]) -> None:
    writer = ObjectWriter(store.root / key)
    writer.add(frames)
    writer.finish()
    store.renewed.add(key)


def bits(store: Opened, rng: random.Random) -> None:
    """Other bits: in a tensor, in the padding after it, or both; counts are made to fit or not."""
    rule = rng.choice(store.manifest["masks"])
    found = np.array(open_store(store.root).array(rule)[:])
    table = store.files["tensors.json"]
    if rng.random() < 0.7:
        i = rng.choice([k for k, n in enumerate(table["elements"]) if n])
        at = table["start"][i] + rng.randrange(table["elements"][i])
        found[at // 8] ^= 1 << at % 8
        if rng.random() < 0.6:
            step = 1 if found[at // 8] >> at % 8 & 1 else -1
            for counts in (table["changed"][rule], store.manifest["changed"]):
                counts[i if isinstance(counts, list) else rule] += step
    if rng.random() < 0.5:
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    put_bits(store, f"masks/{rule}/c/0", found)


def frames(store: Opened, rng: random.Random) -> None:
    """Objects that other decoders understand otherwise, or not at all."""
    key = f"masks/{rng.choice(store.manifest['masks'])}/c/0"
    put_frames(store, key, rng.choice(strange_frames()))


@cache
def strange_frames() -> list[list[bytes]]:
    zeros = bytes(INNER)
    whole = compressor().compress(zeros)
    plain = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False)
    return [
        [], [b""], [whole, whole], [whole + whole], [whole + b"x"], [whole[:-4]],
        [plain.compress(zeros)], [compressor().compress(zeros + b"\0")],
        [compressor().compress(bytes(1 << 27))], [b"\x50\x2a\x4d\x18\1\0\0\0x" + whole],
        [whole[:6] + b"\xff" * 8 + whole[6:]], [bytes(INNER)],
    ]  # fmt: skip


def rename(store: Opened, rng: random.Random) -> None:
    """An object under another name, there and in the manifest."""
    objects = store.manifest["objects"]
    old = rng.choice(list(objects))
    new = rng.choice([f"{old}x", "x", "../x", f"./{old}", "masks/exact/c/1", "masks/exact/.zarray"])
    with contextlib.suppress(OSError):
        (store.root / old).rename(store.root / new)
    objects[new] = objects.pop(old)
    store.files.pop(old, None)


def stray(store: Opened, rng: random.Random) -> None:
    """Files of the other Zarr format, which nobody may look at."""
    v2 = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None,
        "order": "C", "compressor": None, "filters": [{"id": "pickle"}],
    }  # fmt: skip
    folder = store.root / rng.choice(["", "masks", f"masks/{store.manifest['masks'][0]}"])
    (folder / rng.choice([".zarray", ".zgroup", ".zattrs", ".zmetadata"])).write_text(
        json.dumps(v2)
    )
    if rng.random() < 0.5:
        del store.manifest["objects"][some_metadata(store)]


MUTATIONS: list[Mutation] = [
    retype, retype, retype, retype, retype, retype, nudge, nudge, nudge, nudge, drop, drop, insert,
    insert, swap, swap, copy_name, escape, recount, move_count, rule_text, zarr_detail, zarr_detail,
    twice, hardly_json, bits, frames, rename, stray,
]  # fmt: skip


# readers


def agree(store: MaskStore) -> None:
    """What is read in different ways is the same."""
    table = store.table
    for rule in store.masks:
        flat = np.asarray(store.array(rule)[:])
        ones = 0
        for i, record in enumerate(store.tensors):
            mask = store.mask(record.name, rule)
            assert mask.shape == record.shape
            assert int(mask.sum()) == int(table.changed[rule][i]) == record.changed[rule]
            packed = np.packbits(mask.reshape(-1), bitorder="little")
            assert np.array_equal(packed, store.packed(record.name, rule))
            first = record.start // 8
            assert np.array_equal(packed, flat[first : first + len(packed)])
            ones += record.changed[rule]
        assert int(np.bitwise_count(flat).sum()) == ones == store.manifest["changed"][rule]


def show(store: MaskStore) -> None:
    """Rows for people, CSV and JSON; nothing of them acts on a terminal."""
    for by in get_args(By):
        rows = store.summary(by)
        json.dumps({"rows": rows}, allow_nan=False)
        assert sum(row["elements"] for row in rows) == store.manifest["elements"]
        lines = [*show_text.lines(store, by, rows), *show_text.csv_lines(store.table, by, rows)]
        assert all(line.isprintable() for line in lines)
    if "made_by" in store.manifest:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            made.report(store, as_json=False)
        assert out.getvalue().replace("\n", "").isprintable()


CHEAP: dict[str, Callable[[Path], object]] = {
    "agree": lambda root: agree(open_store(root)),
    "show": lambda root: show(open_store(root)),
    "info": ckdiff.info,
}


def expensive(honest: dict[str, Path], out: Path) -> dict[str, Callable[[Path], object]]:
    sides = honest["base"], honest["tuned"]

    def no_exact(root: Path) -> str:
        return open_store(root).masks[0]

    def against(root: Path) -> Any:
        found = ckdiff.overlap([root, root], rule=no_exact(root), nulls=["tensor"])
        assert found.counts[0, 1] == open_store(root).manifest["changed"][found.rule]
        return found

    def combined(root: Path) -> None:
        rule = no_exact(root)
        store = ckdiff.combine("union", [root, root], out / "c.zarr", rule=rule, overwrite=True)
        assert store.manifest["changed"][rule] == open_store(root).manifest["changed"][rule]

    return {
        "dask": lambda root: open_store(root).dask(no_exact(root)).compute(scheduler="synchronous"),
        "check": ckdiff.check_store,
        "overlap": against,
        "combine": combined,
        "random": lambda root: ckdiff.random_mask(
            root, out / "r.zarr", seed=3, rule=no_exact(root), overwrite=True
        ),
        "export": lambda root: ckdiff.export_masks(
            root, out / "m.npz", to="npz", rule=no_exact(root), overwrite=True
        ),
        "delta": lambda root: ckdiff.delta(
            *sides, out / "d.ckdelta", mask=root, rule=no_exact(root), overwrite=True
        ),
        "graft": lambda root: ckdiff.graft(
            *sides, root, out / "grafted.safetensors", rule=no_exact(root), overwrite=True
        ),
    }


KINDS = ("one", "diff", "union", "random", "import", "sides", "rows")
#: readers that want a mask of the checkpoints of the first kinds
OF_THIS_MODEL = ("delta", "graft")


def put(path: Path, data: bytes) -> None:
    """Write a file unless it is there: the disk is what takes longest here."""
    if not path.is_file() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def restore(source: dict[str, bytes], root: Path) -> None:
    """Make a directory that store again, in little more time than what differs takes."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if str(path.relative_to(root)) not in source:
            path.unlink()
    for name, data in source.items():
        put(root / name, data)


def mutated(source: dict[str, bytes], root: Path, rng: random.Random) -> str:
    """Make a changed copy of a store; gives how."""
    restore(source, root)
    store = Opened(root)
    chosen = [rng.choice(MUTATIONS) for _ in range(rng.choice([1, 1, 1, 2]))]
    for mutation in chosen:
        with contextlib.suppress(
            LookupError, TypeError, AttributeError, ValueError, StopIteration, OSError, CkdiffError
        ):
            mutation(store, rng)  # the second may find nothing to change
    with contextlib.suppress(OSError):  # renamed over each other
        store.write()
    return " ".join(mutation.__name__ for mutation in chosen)


def refused(reader: Callable[[Path], object], root: Path) -> bool:
    said = ""
    try:
        reader(root)
    except CkdiffError as error:
        said = error.one_line()
    assert said.isprintable()
    return bool(said)


def test_the_honest_stores_are_read_by_all(honest: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        for name, reader in (CHEAP | expensive(honest, tmp_path)).items():
            other_model = kind in ("sides", "rows") and name in OF_THIS_MODEL
            assert refused(reader, honest[kind]) == other_model, (kind, name)


@pytest.mark.parametrize("seed", range(6))
def test_changed_stores_are_refused_or_read_alike(
    honest: dict[str, Path], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    roots = {kind: tmp_path / f"{kind}.zarr" for kind in KINDS}
    sources = {kind: tree(honest[kind]) for kind in KINDS}
    read = 0
    for number in range(COUNT):
        kind = rng.choice(KINDS)
        root = roots[kind]
        how = mutated(sources[kind], root, rng)
        try:
            for reader in CHEAP.values():
                read += not refused(reader, root)
            if number % 80 == 0 and (number % 240 == 0 or not refused(open_store, root)):
                for reader in expensive(honest, tmp_path).values():
                    refused(reader, root)
        except Exception as error:
            error.add_note(f"seed {seed}, number {number}: {kind} after {how}")
            raise
    assert read  # some changes are none, or make an honest store
