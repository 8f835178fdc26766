"""The shape of an update: what ``structure`` counts is what numpy counts on whole matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok
from derived_stores import first_bits, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_stores import make_store, random_base
from naive_profile import shape_of
from safetensors.numpy import load_file

import ckdiff
from ckdiff.kernels.profiles import MARGIN
from ckdiff.layout import Layout
from ckdiff.runs import structure as door
from ckdiff.runs.structures import counting, dealing
from ckdiff.runs.structures.result import Ranked, stripes

SHAPES = {
    "a.weight": ("BF16", (300, 70)),
    "b.weight": ("U8", (17, 1030)),
    "c.weight": ("BF16", (5, 3, 4, 2)),
    "d.weight": ("BF16", (2000, 600)),
    "e.weight": ("BF16", (2, 700_001)),
    "f.weight": ("BF16", (1, 1)),
    "g.bias": ("BF16", (70,)),
    "h.scale": ("BF16", ()),
    "i.weight": ("BF16", (0, 12)),
    "j.weight": ("BF16", (300, 1024)),
    "k.weight": ("BF16", (150, 31, 8)),
}


def some_masks(seed: int, density: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    found = {}
    for name, (_, shape) in SHAPES.items():
        mask = rng.random(shape) < density
        if mask.ndim > 1 and mask.shape[0] > 4:
            mask[::3] = False  # stripes
        found[name] = np.asarray(mask)
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ckdiff.MaskStore], list[Any]]:
    root = tmp_path_factory.mktemp("structure")
    base = random_base(np.random.default_rng(1), SHAPES)
    masks = [some_masks(seed, density) for seed, density in ((2, 0.3), (3, 0.01))]
    return [make_store(root / f"{i}.zarr", base, m) for i, m in enumerate(masks)], masks


def top(values: list[int], percent: int) -> float | None:
    some = sorted(values)[::-1][: math.ceil(len(values) * percent / 100)]
    return sum(some) / sum(values) if sum(values) else None


def check(row: dict[str, Any], mask: Any) -> None:
    matrix = mask.reshape(mask.shape[0], -1) if mask.size else np.zeros((0, 12), bool)
    expected = shape_of(matrix)
    assert row["shape"] == list(mask.shape)
    assert row["changed"] == sum(expected.rows)
    assert row["rows_touched"] == sum(count > 0 for count in expected.rows)
    assert row["columns_touched"] == sum(count > 0 for count in expected.columns)
    assert row["blocks16_touched"] == expected.blocks16
    assert row["blocks128_touched"] == expected.blocks128
    assert row["fours"] == expected.fours
    for key, values in (("rows", expected.rows), ("columns", expected.columns)):
        for percent in (1, 10):
            assert row[f"top{percent}_{key}"] == pytest.approx(top(values, percent))


@pytest.mark.parametrize("size", [1 << 25, 1 << 17, 1 << 12])
def test_what_is_counted_is_what_the_masks_have(
    stores: tuple[list[ckdiff.MaskStore], list[Any]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = dealing.pieces
    monkeypatch.setattr(door, "pieces", lambda layout, shapes: cut(layout, shapes, size))
    found = ckdiff.structure(stores[0]).to_dict()
    matrices = [name for name, (_, shape) in SHAPES.items() if len(shape) > 1]
    assert [row["name"] for row in found["rows"]] == matrices * 2
    assert found["not_matrices"] == 2
    for row in found["rows"]:
        check(row, stores[1][row["store"]][row["name"]])


@settings(max_examples=100)
@given(
    shapes=st.lists(
        st.tuples(
            st.integers(0, 3000), st.integers(1, 900) | st.integers(1, 60).map(lambda k: 64 * k)
        ),
        min_size=1,
        max_size=6,
    ),
    size=st.sampled_from([512, 5000, 1 << 17]),
)
def test_pieces_hold_everything_once(shapes: list[tuple[int, int]], size: int) -> None:
    layout = Layout(np.array([rows * width for rows, width in shapes], np.int64))
    found = dealing.pieces(layout, shapes, size)
    seen = np.zeros(layout.total, np.int64)
    for first, stop in found:
        assert first % 512 == 0
        seen[first:stop] += 1
        spans = layout.spans(first, stop)
        columns = (spans.tensors.tolist(), spans.starts.tolist(), spans.elements.tolist())
        for tensor, start, elements in zip(*columns, strict=True):
            rows, width = shapes[tensor]
            assert start % width == 0 == (start + elements) % width
            row, after = start // width, (start + elements) // width
            assert row % 16 == 0
            assert after % 16 == 0 or after == rows
            if row % 128 or (after % 128 and after < rows):  # they share blocks with others
                assert row // 128 == (after - 1) // 128
    assert seen.max(initial=0) <= 1
    for start, elements in zip(layout.starts.tolist(), layout.elements.tolist(), strict=True):
        assert seen[start : start + elements].all()


def test_rows_of_blocks_that_lie_in_several_pieces_are_joined(tmp_path: Path) -> None:
    # so wide that no 128 rows are a piece; all ones of a block but one lie in one piece
    width = 1 << 12
    mask = np.zeros((300, width), bool)
    mask[5, 7] = mask[70, 8] = mask[127, 4000] = mask[128, 200] = mask[299, 201] = True
    layout = Layout(np.array([mask.size], np.int64))
    cut = dealing.pieces(layout, [mask.shape], 1 << 15)
    assert len(cut) > 4
    store = make_store(
        tmp_path / "s.zarr", random_base(np.random.default_rng(1), {"w": ("U8", mask.shape)}),
        {"w": mask},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "pieces", lambda layout, shapes: cut)
        check(ckdiff.structure(store).to_dict()["rows"][0], mask)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 90),
    width=st.integers(1, 1500),
    many=st.sampled_from([1, 5]),
    first=st.sampled_from([0, 512]),
)
def test_rows_are_counted_wherever_windows_cut_them(
    seed: int, rows: int, width: int, many: int, first: int
) -> None:
    rng = np.random.default_rng(seed)
    store = counting._OneStore(width, many)
    for _ in range(2):  # what was counted before is forgotten
        matrix = rng.random((rows, width)) < 0.3
        mask = np.packbits(matrix, bitorder="little")
        counts, at = np.zeros(rows, np.int64), 0
        store.begin(first, counts)
        while at < matrix.size:
            stop = min(at + 512 * int(rng.integers(1, 40)), matrix.size)
            window = rng.integers(0, 256, -(-(stop - at) // 8) + MARGIN, np.uint8)
            window[: -(-(stop - at) // 8)] = mask[at // 8 : -(-stop // 8)]
            store.add(window, first * width + at, first * width + stop)
            at = stop
        expected = shape_of(matrix)
        assert counts.tolist() == expected.rows
        assert store.profile.columns().tolist() == expected.columns
        assert store.profile.finish() == (expected.blocks16, expected.blocks128)


@given(
    st.lists(st.integers(0, 9) | st.integers(0, 70_000), min_size=1, max_size=300),
    st.sampled_from([1, 10]),
)
def test_the_top_of_a_profile_is_that_of_its_sorted_counts(counts: list[int], share: int) -> None:
    for kind in (np.int64, np.uint32):
        found = Ranked(np.array(counts, kind))
        assert (found.total, found.touched) == (sum(counts), sum(count > 0 for count in counts))
        expected = top(counts, share)
        assert math.isnan(found.top_share(share)) if expected is None else (
            found.top_share(share) == expected
        )  # fmt: skip


def test_figures_by_hand() -> None:
    assert Ranked(np.array([0, 0, 12, 0])).gini() == 0.75
    assert Ranked(np.array([3, 3, 3])).gini() == 0
    assert math.isnan(Ranked(np.zeros(3, np.int64)).gini())
    assert Ranked(np.arange(1, 101)).top_share(10) == sum(range(91, 101)) / 5050
    assert Ranked(np.array([1, 2, 1])).top_share(1) == 0.5  # one of three, rounded up


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_gini_is_the_mean_difference_of_pairs(counts: list[int]) -> None:
    found = Ranked(np.array(counts)).gini()
    total = sum(counts)
    if not total:
        assert math.isnan(found)
        return
    apart = sum(abs(a - b) for a in counts for b in counts)
    assert found == pytest.approx(apart / (2 * len(counts) * total))


def test_stripes_share_what_lots_would() -> None:
    one, other = np.zeros(20, np.int64), np.zeros(20, np.int64)
    one[[3, 7]], other[[7, 9]] = 5, 4
    assert stripes(one, other) == 0.5
    assert stripes(one, one) == 1
    flat = np.full(20, 2)
    # all are equal: two of twenty, drawn by lot, are among any two a tenth of the time
    assert stripes(flat, one) == pytest.approx(0.1)
    assert math.isnan(stripes(one, np.zeros(20, np.int64)))


def test_stripes_of_runs_beside_chance(
    stores: tuple[list[ckdiff.MaskStore], list[Any]],
) -> None:
    found = ckdiff.structure(stores[0]).to_dict()["shared"]
    row = next(row for row in found if row["name"] == "d.weight")
    assert (row["a"], row["b"]) == (0, 1)
    assert row["rows_chance"] == row["columns_chance"] == 0.1
    assert 0 < row["rows"] < 0.5
    assert next(row for row in found if row["name"] == "i.weight")["rows"] is None


def test_profiles_lie_beside_the_store(
    stores: tuple[list[ckdiff.MaskStore], list[Any]], tmp_path: Path
) -> None:
    (one, other), masks = stores
    before = tree(one.path)
    out = tmp_path / "profiles.safetensors"
    found = ckdiff.structure([one, other], profiles=out)
    assert found.profiles == str(out)
    assert tree(one.path) == before
    profiles = load_file(out)
    for name in found.names:
        matrices = [mask[name].reshape(len(mask[name]), -1) for mask in masks if mask[name].size]
        if not matrices:
            continue
        for key, axis in (("rows", 1), ("columns", 0)):
            assert profiles[f"{name}#{key}"].tolist() == [m.sum(axis).tolist() for m in matrices]
    with pytest.raises(ckdiff.OutputError, match="exists"):
        ckdiff.structure(one, profiles=out)
    ckdiff.structure(one, profiles=out, overwrite=True)
    foreign = tmp_path / "other.safetensors"
    foreign.write_bytes(b"something else")
    with pytest.raises(ckdiff.OutputError, match="no file of profiles"):
        ckdiff.structure(one, profiles=foreign, overwrite=True)
    assert foreign.read_bytes() == b"something else"
    with pytest.raises(ckdiff.OutputError, match="inside"):
        ckdiff.structure(one, profiles=one.path / "profiles")


def test_a_matrix_with_more_rows_than_memory_has_room_is_refused(tmp_path: Path) -> None:
    from derived_stores import FirstBits

    from ckdiff.stores.building import Derived, Target

    elements = 1 << 26
    derived = Derived(
        ["w"], ["BF16"], [(elements, 1)], Layout(np.array([elements])), ["0" * 32], "exact",
        {"operation": "test"},
    )  # fmt: skip
    store = Target(tmp_path / "s.zarr", overwrite=False, workers=1, observer=None).write(
        derived, FirstBits([5])
    )
    with pytest.raises(ckdiff.BudgetError, match="67,108,864 rows") as caught:
        ckdiff.structure(store)
    assert "--exclude" in str(caught.value)


def test_without_a_matrix_there_is_no_structure(tmp_path: Path) -> None:
    store = first_bits(tmp_path / "s.zarr", {"bias": (100, 3)})
    with pytest.raises(ckdiff.UsageError, match="two dimensions"):
        ckdiff.structure(store)


def test_a_store_that_counts_wrongly_is_noticed(tmp_path: Path) -> None:
    base = random_base(np.random.default_rng(1), {"w": ("BF16", (64, 64))})
    store = make_store(tmp_path / "s.zarr", base, {"w": np.eye(64, dtype=bool)})
    store.table.changed["exact"][0] += 1
    with pytest.raises(ckdiff.StoreCorrupt, match="disagrees with its count"):
        ckdiff.structure(store)


def test_the_command(stores: tuple[list[ckdiff.MaskStore], list[Any]], tmp_path: Path) -> None:
    paths = [str(store.path) for store in stores[0]]
    found = json.loads(ok("structure", paths[0], "--json").stdout)
    assert {"name", "shape", "changed", "rows_touched", "top1_rows", "blocks16_touched"} <= set(
        found["rows"][0]
    )
    text = ok("structure", *paths, "--top", "2").stdout
    assert "the 2 most unequal of 9 matrices" in text
    assert "two runs share" in text
    csv = ok("structure", paths[0], "--csv", "--include", "[ab].*").stdout.splitlines()
    assert len(csv) == 3
    assert csv[1].split(",")[1] == "a.weight"
    assert "give --base and --tuned, or neither" in error("structure", paths[0], "--base", "x")
    assert "one store" in error("structure", *paths, "--base", "x", "--tuned", "y")
