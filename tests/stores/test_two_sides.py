"""Stores of tensors whose sides differ in dtype or rows, and what else needs format 2."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_stores import make_store, random_base
from two_sides import TIED, UNPAIRED, Pair, some_pairs, two_sided

import ckdiff
from ckdiff.cli import show_text
from ckdiff.dtypes import DTYPES, common
from ckdiff.errors import StoreCorrupt
from ckdiff.layout import Layout
from ckdiff.stores.manifest import seal
from ckdiff.stores.objects import file_digest
from ckdiff.stores.recognising import foreign, is_store
from ckdiff.stores.sealed import dump_json
from ckdiff.stores.table import MaskTable, content_of, hash_of_rows, is_content_hash
from ckdiff.stores.tablefile import read_table

HEX = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    two_sided(folder / "run.zarr", some_pairs(1), unpaired=UNPAIRED, tied=TIED)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run.zarr", tmp_path / "run.zarr"))


@pytest.fixture
def store(made: Path) -> ckdiff.MaskStore:
    return ckdiff.open_store(made / "run.zarr")


def change(
    root: Path,
    in_table: Callable[[dict[str, Any]], object] = lambda table: None,
    in_manifest: Callable[[dict[str, Any]], object] = lambda manifest: None,
) -> None:
    """Change a store's JSON, and give everything the digest that it has."""
    table = json.loads((root / "tensors.json").read_bytes())
    in_table(table)
    (root / "tensors.json").write_bytes(dump_json(table))
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["digest"]
    for key in manifest["objects"]:
        manifest["objects"][key] = [(root / key).stat().st_size, file_digest(root / key)]
    in_manifest(manifest)
    (root / "manifest.json").write_bytes(seal(manifest))


def older(root: Path) -> None:
    """Say that a store is of format 1, in its manifest and for Zarr."""
    top = json.loads((root / "zarr.json").read_bytes())
    top["attributes"]["ckdiff"]["format_version"] = 1
    (root / "zarr.json").write_bytes(dump_json(top))
    change(root, in_manifest=lambda manifest: manifest.update(format_version=1))


# what they say


def test_masks_and_records(store: ckdiff.MaskStore) -> None:
    assert ckdiff.check_store(store)["ok"]
    pairs = some_pairs(1)
    assert store.manifest["format_version"] == 2
    assert [record.name for record in store.tensors] == sorted(pairs)
    for record in store.tensors:
        pair = pairs[record.name]
        np.testing.assert_array_equal(store.mask(record.name), pair.changed())
        assert (record.dtype, record.tuned_dtype) == (pair.base[0], pair.tuned[0])
        assert record.shape == pair.shape
        longer = pair.base[1] != pair.tuned[1]
        assert record.rows == ((pair.base[1][0], pair.tuned[1][0]) if longer else None)
        assert [record.base_hash, record.tuned_hash] == pair.hashes()
        assert is_content_hash(record.base_hash)
        assert is_content_hash(record.tuned_hash)
    by_name = {record.name: record for record in store.tensors}
    assert "/" not in by_name["embed"].base_hash  # the base has just the rows that were compared
    assert by_name["embed"].tuned_hash.endswith("/20")
    assert by_name["padded"].base_hash == by_name["padded"].tuned_hash + "/20"


def test_what_a_diff_says_of_them_comes_from_the_table(store: ckdiff.MaskStore) -> None:
    assert store.table.retyped_tensors() == [
        {"name": "layers.0.w", "base": "BF16", "tuned": "F32"},
        {"name": "layers.1.w", "base": "F32", "tuned": "BF16"},
        {"name": "lm_head", "base": "F16", "tuned": "F32"},
    ]
    assert store.table.resized_tensors() == [
        {"name": "embed", "base": [20, 30], "tuned": [24, 30], "rows": 20},
        {"name": "lm_head", "base": [24, 30], "tuned": [20, 30], "rows": 20},
        {"name": "padded", "base": [24, 30], "tuned": [20, 30], "rows": 20},
    ]
    assert store.manifest["tied"] == TIED
    assert store.manifest["unpaired"] == UNPAIRED


def test_summaries(store: ckdiff.MaskStore) -> None:
    rows = {row["name"]: row for row in store.summary("tensor")}
    said = {name: (row.get("tuned_dtype"), row.get("rows")) for name, row in rows.items()}
    assert said == {
        "alike": (None, None),
        "embed": (None, [20, 24]),
        "layers.0.w": ("F32", None),
        "layers.1.w": ("BF16", None),
        "lm_head": ("F32", [24, 20]),
        "padded": (None, [24, 20]),
    }
    groups = [row["group"] for row in store.summary("dtype")]
    assert groups == ["BF16", "BF16/F32", "F16/F32", "F32/BF16"]
    lines = list(show_text.csv_lines(store.table, "tensor", store.summary("tensor")))
    assert lines[0].startswith("name,dtype,shape,tuned_dtype,base_rows,tuned_rows,elements,")
    assert lines[5].startswith("lm_head,F16,20x30,F32,24,20,600,")
    assert store.summary("tensor", sort="tuned_rows", top=4)[3]["name"] == "embed"


def test_a_store_without_them_says_nothing_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = random_base(rng, {"a": ("BF16", (10, 3)), "b": ("I8", ())})
    plain = make_store(
        tmp_path / "plain.zarr", base, {n: np.ones(s, bool) for n, (_, s, _) in base.items()}
    )
    assert plain.manifest["format_version"] == 1
    assert "tied" not in plain.manifest
    assert {*json.loads((plain.path / "tensors.json").read_bytes())} == {
        "name", "dtype", "shape", "elements", "start", "changed", "base_hash", "tuned_hash",
        "statistics",
    }  # fmt: skip
    assert "tuned_dtype" not in plain.summary("tensor")[0]
    assert "rows" not in plain.summary("tensor")[0]
    record = plain.tensors[0]
    assert (record.tuned_dtype, record.rows) == ("BF16", None)
    assert plain.table.retyped_tensors() == plain.table.resized_tensors() == []
    table = plain.table
    same = MaskTable(
        table.names, table.dtypes, table.shapes, table.elements, table.starts, table.changed,
        table.base_hashes, table.tuned_hashes, tuned_dtypes=[*table.dtypes],
    )  # fmt: skip
    assert same.tuned_dtypes is None
    assert same == table


@pytest.mark.parametrize("said", ["unpaired", "tied"])
def test_missing_and_tied_tensors_alone_need_the_newer_format(tmp_path: Path, said: str) -> None:
    pairs = {"alike": some_pairs(1)["alike"]}
    unpaired, tied = (UNPAIRED[:2], []) if said == "unpaired" else (UNPAIRED[2:], TIED)
    store = two_sided(tmp_path / "run.zarr", pairs, unpaired=unpaired, tied=tied)
    assert store.manifest["format_version"] == 2
    assert ckdiff.check_store(store)["ok"]
    added = two_sided(tmp_path / "added.zarr", pairs, unpaired=UNPAIRED[2:])
    assert added.manifest["format_version"] == 1


ADAPTER = {"adapter": "lora", "adapter_config": HEX, "adapter_commit": "f" * 40}


def test_a_base_with_an_adapter_needs_the_newer_format(tmp_path: Path) -> None:
    pairs = {"alike": some_pairs(1)["alike"]}
    store = two_sided(tmp_path / "run.zarr", pairs, origin=ADAPTER)
    assert store.manifest["format_version"] == 2
    assert store.manifest["base"].items() >= ADAPTER.items()
    plain = two_sided(tmp_path / "plain.zarr", pairs, origin={"commit": "f" * 40})
    assert plain.manifest["format_version"] == 1


def test_an_option_without_effect_is_not_recorded(tmp_path: Path) -> None:
    pairs = some_pairs(1)
    for name, wanted in (("alike", False), ("layers.0.w", False), ("embed", True)):
        store = two_sided(tmp_path / f"{name}.zarr", {name: pairs[name]})
        assert ("common_rows" in store.manifest["selection"]) == wanted


# what they may not say


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tuned_dtype", ["BF16"] * 5, "not a column of 6 values"),
        ("tuned_dtype", ["BF16"] * 5 + [1], "another type than str"),
        ("tuned_dtype", ["BF16", "BF16", "BF16", "F32", "F16", "BF16"], "repeats dtype"),
        ("tuned_dtype", ["BF16", "BF16", "I16", "BF16", "F32", "BF16"], "has 'I16' where values"),
        ("tuned_dtype", ["BF16", "BF16", "F8_E8M0", "BF16", "F32", "BF16"], "has 'F8_E8M0'"),
        ("tuned_dtype", ["BF16", "BF16", "Q9", "BF16", "F32", "BF16"], "has 'Q9'"),
        ("tuned_dtype", {}, "not a column"),
        ("tuned_dtype", None, "has two content hashes"),
        ("resized", None, "not a list of lists"),
        ("resized", [1, 20, 24], "not a list of lists"),
        ("resized", [[1, 20]], "something else than a position"),
        ("resized", [[1, 20, 24.0]], "else than whole numbers"),
        ("resized", [[True, 20, 24]], "else than whole numbers"),
        ("resized", [[6, 20, 24]], "not there"),
        ("resized", [[-1, 20, 24]], "not there"),
        ("resized", [[4, 24, 20], [1, 20, 24], [5, 24, 20]], "not in order"),
        ("resized", [[1, 20, 24], [1, 20, 24], [5, 24, 20]], "not in order"),
        ("resized", [[1, 20, 20], [4, 24, 20], [5, 24, 20]], "no part"),
        ("resized", [[1, 20, 19], [4, 24, 20], [5, 24, 20]], "no part"),
        ("resized", [[1, -1, 24], [4, 24, 20], [5, 24, 20]], "no part"),
        ("resized", [[1, 21, 24], [4, 24, 20], [5, 24, 20]], "that both sides have"),
        ("resized", [[1, 20, 1 << 60], [4, 24, 20], [5, 24, 20]], "more elements than can be"),
        ("resized", [[1, 24, 20], [4, 24, 20], [5, 24, 20]], "does not cover the rows"),
        ("resized", [[1, 20, 24], [4, 24, 20]], "a content hash cannot be"),
        ("resized", [], "a content hash cannot be"),
    ],
)  # fmt: skip
def test_table_value(root: Path, key: str, value: Any, words: str) -> None:
    change(root, lambda table: table.update({key: value}))
    with pytest.raises(StoreCorrupt, match=words):
        ckdiff.open_store(root)


@pytest.mark.parametrize(
    ("side", "at", "text", "words"),
    [
        ("base_hash", 4, HEX, "does not cover"),
        ("base_hash", 4, HEX + "/21", "does not cover"),
        ("base_hash", 4, HEX + "/020", "does not cover"),
        ("base_hash", 4, "", "does not cover"),
        ("base_hash", 4, "X" * 32 + "/20", "a content hash is none"),
        ("base_hash", 1, HEX + "/20", "does not cover"),
        ("base_hash", 0, HEX + "/40", "cannot be"),
        ("tuned_hash", 5, HEX, "two content hashes"),
        ("tuned_hash", 0, HEX + "/0", "cannot be"),
    ],
)  # fmt: skip
def test_hash_of_other_rows(root: Path, side: str, at: int, text: str, words: str) -> None:
    change(root, lambda table: table[side].__setitem__(at, text))
    with pytest.raises(StoreCorrupt, match=words):
        ckdiff.open_store(root)


def test_a_tensor_of_two_dtypes_was_read(root: Path) -> None:
    place = f"sha256:{HEX * 2}@8"

    def unread(table: dict[str, Any]) -> None:
        table["base_hash"][3] = table["tuned_hash"][3] = place

    change(root, unread)
    with pytest.raises(StoreCorrupt, match="was not read for being equal"):
        ckdiff.open_store(root)


GLOBS: dict[str, Any] = {"include": [], "exclude": [], "rename": []}
BASE: dict[str, Any] = {"label": "base", "files": []}
HEAD = UNPAIRED[2]
GONE = {"name": "gone", "reason": "missing"}
HALF = UNPAIRED[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tied", None, "tied is not a list"),
        ("tied", [1], "tied is not an object"),
        ("tied", [{"name": "head", "same_as": "alike"}], "tied lacks side"),
        ("tied", [{"name": "head", "same_as": "alike", "side": "base"}], "has not alone"),
        ("tied", [{"name": "alike", "same_as": "head", "side": "tuned"}], "has not alone"),
        ("tied", [{"name": "gone", "same_as": "head", "side": "tuned"}], "has not alone"),
        ("tied", [{"name": "head", "same_as": "head", "side": "tuned"}], "tied to itself"),
        ("tied", [{"name": "head", "same_as": 1, "side": "tuned"}], "not text"),
        ("tied", [{"name": "head", "same_as": "alike", "side": "both"}], "cannot be 'both'"),
        ("tied", [*TIED, *TIED], "one tensor twice"),
        ("unpaired", [GONE | {"side": "here"}, HEAD], "cannot be 'here'"),
        ("unpaired", [GONE | {"x": 1}, HEAD], "unknown key 'x'"),
        ("unpaired", [HALF | {"side": "base"}, HEAD], "there and missing"),
        ("unpaired", [HALF | {"side": "both"}, HEAD], "there and missing"),
        ("unpaired", [HALF | {"tuned_dtype": "BF16", "tuned_shape": [3]}, HEAD], "nowhere"),
        ("unpaired", [HALF | {"base_dtype": "Q9"}, HEAD], "unknown dtype"),
        ("unpaired", [GONE | {"base_shape": [3]}, HEAD], "unknown key 'base_shape'"),
        ("unpaired", [GONE | {"base_dtype": "BF16"}, HEAD], "lacks base_shape"),
        ("unpaired", [{"name": 1, "reason": "missing"}, HEAD], "not text"),
        ("unpaired", [{"reason": "missing"}, HEAD], "lacks name"),
        ("selection", GLOBS | {"common_rows": False}, "common_rows of selection is not true"),
        ("selection", GLOBS | {"common_rows": 1}, "common_rows of selection is not true"),
        ("selection", GLOBS | {"common_columns": True}, "unknown key 'common_columns'"),
        ("base", BASE | {"adapter": "x"}, "base lacks adapter_config"),
        ("base", BASE | {"adapter_config": HEX}, "base lacks adapter"),
        ("base", BASE | ADAPTER | {"adapter_config": "x"}, "adapter config of base cannot be"),
        ("base", BASE | ADAPTER | {"adapter": 1}, "adapter of base is not text"),
        ("base", BASE | ADAPTER | {"adapter_commit": "/"}, "adapter commit of base cannot be"),
        ("base", BASE | {"adapter_path": "x"}, "unknown key 'adapter_path'"),
        ("base", [], "base is not an object"),
    ],
)  # fmt: skip
def test_manifest_value(root: Path, key: str, value: Any, words: str) -> None:
    change(root, in_manifest=lambda manifest: manifest.update({key: value}))
    with pytest.raises(StoreCorrupt, match=words):
        ckdiff.open_store(root)


@pytest.mark.parametrize("entry", [GONE | {"side": "both"}, HALF | {"side": "tuned"}])
def test_whose_index_names_a_missing_tensor(root: Path, entry: dict[str, Any]) -> None:
    change(root, in_manifest=lambda manifest: manifest.update(unpaired=[entry, HEAD]))
    assert ckdiff.open_store(root).manifest["unpaired"][0] == entry


def test_the_older_format_has_none_of_it(root: Path, tmp_path: Path) -> None:
    older(root)
    with pytest.raises(StoreCorrupt, match="unknown key 'tied'"):
        ckdiff.open_store(root)
    change(root, in_manifest=lambda manifest: manifest.pop("tied"))
    with pytest.raises(StoreCorrupt, match="without a reason"):
        ckdiff.open_store(root)
    change(root, in_manifest=lambda manifest: manifest.update(unpaired=[HEAD]))
    with pytest.raises(StoreCorrupt, match="unknown key 'common_rows'"):
        ckdiff.open_store(root)
    change(root, in_manifest=lambda manifest: manifest["selection"].pop("common_rows"))
    with pytest.raises(StoreCorrupt, match=r"tensors\.json.* unknown key"):
        ckdiff.open_store(root)


def test_the_newer_format_is_not_for_what_the_older_can_say(root: Path) -> None:
    pairs = {"alike": some_pairs(1)["alike"]}
    plain = two_sided(root.with_name("plain.zarr"), pairs).path
    top = json.loads((plain / "zarr.json").read_bytes())
    top["attributes"]["ckdiff"]["format_version"] = 2
    (plain / "zarr.json").write_bytes(dump_json(top))
    change(
        plain,
        lambda table: table.update(tuned_dtype=None, resized=[]),
        lambda manifest: manifest.update(format_version=2, tied=[]),
    )
    with pytest.raises(StoreCorrupt, match="no more than format 1"):
        ckdiff.open_store(plain)


def test_versions_must_agree(root: Path) -> None:
    top = json.loads((root / "zarr.json").read_bytes())
    top["attributes"]["ckdiff"]["format_version"] = 1
    (root / "zarr.json").write_bytes(dump_json(top))
    change(root)
    with pytest.raises(StoreCorrupt, match="not what ckdiff writes"):
        ckdiff.open_store(root)
    change(root, in_manifest=lambda manifest: manifest.update(format_version=3))
    with pytest.raises(StoreCorrupt, match="format 3, but this ckdiff reads only up to 2"):
        ckdiff.open_store(root)


def test_a_store_is_known_as_one(root: Path) -> None:
    assert is_store(root)
    assert foreign(root) is None
    (root / "manifest.json").write_text("{}")  # damaged: the rest says what it is
    assert is_store(root)
    assert foreign(root) is None
    (root / "notes.txt").write_text("")
    assert foreign(root) is not None


# bases


def test_hashes_of_rows_tell_bases_apart(made: Path, tmp_path: Path) -> None:
    """A base of more rows is the same one as far as the masks go."""
    pairs = some_pairs(1)
    dtype, shape, data = pairs["padded"].base
    cut = dtype, (20, 30), data[: 20 * 30 * 2]
    shorter = two_sided(
        tmp_path / "shorter.zarr", pairs | {"padded": Pair(cut, pairs["padded"].tuned)}
    )
    found = ckdiff.overlap([made / "run.zarr", shorter])
    assert (found.other_base, found.unknown_base) == ([], [])
    first = bytes([data[0] ^ 1]) + data[1:]
    other = two_sided(
        tmp_path / "other.zarr",
        pairs | {"padded": Pair((dtype, shape, first), pairs["padded"].tuned)},
    )
    found = ckdiff.overlap([made / "run.zarr", other])
    assert (found.other_base, found.unknown_base) == (["padded"], [])
    last = data[:-1] + bytes([data[-1] ^ 1])  # in a row that nobody compared
    unseen = two_sided(
        tmp_path / "unseen.zarr",
        pairs | {"padded": Pair((dtype, shape, last), pairs["padded"].tuned)},
    )
    found = ckdiff.overlap([made / "run.zarr", unseen])
    assert (found.other_base, found.unknown_base) == ([], [])


def test_other_rows_are_left_out(made: Path, tmp_path: Path) -> None:
    pairs = some_pairs(1)
    dtype, _, data = pairs["padded"].tuned
    fewer = Pair(pairs["padded"].base, (dtype, (19, 30), data[: 19 * 30 * 2]))
    other = two_sided(tmp_path / "fewer.zarr", pairs | {"padded": fewer})
    found = ckdiff.overlap([made / "run.zarr", other])
    assert found.left_out == [
        {"name": "padded", "reason": "reshaped", "shapes": [[20, 30], [19, 30]]}
    ]
    assert (found.other_base, found.unknown_base) == ([], [])


def test_texts_of_hashes() -> None:
    assert hash_of_rows(HEX, 20, 20) == HEX
    assert hash_of_rows(HEX, 20, 24) == f"{HEX}/20"
    assert content_of(f"{HEX}/20") == content_of(HEX) == HEX
    assert is_content_hash(f"{HEX}/20")
    for place in ("", f"sha256:{HEX * 2}@7", f"git:{HEX}01234567@7", f"git:{HEX * 2}@0"):
        assert not is_content_hash(place)
        assert content_of(place) == place


# round trips

FLOATS = [name for name, dtype in DTYPES.items() if dtype.kind == "float"]
COMPARABLE = [(a, b) for a in FLOATS for b in FLOATS if common(a, b)]


@st.composite
def tables(draw: st.DrawFn) -> MaskTable:
    """Tables that a diff may write, of any dtypes and rows."""
    tensors = draw(st.integers(1, 5))
    dtypes, tuned, shapes, resized = [], [], [], {}
    hashes: tuple[list[str], list[str]] = ([], [])
    for i in range(tensors):
        same = draw(st.booleans())
        pair = (
            (name := draw(st.sampled_from([*DTYPES])), name)
            if same
            else draw(st.sampled_from(COMPARABLE))
        )
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        rows = None
        if shape and draw(st.booleans()):
            more = draw(st.integers(1, 1 << 40))
            rows = (
                (shape[0] + more, shape[0]) if draw(st.booleans()) else (shape[0], shape[0] + more)
            )
            resized[i] = rows
        for side, texts in enumerate(hashes):
            texts.append(hash_of_rows(HEX, shape[0], rows[side]) if rows else HEX)
        dtypes.append(pair[0])
        tuned.append(pair[1])
        shapes.append(shape)
    layout = Layout(np.array([int(np.prod(shape)) for shape in shapes], np.int64))
    counts = np.array([draw(st.integers(0, n)) for n in layout.elements.tolist()], np.int64)
    return MaskTable(
        [f"t.{i}" for i in range(tensors)], dtypes, shapes, layout.elements, layout.starts,
        {"exact": counts}, *hashes, tuned_dtypes=tuned, resized=resized,
    )  # fmt: skip


def manifest_of(table: MaskTable) -> dict[str, Any]:
    return {
        "format_version": 2 if table.unlike else 1,
        "tensors": len(table),
        "rules": ["exact"],
        "elements": table.total_elements,
        "changed": {"exact": int(table.changed["exact"].sum())},
        "layout": {"addresses": Layout(table.elements).total},
        "unpaired": [],
    }


@given(tables())
@settings(deadline=None, max_examples=200)
def test_tables_are_read_as_they_are_written(table: MaskTable) -> None:
    manifest = manifest_of(table)
    raw = dump_json(table.to_json(manifest["format_version"]))
    found = read_table(raw, manifest)
    assert found == table
    assert found.tuned_dtypes == table.tuned_dtypes
    assert found.resized == table.resized
    assert [*found] == [*table]
    assert dump_json(found.to_json(manifest["format_version"])) == raw


ODD: list[Any] = [
    None, True, 0, -1, 20, 24, 1 << 62, 1 << 70, 1.0, "", "BF16", "I8", f"{HEX}/20", [], [[]], [0],
    [[0, 1, 2]], [[1, 20, 24]], {}, {"a": 1},
]  # fmt: skip


def mutate(draw: st.DrawFn, document: dict[str, Any], key: str) -> None:
    """Put something odd in the place of a value, or of a part of it."""
    target: Any = document
    while isinstance(target[key], (dict, list)) and target[key] and draw(st.booleans()):
        target = target[key]
        keys = [*target] if isinstance(target, dict) else [*range(len(target))]
        key = draw(st.sampled_from(keys))
    target[key] = copy.deepcopy(draw(st.sampled_from(ODD)))


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_changed_tables_are_refused_or_say_the_same_again(data: st.DataObject) -> None:
    """Whatever is changed, a reader refuses it or would write just what it has read."""
    table = data.draw(tables())
    manifest = manifest_of(table)
    document = json.loads(dump_json(table.to_json(manifest["format_version"])))
    keys = [key for key in ("tuned_dtype", "resized", "base_hash") if key in document]
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(data.draw, document, data.draw(st.sampled_from(keys)))
    raw = dump_json(document)
    try:
        read = read_table(raw, manifest)
    except UnicodeError:
        raise
    except ValueError:
        return
    assert dump_json(read.to_json(manifest["format_version"])) == raw
    for i, (base, tuned) in read.resized.items():
        assert min(base, tuned) == read.shapes[i][0] < max(base, tuned)
    for one in read.retyped_tensors():
        assert common(one["base"], one["tuned"])
