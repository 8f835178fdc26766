"""Random masks: exact numbers, the same everywhere, and every mask equally likely."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_support import stopped
from derived_stores import fails_after, first_bits, tree

import ckdiff
from ckdiff.errors import (
    CkdiffError,
    StoreCorrupt,
    StoreError,
    StoreExists,
    StoreIncomplete,
    UsageError,
)
from ckdiff.kernels.abi import DRAW_SCRATCH
from ckdiff.kernels.compiled import c_function
from ckdiff.layout import CHUNK, Layout
from ckdiff.masks.random import RandomMask
from ckdiff.masks.sampling import Population
from ckdiff.options import Observer
from ckdiff.overlaps.nulls import moments as nulls
from ckdiff.stores.table import MaskTable

Words = tuple[int, int, int, int]
TENSORS = {"a": (1000, 100), "b": (7, 3), "c": (513, 0), "d": (70_001, 70_001), "e": (0, 0),
           "f": (200_000, 1), "g": (64, 63)}  # fmt: skip


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 as its paper has it."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        one, other = a * 0xD2511F53, c * 0xCD9E8D57
        low = 0xFFFFFFFF
        a, b, c, d = (other >> 32) ^ b ^ k, other & low, (one >> 32) ^ d ^ m, one & low
        k, m = (k + 0x9E3779B9) & low, (m + 0xBB67AE85) & low
    return a, b, c, d


def key_of(stream: tuple[int, int], element: int) -> int:
    """The 64-bit key of an element, by the words of docs/design/0011-random-masks.md."""
    low = 0xFFFFFFFF
    word, lane = divmod(element, 64)
    counter = 32 * word + lane % 32
    key, high = stream
    block = philox((counter & low, counter >> 32, high & low, high >> 32), (key & low, key >> 32))
    first, second = (block[0], block[1]) if lane < 32 else (block[2], block[3])
    return first | second << 32


def stream_of(seed: int, label: str, attempt: int = 0) -> tuple[int, int]:
    digest = hashlib.sha256(f"ckdiff random mask 1\0{seed}\0{attempt}\0{label}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


# the kernels


def test_philox_is_philox() -> None:
    """The known answers of Random123, the paper's own library."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones, ones, ones, ones), (ones, ones)) == (
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    )  # fmt: skip
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    )  # fmt: skip


@pytest.mark.parametrize("elements", [1, 31, 64, 100, 200])
@pytest.mark.parametrize("word", [0, 3, (1 << 27) - 1, (5 << 40) + 3])
def test_kernels(word: int, elements: int) -> None:
    stream = stream_of(7, "kernel")
    keys = [key_of(stream, 64 * word + i) for i in range(elements)]
    scratch = np.empty(DRAW_SCRATCH, np.uint8)
    near = c_function("near").ctypes
    ordered = sorted(keys)
    low, high = ordered[elements // 4], ordered[3 * elements // 4]
    inside = [key for key in keys if low < key <= high]
    for room in (elements, len(inside), len(inside) // 2, 0):
        out = np.full(room + 2, 77, np.uint64)
        found = near(*stream, word, elements, low, high, out.ctypes.data, room, scratch.ctypes.data)
        assert found == len(inside)
        assert out[0] == sum(key <= low for key in keys)
        kept = min(room, found)
        assert out[1 : 1 + kept].tolist() == inside[:kept]
        assert (out[1 + kept :] == 77).all(), "nothing is written where there is no room"
    words = -(-elements // 64)
    for limit in (0, low, high, (1 << 64) - 1):
        mask = np.full(8 * words + 2, 0xEE, np.uint8)
        count = c_function("draw").ctypes(
            *stream, word, elements, limit, mask.ctypes.data + 1, scratch.ctypes.data
        )
        bits = np.unpackbits(mask[1:-1], bitorder="little")
        assert bits[:elements].tolist() == [key <= limit for key in keys]
        assert not bits[elements:].any()
        assert count == bits.sum()
        assert mask[0] == mask[-1] == 0xEE


# what is drawn


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> ckdiff.MaskStore:
    return first_bits(tmp_path_factory.mktemp("like") / "like.zarr", TENSORS)


def test_numbers_are_kept(like: ckdiff.MaskStore, tmp_path: Path) -> None:
    digests = set()
    for seed in range(5):
        by_tensor = ckdiff.random_mask(like, tmp_path / f"t{seed}.zarr", seed=seed)
        by_model = ckdiff.random_mask(like, tmp_path / f"m{seed}.zarr", seed=seed, within="model")
        assert {t.name: (t.elements, t.changed["exact"]) for t in by_tensor.tensors} == TENSORS
        assert by_model.manifest["changed"] == like.manifest["changed"]
        assert 0 < by_model.tensors[5].changed["exact"] != 1
        for made in (by_tensor, by_model):
            made.check()
            digests.add(made.manifest["objects"]["masks/exact/c/0"][1])
            assert [t.base_hash for t in made.tensors] == [t.base_hash for t in like.tensors]
    assert len(digests) == 10


def test_the_definition(like: ckdiff.MaskStore, tmp_path: Path) -> None:
    """The k smallest keys, drawn by hand: this must never change."""
    made = ckdiff.random_mask(like, tmp_path / "t.zarr", seed=2**64 - 1)
    for name, (elements, changed) in TENSORS.items():
        if elements > 1000:
            continue
        stream = stream_of(2**64 - 1, f"tensor {name}")
        keys = np.array([key_of(stream, i) for i in range(elements)], np.uint64)
        wanted = np.sort(np.argsort(keys)[:changed])
        assert made.mask(name).nonzero()[0].tolist() == wanted.tolist()
    small = first_bits(tmp_path / "small.zarr", {"x": (700, 30), "y": (100, 90)})
    made = ckdiff.random_mask(small, tmp_path / "m.zarr", seed=5, within="model")
    stream = stream_of(5, "model")
    places = [*range(700), *range(1024, 1124)]  # addresses: padding is nobody's
    keys = np.array([key_of(stream, i) for i in places], np.uint64)
    chosen = np.zeros(800, bool)
    chosen[np.argsort(keys)[:120]] = True
    assert np.array_equal(np.concatenate([made.mask("x"), made.mask("y")]), chosen)


def test_a_tensor_alone_gets_the_same_mask(like: ckdiff.MaskStore, tmp_path: Path) -> None:
    alone = first_bits(tmp_path / "alone.zarr", {"a": TENSORS["a"], "f": (500, 400)})
    made = ckdiff.random_mask(alone, tmp_path / "one.zarr", seed=3)
    among = ckdiff.random_mask(like, tmp_path / "all.zarr", seed=3)
    assert np.array_equal(made.mask("a"), among.mask("a"))


@pytest.mark.parametrize(("changed", "within"), [(0, "tensor"), (0, "model"), (1, "tensor"),
                                                 (1, "model")])  # fmt: skip
def test_nothing_and_everything(changed: int, within: Any, tmp_path: Path) -> None:
    tensors = {name: (n, n * changed) for name, (n, _) in TENSORS.items()}
    like = first_bits(tmp_path / "like.zarr", tensors)
    made = ckdiff.random_mask(like, tmp_path / "out.zarr", seed=1, within=within)
    made.check()
    assert made.manifest["changed"] == like.manifest["changed"]
    assert (
        like.manifest["objects"]["masks/exact/c/0"] == made.manifest["objects"]["masks/exact/c/0"]
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ckdiff.MaskStore:
    shapes = {"a": (1000, 500), "b": (CHUNK + 12_345, CHUNK // 10), "c": (CHUNK - 77, 3)}
    return first_bits(tmp_path_factory.mktemp("large") / "like.zarr", shapes)


@pytest.mark.parametrize("within", ["tensor", "model"])
def test_workers_do_not_matter(within: Any, large: ckdiff.MaskStore, tmp_path: Path) -> None:
    trees = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.zarr"
        seen: list[ckdiff.Progress] = []
        made = ckdiff.random_mask(large, out, seed=9, within=within, workers=workers,
                                  observer=Observer(progress=seen.append))  # fmt: skip
        trees.append(tree(out))
        assert made.manifest["changed"] == large.manifest["changed"]
        assert [p.done for p in seen] == sorted(p.done for p in seen)
        assert seen[-1].done == seen[-1].total
    assert trees[0] == trees[1]
    made.check()
    assert made.manifest["layout"]["addresses"] > 2 * CHUNK


@pytest.mark.parametrize("within", ["tensor", "model"])
def test_a_run_that_failed_is_resumed(
    within: Any, large: ckdiff.MaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(RandomMask, "make", fails_after(1, RandomMask, RuntimeError("injected")))
        with pytest.raises(RuntimeError, match="injected"):
            ckdiff.random_mask(large, out, seed=4, within=within, workers=1)
    assert not out.exists()
    notes: list[str] = []
    observer = Observer(note=notes.append)
    ckdiff.random_mask(large, out, seed=4, within=within, observer=observer)
    assert notes == ["resuming: 1 of 3 chunks were done already"]
    ckdiff.random_mask(large, tmp_path / "fresh.zarr", seed=4, within=within)
    assert tree(out) == tree(tmp_path / "fresh.zarr")


def test_kill_9(large: ckdiff.MaskStore, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    killed = stopped(
        signal.SIGKILL, "random", "--like", str(large.path), "--seed", "1", "-o", str(out)
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(StoreIncomplete):
        ckdiff.open_store(out)
    notes: list[str] = []
    made = ckdiff.random_mask(large, out, seed=1, observer=Observer(note=notes.append))
    assert "resuming: 1 of 3" in notes[-1]
    made.check()


def test_provenance(like: ckdiff.MaskStore, tmp_path: Path) -> None:
    made = ckdiff.random_mask(like, tmp_path / "out.zarr", seed=np.int64(8), within="model")
    assert made.manifest["made_by"] == {
        "operation": "random",
        "rule": "exact",
        "seed": 8,
        "within": "model",
        "like": like.manifest_digest(),
    }


# limits


def whole(population: Population, keys: npt.NDArray[np.uint64]) -> None:
    """Settle with all keys there are, as often as it takes."""
    for _ in range(100):
        low, high = population.window()
        inside = keys[(keys > low) & (keys <= high)]
        stream = population.stream
        population.settle(int((keys <= low).sum()), inside)
        if population.limit is not None or population.stream != stream:
            return
    pytest.fail("no limit was found")


@pytest.mark.parametrize("width", [1, 8])
def test_limits(width: int) -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 100, 10_000):
        for k in sorted({1, 2, n // 2, n - 1} - {n}):
            population = Population(0, "test", n, k, _width=width)
            keys = rng.integers(0, 2**64, n, np.uint64)
            whole(population, keys)
            assert (keys <= np.uint64(population.limit or 0)).sum() == k


def test_limits_are_found_where_nobody_expects_them() -> None:
    for keys in ([0, 1, 2, 3], [2**64 - 1, 2**64 - 2, 2**64 - 3, 5], [0, 7, 7, 2**64 - 1]):
        for k in (1, 3):
            population = Population(0, "test", len(keys), k)
            whole(population, np.array(keys, np.uint64))
            assert sum(key <= (population.limit or 0) for key in keys) == k


def test_ties_at_the_limit_give_all_elements_new_keys() -> None:
    for keys in ([1 << 62, 1 << 62, 1 << 63], [0, 0, 5]):
        population = Population(0, "test", 3, 1)
        assert population.stream == stream_of(0, "test")
        whole(population, np.array(keys, np.uint64))
        assert population.limit is None
        assert population.stream == stream_of(0, "test", attempt=1)


def test_the_first_look_is_narrow_at_any_size() -> None:
    for n in (10**9, 7 * 10**10):
        for k in (1, 1000, n // 10, n - 1):
            low, high = Population(0, "test", n, k).window()
            assert low <= k / n * 2**64 <= high
            assert (high - low) / 2**64 * n < 20 * k**0.5 + 100


@pytest.mark.parametrize("by_tensor", [True, False])
def test_a_limit_outside_the_window_is_sought_again(by_tensor: bool) -> None:
    elements = [100_000, 300_000]
    chosen = []
    for seed in range(4):
        for width in (1e-9, 8):  # the first window is empty
            label = "tensor {}" if by_tensor else "model"
            sizes = elements if by_tensor else [sum(elements)]
            populations = [
                Population(seed, label.format(i), n, n // 3, _width=width)
                for i, n in enumerate(sizes)
            ]
            chosen.append(draw(elements, populations, by_tensor=by_tensor))
        assert np.array_equal(chosen[-1], chosen[-2])


def draw(
    elements: list[int], populations: list[Population], *, by_tensor: bool
) -> npt.NDArray[np.uint8]:
    """The bits of a model of one chunk, without a store."""
    layout = Layout(np.array(elements, np.int64))
    maker = RandomMask(layout, populations, by_tensor=by_tensor)
    maker.prepare([0], 1, lambda: None, lambda size: None)
    mask = np.zeros(layout.total // 8, np.uint8)
    spans = layout.spans(0, layout.total)
    changed = np.zeros(len(spans), np.int64)
    for _ in maker.make(0, spans, mask, changed, lambda size: None):
        pass
    maker.verify(changed)
    return np.unpackbits(mask, bitorder="little")


def test_a_wrong_number_would_be_noticed() -> None:
    maker = RandomMask(
        Layout(np.array([100], np.int64)), [Population(0, "tensor a", 100, 10)], by_tensor=True
    )
    with pytest.raises(CkdiffError, match="exactly 10 changed elements, and 11"):
        maker.verify(np.array([11], np.int64))


# chance


def test_overlaps_of_random_masks_are_what_chance_gives() -> None:
    """z of independent masks is standard normal, for pairs of seeds and of tensors."""
    elements, changed = [5000, 12_345], [700, 6000]
    bits = []
    for seed in range(201):
        populations = [
            Population(seed, f"tensor {i}", n, k)
            for i, (n, k) in enumerate(zip(elements, changed, strict=True))
        ]
        bits.append(draw(elements, populations, by_tensor=True))
    mean, variance = nulls.of_cells(elements, [changed, changed])
    z = np.array(
        [
            nulls.figures(int((a & b).sum()), sum(changed), sum(changed), mean[0], variance[0])["z"]
            for a, b in itertools.pairwise(bits)
        ]
    )
    assert abs(z.mean()) < 3 / 200**0.5
    assert abs(z.std() - 1) < 3 / 400**0.5
    assert np.abs(z).max() < 4.5
    # and of a fixed mask that no generator made
    every_third = np.zeros(len(bits[0]), bool)
    every_third[:5000:3] = True
    mean, variance = nulls.of_cells([5000], [[700], [1667]])
    z = (np.array([(b & every_third).sum() for b in bits]) - mean[0]) / variance[0] ** 0.5
    assert abs(z.mean()) < 3 / 201**0.5
    assert abs(z.std() - 1) < 3 / 402**0.5


def test_every_position_is_equally_likely() -> None:
    elements, changed, masks = 520, 104, 2000
    counts = np.zeros(elements)
    neighbours = np.zeros(elements - 1)
    for seed in range(masks):
        bits = draw([elements], [Population(seed, "tensor", elements, changed)], by_tensor=True)
        counts += bits[:elements]
        neighbours += bits[: elements - 1] & bits[1:elements]
        assert not bits[elements:].any()
    density = changed / elements
    expected = masks * density
    chi_square = ((counts - expected) ** 2).sum() / (expected * (1 - density))
    chi_square *= (elements - 1) / elements  # the counts of a mask are not independent
    freedom = elements - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    pairs = density * (changed - 1) / (elements - 1)
    assert abs(neighbours.sum() / (masks * (elements - 1)) / pairs - 1) < 0.01


def test_within_the_model_tensors_get_what_chance_gives_them() -> None:
    """The numbers in a tensor are hypergeometric: mean and variance over many seeds."""
    elements, changed = [3000, 1000, 6000], 2000
    found = []
    for seed in range(400):
        bits = draw(elements, [Population(seed, "model", 10_000, changed)], by_tensor=False)
        found.append(int(bits[3072:4072].sum()))
    n, k, own = 10_000, changed, 1000
    mean = k * own / n
    variance = mean * (1 - k / n) * (n - own) / (n - 1)
    assert abs(np.mean(found) - mean) < 3 * (variance / 400) ** 0.5
    assert abs(np.var(found) / variance - 1) < 3 * (2 / 400) ** 0.5


# what is refused


def test_bad_arguments(like: ckdiff.MaskStore, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**64}, "from 0 to"),
        ({"seed": "1"}, "whole number"),
        ({"seed": 1, "within": "layer"}, "tensor or model"),
        ({"seed": 1, "within": None}, "must be text"),
        ({"seed": 1, "rule": "ulp=1"}, "no counts for the rule ulp=1"),
        ({"seed": 1, "workers": 0}, "workers"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            ckdiff.random_mask(like, out, **options)
    with pytest.raises(StoreIncomplete):
        ckdiff.random_mask(tmp_path / "none", out, seed=1)
    for place in (like.path, like.path / "inside.zarr", like.path.parent):
        with pytest.raises(StoreError, match="the input"):
            ckdiff.random_mask(like, place, seed=1, overwrite=True)
    assert os.listdir(tmp_path) == []
    ckdiff.random_mask(like, out, seed=1)
    with pytest.raises(StoreExists):
        ckdiff.random_mask(like, out, seed=2)
    ckdiff.random_mask(like, out, seed=2, overwrite=True)


@pytest.mark.parametrize("wrong", [-1, 1001])
def test_impossible_numbers(
    wrong: int, like: ckdiff.MaskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that says so is refused; it cannot come from ckdiff."""
    store = ckdiff.open_store(like.path)
    table = store.table
    counts = table.changed["exact"].copy()
    counts[0] = wrong
    other = MaskTable(
        table.names, table.dtypes, table.shapes, table.elements, table.starts, {"exact": counts},
        table.base_hashes, table.tuned_hashes,
    )  # fmt: skip
    monkeypatch.setattr(store, "tensors", other)
    with pytest.raises(StoreCorrupt, match="more changed elements"):
        ckdiff.random_mask(store, tmp_path / "out.zarr", seed=1)
