"""Overlap of stores against numpy: counts, votes, groups, nulls, and stores that differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mask_stores import make_base, make_store, random_base

import ckdiff
from ckdiff import layout
from ckdiff.errors import (
    BudgetError,
    CheckpointError,
    CkdiffError,
    PairingError,
    StoreCorrupt,
    UsageError,
)
from ckdiff.overlaps import overlap as agreement
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.stores import maskstream
from ckdiff.stores.matching import match
from ckdiff.stores.summaries import layer_of, module_of

SHAPES = {
    "model.embed.weight": ("BF16", (300, 70)),
    "model.layers.0.attn.q.weight": ("BF16", (64, 64)),
    "model.layers.0.norm.weight": ("BF16", (37,)),
    "model.layers.1.attn.q.weight": ("BF16", (65, 63)),
    "model.layers.1.mlp.up.weight": ("U8", (129, 40)),
    "model.layers.2.mlp.experts.3.up.weight": ("U8", (9, 8, 7)),
    "scale": ("BF16", ()),
    "nothing": ("U8", (0, 4)),
}
Masks = list[dict[str, npt.NDArray[np.bool_]]]


def random_masks(rng: np.random.Generator, stores: int) -> Masks:
    """Masks that share more than chance, less in some tensors than in others."""
    common = {name: rng.random(shape) < 0.1 for name, (_, shape) in SHAPES.items()}
    return [
        {
            name: (mask & (rng.random(mask.shape) < 0.7))
            | (rng.random(mask.shape) < rng.choice([0.0, 0.02, 0.3]))
            for name, mask in common.items()
        }
        for _ in range(stores)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Masks, Any]:
    """(base checkpoint, stores, their masks, base tensors)."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(7)
    base = random_base(rng, SHAPES)
    masks = random_masks(rng, 5)
    stores = [make_store(folder / f"run{i}.zarr", base, m).path for i, m in enumerate(masks)]
    return make_base(folder / "base", base), stores, masks, base


def groups_of(by: str) -> dict[str, list[str]]:
    """Group -> names of its tensors, in the order in which rows come."""
    names = sorted(SHAPES)
    key = {
        "tensor": lambda name: name,
        "layer": layer_of,
        "module": module_of,
        "dtype": lambda name: SHAPES[name][0],
    }[by]
    return {g: [n for n in names if key(n) == g] for g in dict.fromkeys(map(key, names))}


def flat(masks: Masks, names: list[str]) -> npt.NDArray[np.int64]:
    return np.stack([np.concatenate([m[n].ravel() for n in names]) for m in masks]).astype(np.int64)


@pytest.mark.parametrize("by", ["tensor", "layer", "module", "dtype", "model"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_counts_of_every_grouping(runs: Any, by: Any, count: int) -> None:
    _, stores, masks, _ = runs
    masks = masks[:count]
    found = ckdiff.overlap(stores[:count], by=by, nulls=["tensor", "model"])
    groups = {} if by == "model" else groups_of(by)
    rows = {row["group"]: row for row in found.rows()}
    assert set(rows) == {"model", *groups}
    assert found.groups[0] == "model"
    for group, names in {"model": sorted(SHAPES), **groups}.items():
        bits = flat(masks, names)
        row = rows[group]
        elements = bits.shape[1]
        assert row["elements"] == elements
        assert row["sizes"] == bits.sum(1).tolist()
        assert row["votes"] == np.bincount(bits.sum(0), minlength=count + 1).tolist()
        for pair in row["pairs"]:
            a, b = bits[pair["a"]], bits[pair["b"]]
            both, union = int((a & b).sum()), int((a | b).sum())
            one, other = int(a.sum()), int(b.sum())
            assert (pair["intersection"], pair["union"]) == (both, union)
            assert pair["jaccard"] == (both / union if union else None)
            assert pair["o1"] == (both / one if one else None)
            assert pair["o2"] == (both / other if other else None)
            if 0 < one < elements and 0 < other < elements:
                assert pair["phi"] == pytest.approx(np.corrcoef(a, b)[0, 1])
            expected = sum(
                m[names_].sum() * n[names_].sum() / m[names_].size
                for m, n in [(masks[pair["a"]], masks[pair["b"]])]
                for names_ in names
                if m[names_].size
            )
            assert pair["nulls"]["tensor"]["expected"] == pytest.approx(expected)
            if elements:
                assert pair["nulls"]["model"]["expected"] == pytest.approx(one * other / elements)
            if expected:
                assert pair["lift"] == pytest.approx(both / expected)
    assert np.array_equal(found.jaccard, found.jaccard.T, equal_nan=True)
    sizes = np.diag(found.counts)
    assert np.array_equal(found.counts, flat(masks, sorted(SHAPES)) @ flat(masks, sorted(SHAPES)).T)
    assert np.allclose(found.counts / sizes[:, None] * sizes[:, None], found.counts)


@pytest.mark.parametrize("workers", [1, 3])
def test_tensors_that_go_on_in_other_chunks(
    runs: Any, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, stores, _, _ = runs
    wanted = {"by": "tensor", "nulls": list(NULLS), "base": base}
    whole = ckdiff.overlap(stores, **wanted).rows()
    monkeypatch.setattr(layout, "CHUNK", 4096)
    parts = ckdiff.overlap(stores, **wanted, workers=workers).rows()
    for row, other in zip(parts, whole, strict=True):
        assert row["votes"] == other["votes"]
        for pair, twin in zip(row["pairs"], other["pairs"], strict=True):
            assert pair["intersection"] == twin["intersection"]
            for name in NULLS:
                for key, value in twin["nulls"][name].items():
                    close = value if value is None else pytest.approx(value, rel=1e-9)
                    assert pair["nulls"][name][key] == close, name


def test_results_do_not_depend_on_workers(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, stores, _, _ = runs
    monkeypatch.setattr(layout, "CHUNK", 2048)
    wanted = {"by": "module", "nulls": list(NULLS), "base": base}
    found = [ckdiff.overlap(stores, **wanted, workers=n).rows() for n in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_windows_of_masks_that_begin_anywhere(tmp_path: Path) -> None:
    """Many inner chunks; tensors lie elsewhere in each store; small ones far from each other."""
    rng = np.random.default_rng(1)
    names = [f"part.{i}" for i in range(25)]
    sizes = {name: int(rng.choice([1, 500, 513, 70_000, 600_000])) for name in names}
    filler = {f"{name}.filler": int(rng.choice([600, 530_000])) for name in names}
    base: dict[str, Any] = {
        name: ("U8", (size,), np.zeros(size, np.uint8)) for name, size in (sizes | filler).items()
    }
    masks = [{name: rng.random(base[name][1]) < 0.2 for name in base} for _ in range(3)]
    skips = [list(filler), names[::7], list(filler)[::2]]
    stores = [
        make_store(tmp_path / f"{i}.zarr", base, mask, skip)
        for i, (mask, skip) in enumerate(zip(masks, skips, strict=True))
    ]
    shared = [name for name in names if name not in skips[1]]
    found = ckdiff.overlap(stores, by="tensor")
    for row in found.rows()[1:]:
        bits = flat(masks, [row["group"]])
        assert row["votes"] == np.bincount(bits.sum(0), minlength=4).tolist()
        assert [p["intersection"] for p in row["pairs"]] == [
            int((bits[p["a"]] & bits[p["b"]]).sum()) for p in row["pairs"]
        ]
    assert found.groups[1:] == sorted(shared, key=lambda name: int(name.split(".")[1]))


def test_stores_with_other_tensors_share_what_they_share(runs: Any, tmp_path: Path) -> None:
    _, stores, masks, base = runs
    rng = np.random.default_rng(3)
    more = {**base, "model.extra": ("U8", (5000,), rng.integers(0, 256, 5000, dtype=np.uint8))}
    other = {**masks[0], "model.extra": rng.random(5000) < 0.5}
    gone = "model.layers.0.attn.q.weight"
    odd = make_store(tmp_path / "odd.zarr", more, other, skip=[gone]).path
    told: list[str] = []
    found = ckdiff.overlap([odd, stores[1]], observer=ckdiff.Observer(note=told.append))
    shared = sorted(SHAPES.keys() - {gone})
    bits = flat([masks[0], masks[1]], shared)
    assert np.array_equal(found.counts, bits @ bits.T)
    reasons = {entry["name"]: entry["reason"] for entry in found.left_out}
    assert reasons == {gone: "missing", "model.extra": "missing"}
    assert len(told) == 1
    assert "2 tensors are not in all stores" in told[0]


def test_other_bases_warn_or_are_refused(runs: Any, tmp_path: Path) -> None:
    path, stores, masks, base = runs
    name = "model.layers.1.attn.q.weight"
    dtype, shape, bits = base[name]
    other = make_store(tmp_path / "other.zarr", {**base, name: (dtype, shape, bits ^ 2)}, masks[0])
    told: list[str] = []
    found = ckdiff.overlap([other, stores[0]], observer=ckdiff.Observer(note=told.append))
    assert found.other_base == [name]
    assert "different bases: 1 of 8 shared tensors" in told[0]
    assert np.array_equal(found.counts, np.full((2, 2), found.counts[0, 0]))
    with pytest.raises(PairingError, match="different bases"):
        ckdiff.overlap([other, stores[0]], require_same_base=True)
    with pytest.raises(PairingError, match="one base"):
        ckdiff.overlap([other, stores[0]], nulls=["magnitude"], base=path)


def test_a_base_that_is_not_the_stores_base_is_refused(runs: Any, tmp_path: Path) -> None:
    _, stores, _, base = runs
    name = "model.layers.1.attn.q.weight"
    dtype, shape, bits = base[name]
    wanted = {"nulls": ["magnitude"]}
    close = bits.copy()
    close[-1] ^= 1
    with pytest.raises(CheckpointError, match=f"not the base of these stores: {name}"):
        ckdiff.overlap(
            stores, base=make_base(tmp_path / "1", {**base, name: (dtype, shape, close)}), **wanted
        )
    turned = make_base(tmp_path / "2", {**base, name: (dtype, shape[::-1], bits)})
    with pytest.raises(PairingError, match=f"another dtype or shape for {name}"):
        ckdiff.overlap(stores, base=turned, **wanted)
    rest = make_base(tmp_path / "3", {key: base[key] for key in base if key != name})
    with pytest.raises(PairingError, match=f"has no {name}"):
        ckdiff.overlap(stores, base=rest, **wanted)
    with pytest.raises(UsageError, match="reads the base checkpoint"):
        ckdiff.overlap(stores, **wanted)


def test_magnitude_counts_binades_of_the_base(runs: Any) -> None:
    path, stores, masks, base = runs
    found = ckdiff.overlap(stores, nulls=["magnitude"], base=path, by="tensor")
    for row in found.rows()[1:]:
        dtype, _, bits = base[row["group"]]
        if dtype == "BF16":
            cells = (bits.astype(np.int64) & 0x7FFF) >> 7
            cells = np.where(bits & 0x7FFF, cells + 1, 0).ravel()
        else:
            cells = np.array([int(value).bit_length() for value in bits.ravel()], np.int64)
        held = [mask[row["group"]].ravel() for mask in masks]
        for pair in row["pairs"]:
            one, other = held[pair["a"]], held[pair["b"]]
            mean = sum(
                one[cells == c].sum() * other[cells == c].sum() / (cells == c).sum()
                for c in np.unique(cells)
            )
            assert pair["nulls"]["magnitude"]["expected"] == pytest.approx(mean)


def test_what_cannot_be_compared(runs: Any, tmp_path: Path) -> None:
    _, stores, _, base = runs
    for few in ([], stores[:1]):
        with pytest.raises(UsageError, match="2 to 64 stores"):
            ckdiff.overlap(few)
    with pytest.raises(UsageError, match="list of stores"):
        ckdiff.overlap(stores[0])
    with pytest.raises(UsageError, match="no null 'chance'"):
        ckdiff.overlap(stores, nulls=["chance"])
    with pytest.raises(UsageError, match="cannot group by"):
        ckdiff.overlap(stores, by="shard")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="groups of 5 stores"):
        ckdiff.overlap(stores, by="tensor", memory="97MiB")
    alone = {"alone": ("U8", (9,), np.zeros(9, np.uint8))}
    stranger = make_store(tmp_path / "s.zarr", alone, {"alone": np.ones(9, bool)})
    with pytest.raises(PairingError, match="no tensor in common"):
        ckdiff.overlap([stores[0], stranger])
    folder = tmp_path / "rules.checkpoints"
    ckdiff.diff(
        make_base(folder / "a", base), make_base(folder / "b", base), tmp_path / "r.zarr",
        rules=["ulp=1"],
    )  # fmt: skip
    with pytest.raises(UsageError, match="masks of different rules"):
        ckdiff.overlap([stores[0], tmp_path / "r.zarr"])
    with pytest.raises(UsageError, match="no mask for the rule ulp=1"):
        ckdiff.overlap([stores[0], tmp_path / "r.zarr"], rule="ulp=1")


def test_two_empty_masks_and_a_full_one(tmp_path: Path) -> None:
    base = {"w": ("U8", (40, 30), np.zeros(1200, np.uint8))}
    flags = [np.zeros(1200, bool), np.zeros(1200, bool), np.ones(1200, bool)]
    stores = [make_store(tmp_path / f"{i}.zarr", base, {"w": m}) for i, m in enumerate(flags)]
    row = ckdiff.overlap(stores, nulls=["tensor", "rowcol"]).rows()[0]
    assert row["votes"] == [0, 1200, 0, 0]
    for pair in row["pairs"]:
        assert pair["jaccard"] == (None if (pair["a"], pair["b"]) == (0, 1) else 0)
        for name in ("tensor", "rowcol"):
            assert pair["nulls"][name]["expected"] == 0
            assert pair["nulls"][name]["lift"] is None
            assert pair["nulls"][name]["z"] is None


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 4, 100, -3000, -1])
def test_a_damaged_object_is_never_counted(runs: Any, tmp_path: Path, at: int) -> None:
    _, stores, masks, base = runs
    store = make_store(tmp_path / "d.zarr", base, masks[0])
    damage(store.path / "masks/exact/c/0", at)
    with pytest.raises(StoreCorrupt, match="masks/exact/c/0"):
        ckdiff.overlap([stores[1], store.path])


def test_objects_that_changed_places_are_noticed(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checksum of the object is right: only its digest, or the count, tells."""
    _, stores, masks, base = runs
    store = make_store(tmp_path / "d.zarr", base, masks[0])
    mine = store.path / "masks/exact/c/0"
    opened = ckdiff.open_store(store.path)
    object.__setattr__(opened, "objects", dict(opened.objects))
    theirs = Path(stores[1]) / "masks/exact/c/0"
    mine.write_bytes(theirs.read_bytes())
    key = "masks/exact/c/0"
    opened.objects[key] = mine.stat().st_size, opened.objects[key][1]  # type: ignore[index]
    with pytest.raises(StoreCorrupt, match="digest differs"):
        ckdiff.overlap([stores[2], opened])
    digest = ckdiff.open_store(stores[1]).objects[key][1]
    opened.objects[key] = mine.stat().st_size, digest  # type: ignore[index]
    with pytest.raises(StoreCorrupt, match="disagrees with its count"):
        ckdiff.overlap([stores[2], opened])


def test_the_two_ways_of_counting_are_held_against_each_other() -> None:
    rows = agreement._Rows(
        None,
        ["model"],
        np.array([100]),
        np.array([[10, 4, 12]]),
        np.array([[82, 14, 4]]),
    )
    agreement._self_test(rows)
    for votes in ([81, 14, 4], [83, 12, 5], [81, 16, 3]):
        rows.votes = np.array([votes])
        with pytest.raises(CkdiffError, match="contradict each other"):
            agreement._self_test(rows)


def test_sixty_four_stores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"w": ("U8", (50, 21), np.zeros(1050, np.uint8))}
    flags = [rng.random(1050) < rng.random() for _ in range(4)]
    stores = [make_store(tmp_path / f"{i}.zarr", base, {"w": m}).path for i, m in enumerate(flags)]
    many = [stores[i % 4] for i in range(64)]
    found = ckdiff.overlap(many, by="model")
    bits = np.stack([flags[i % 4] for i in range(64)]).astype(np.int64)
    assert np.array_equal(found.counts, bits @ bits.T)
    assert found.votes[0].tolist() == np.bincount(bits.sum(0), minlength=65).tolist()
    with pytest.raises(UsageError, match="2 to 64"):
        ckdiff.overlap([*many, stores[0]])


@pytest.mark.parametrize("native", [True, False])
def test_frames_known_to_be_empty_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:  # where the library's functions cannot be called directly
        monkeypatch.setattr(maskstream.zstd, "decoder", lambda: SimpleNamespace(function=0))
    size = 3_000_000
    base = {"w": ("U8", (size,), np.zeros(size, np.uint8))}
    flags = np.zeros((2, size), bool)
    flags[:, 1_000_000] = flags[0, 2_900_000] = True
    stores = [make_store(tmp_path / f"{i}.zarr", base, {"w": m}) for i, m in enumerate(flags)]
    with maskstream.MaskWindows(match(stores).sources(), 6) as windows:
        windows._masks[:] = 0xEE  # what was there before must not be left
        windows.load([np.arange(6), np.arange(6)])
        frames = windows._frames[:12, 2]
        assert np.flatnonzero(frames).tolist() == [1, 5, 7], "only what holds a change is decoded"
        for k in range(2):
            held = np.unpackbits(windows._masks[k], bitorder="little", count=size).astype(bool)
            assert np.array_equal(held, flags[k])
    assert ckdiff.overlap(stores).votes[0].tolist() == [size - 2, 1, 1]


def test_pairs_come_in_one_order(runs: Any) -> None:
    _, stores, _, _ = runs
    row = ckdiff.overlap(stores, by="model").rows()[0]
    assert [(p["a"], p["b"]) for p in row["pairs"]] == list(itertools.combinations(range(5), 2))
