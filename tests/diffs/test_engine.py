"""Whole diffs against the twin, and that nothing but the bytes decides what a store holds."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from checkpoint_pairs import (
    RULES,
    Pair,
    check_masks,
    files_of,
    same_statistics,
    some_model,
    some_pair,
    write_side,
    write_sparse,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import write_safetensors

import ckdiff
from ckdiff.diffs.plan import plan
from ckdiff.diffs.result import DiffResult, unpaired_names
from ckdiff.diffs.run import run as run_plan
from ckdiff.diffs.task import SMALLEST_WINDOW
from ckdiff.errors import CkdiffError, UsageError
from ckdiff.layout import CHUNK
from ckdiff.naming import natural_key
from ckdiff.options import Options

MEMORY = "8GiB"  # the test process has plenty of memory in use already


def run(
    base: Path,
    tuned: Path,
    out: Path | None,
    *,
    rules: Sequence[str] = ("exact",),
    stats: bool = False,
    workers: int = 2,
    window: int | None = None,
) -> DiffResult:
    options = Options(rules=rules, stats=stats, workers=workers, memory=MEMORY)
    with plan(base, tuned, out, options) as planned:
        window = window or planned.allotment.window
        # also more workers than a small model has chunks
        allotment = replace(planned.allotment, workers=workers, window=window)
        return run_plan(replace(planned, allotment=allotment))


# -- small checkpoints -----------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 30), stats=st.booleans())
def test_a_diff_is_what_the_twin_says(
    seed: int, stats: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    model = some_model(seed)
    base = write_side(folder / "base", model, "base", seed + 1)
    tuned = write_side(folder / "tuned", model, "tuned", seed + 2)
    result = ckdiff.diff(
        base, tuned, folder / "out", rules=RULES, stats=stats, workers=2, memory=MEMORY
    )
    store = result.store
    assert [t.name for t in store.tensors] == sorted(model, key=natural_key)
    check_masks(store, model, RULES)
    store.check()

    elements = sum(pair.elements for pair in model.values())
    counts = {rule: sum(int(p.masks(RULES)[rule].sum()) for p in model.values()) for rule in RULES}
    said = result.to_dict()
    assert said["elements"] == elements
    assert said["tensors"] == len(model)
    assert list(said["rules"]) == RULES
    for rule, count in counts.items():
        density = count / elements if elements else 0.0
        assert said["rules"][rule] == {"changed": count, "density": density}
    assert said["bytes_read"] == sum(2 * len(pair.base) for pair in model.values())
    assert said["unpaired"] == unpaired_names([])
    raw = {name for name, pair in model.items() if pair.dtype in naive.RAW}
    fallen = {rule: set(names) for rule, names in said["exact_only"].items()}
    assert fallen == {r: raw for r in RULES if raw and not r.startswith("exact")}

    without = ckdiff.diff(base, tuned, rules=RULES, stats=stats, memory=MEMORY)
    assert without.store is None
    ignored = {"store": None, "seconds": 0}
    assert without.to_dict() | ignored == said | ignored
    json.dumps(said, allow_nan=False)

    reopened = ckdiff.open_store(folder / "out")
    assert reopened.tensors == store.tensors
    rows = reopened.summary("tensor")
    assert sum(row["rules"]["exact"]["changed"] for row in rows) == counts["exact"]
    for by in ("layer", "module", "dtype", "model"):
        rows = reopened.summary(by)  # type: ignore[arg-type]
        assert sum(row["elements"] for row in rows) == elements
        for rule, count in counts.items():
            assert sum(row["rules"][rule]["changed"] for row in rows) == count


def test_statistics_of_a_diff(tmp_path: Path) -> None:
    shapes = {"BF16": (1100,), "F32": (333, 7), "F16": (1025,), "I8": (66_000,), "I64": (513,),
              "F8_E4M3": (2, 700), "U16": (0, 4), "F4": (64,), "BOOL": ()}  # fmt: skip
    model = {f"w.{d}": some_pair(d, shape, 1) for d, shape in shapes.items()}
    for side in ("base", "tuned"):
        write_side(tmp_path / side, model, side, 5)
    result = run(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", stats=True)
    by_name = {row["name"]: row for row in result.to_dict()["statistics"]}
    for tensors in (
        result.table,
        result.store.tensors,
        ckdiff.open_store(tmp_path / "out").tensors,
    ):
        for record in tensors:
            pair = model[record.name]
            if pair.dtype in naive.RAW:
                assert record.statistics is None
                assert set(by_name[record.name]) == {"name"}
            else:
                want = naive.statistics(pair.dtype, pair.base, pair.tuned)
                same_statistics(record.statistics, want)
                same_statistics(by_name[record.name], want)


def test_statistics_that_overflow_have_no_cosine(tmp_path: Path) -> None:
    x = np.array([1e200, -1e200, 1e200, 1.0])
    base = {"w": ("F64", (4,), x.tobytes())}
    tuned = {"w": ("F64", (4,), (-x).tobytes())}
    sides = [
        write_safetensors(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((base, tuned))
    ]
    run(*sides, tmp_path / "out", stats=True)
    for tensor in ckdiff.open_store(tmp_path / "out").tensors:
        assert tensor.statistics is not None
        assert tensor.statistics["cosine"] is None
        assert tensor.statistics["l2_base"] is None
        assert tensor.statistics["sign_flips"] == 4
        assert tensor.statistics["sum_abs_delta"] == pytest.approx(6e200)


def test_shard_layouts_and_order_do_not_matter(tmp_path: Path) -> None:
    """Masks, counts, hashes: only the names of the source files differ."""
    model = some_model(7, tensors=20)
    seen = []
    for i in range(3):
        sides = [write_side(tmp_path / f"{i}" / s, model, s, 10 * i + len(s)) for s in
                 ("base", "tuned")]  # fmt: skip
        out = tmp_path / f"{i}" / "out"
        run(*sides, out, rules=RULES, stats=True)
        files = files_of(out)
        del files["manifest.json"]
        seen.append(files)
    assert seen[0] == seen[1] == seen[2]


def test_a_checkpoint_and_itself(tmp_path: Path) -> None:
    model = some_model(3)
    base = write_side(tmp_path / "base", model, "base", 1)
    result = run(base, base, tmp_path / "out", rules=RULES)
    assert not result.differs
    assert all(counts == {"changed": 0, "density": 0} for counts in result.rules.values())
    assert all(not result.store.array(rule)[:].any() for rule in RULES)
    for record in result.store.tensors:
        assert record.base_hash == record.tuned_hash


def test_nothing_but_tensors_without_elements(tmp_path: Path) -> None:
    model = {"a": Pair("F32", (0, 3), b"", b""), "b": Pair("F4", (0,), b"", b"")}
    for side in ("base", "tuned"):
        write_side(tmp_path / side, model, side, 1)
    result = run(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", stats=True)
    assert result.rules == {"exact": {"changed": 0, "density": 0.0}}
    assert not result.differs
    check_masks(result.store, model, ["exact"])
    assert result.store.dask().compute().shape == (0,)
    assert result.store.summary("model")[0]["elements"] == 0
    result.store.check()


def test_what_is_not_compared(tmp_path: Path) -> None:
    x = ("F32", (2,), b"abcdefgh")
    base = {"same": x, "gone": x, "shape": x, "type": x, "left.out": x}
    tuned = {"same": x, "new": x, "shape": ("F32", (1, 2), x[2]), "type": ("I32", (2,), x[2]),
             "left.out": ("F32", (2,), bytes(8))}  # fmt: skip
    sides = [
        write_safetensors(tmp_path / f"{i}.safetensors", t) for i, t in enumerate((base, tuned))
    ]
    result = ckdiff.diff(*sides, tmp_path / "out", exclude=["left.*"], memory=MEMORY)
    said = result.to_dict()
    assert set(said) >= {"elements", "tensors", "rules", "unpaired", "unpaired_details",
                         "bytes_read", "seconds"}  # fmt: skip
    assert said["unpaired"] == {
        "added": ["new"], "removed": ["gone"], "reshaped": ["shape"], "retyped": ["type"],
        "missing": [],
    }  # fmt: skip
    details = {(d["name"], d["reason"]) for d in said["unpaired_details"]}
    assert details == {
        ("new", "added"), ("gone", "removed"), ("shape", "reshaped"), ("type", "retyped"),
    }  # fmt: skip
    assert (said["tensors"], said["elements"], said["bytes_read"]) == (1, 2, 16)
    assert said["excluded"] == 1
    assert result.differs
    json.dumps(said, allow_nan=False)


# -- reading a store -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Pair], Path]:
    folder = tmp_path_factory.mktemp("stored")
    model = {"a.1.w": some_pair("F32", (70, 100), 1), "a.10.w": some_pair("BF16", (1000,), 2),
             "a.2.w": some_pair("U8", (), 3), "b": some_pair("F16", (0, 2), 4)}  # fmt: skip
    for side in ("base", "tuned"):
        write_side(folder / side, model, side, 1)
    rules = ["atol=1e-3", "exact"]
    return model, run(folder / "base", folder / "tuned", folder / "out", rules=rules).store.path


def test_any_spelling_of_a_rule_finds_its_mask(stored: tuple[dict[str, Pair], Path]) -> None:
    model, path = stored
    store = ckdiff.open_store(path)
    pair = model["a.1.w"]
    want = pair.masks(["exact", "atol=1e-3"])
    for rule in ("atol=1e-3", "atol=0.001", " ATOL=1E-03", ckdiff.Rule.parse("atol=1e-3")):
        assert (store.mask("a.1.w", rule).ravel() == want["atol=1e-3"]).all()
        assert store.packed("a.1.w", rule).tobytes() == naive.packed(want["atol=1e-3"])
        assert store.tensors[0].changed[rule] == int(want["atol=1e-3"].sum())
    assert (store.mask("a.1.w").ravel() == want["exact"]).all()
    assert store.tensors[0].density() == int(want["exact"].sum()) / 7000
    for wrong in ("ulp=1", "nonsense"):
        with pytest.raises(CkdiffError):
            store.mask("a.1.w", wrong)
    with pytest.raises(CkdiffError, match=r"a\.11\.w"):
        store.mask("a.11.w")


def test_ranges_of_a_mask(stored: tuple[dict[str, Pair], Path]) -> None:
    model, path = stored
    store = ckdiff.open_store(path)
    for name in model:
        want = model[name].masks(["exact"])["exact"]
        count = len(want)
        edges = [
            None,
            0,
            1,
            7,
            8,
            9,
            63,
            64,
            65,
            511,
            512,
            999,
            count - 1,
            count,
            count + 9,
            -1,
            -9,
        ]
        for start in edges:
            for stop in edges:
                found = store.mask(name, start=start, stop=stop)
                if start is None and stop is None:
                    assert found.shape == model[name].shape
                assert found.ravel().tolist() == want[start:stop].tolist()


def test_one_mask_needs_no_name(tmp_path: Path) -> None:
    model = {"w": some_pair("F32", (100,), 1)}
    for side in ("base", "tuned"):
        write_side(tmp_path / side, model, side, 1)
    store = run(tmp_path / "base", tmp_path / "tuned", tmp_path / "one", rules=["ulp=1"]).store
    assert store.masks == ("ulp=1",)
    assert set(store.tensors[0].changed) == {"ulp=1", "exact"}  # exact is always counted
    assert (store.mask("w") == model["w"].masks(["ulp=1"])["ulp=1"]).all()
    with pytest.raises(UsageError):
        store.mask("w", "exact")
    rules = ["ulp=1", "ulp=2"]
    store = run(tmp_path / "base", tmp_path / "tuned", tmp_path / "two", rules=rules).store
    with pytest.raises(UsageError):
        store.mask("w")


def test_dask_and_zarr_views(stored: tuple[dict[str, Pair], Path]) -> None:
    _, path = stored
    store = ckdiff.open_store(path)
    for rule in store.masks:
        array = store.array(rule)
        lazy = store.dask(rule)
        assert (array.dtype, lazy.dtype) == (np.uint8, np.uint8)
        assert array.shape == lazy.shape
        assert (lazy.compute(scheduler="threads") == array[:]).all()
        ones = int(np.bitwise_count(lazy).sum().compute(scheduler="sync"))
        assert ones == sum(t.changed[rule] for t in store.tensors)
        again = pickle.loads(pickle.dumps(array))
        assert (again[:] == array[:]).all()
        with pytest.raises((ValueError, TypeError)):
            array[0] = 1


# -- several chunks --------------------------------------------------------------------------------

#: tensors over three chunks; B lies on the first border and D's end on no border at all
BIG = {
    "A": ("U8", (CHUNK - 3 * 512 + 5,)),
    "B": ("BF16", (3000,)),
    "C": ("F32", (CHUNK // 2 + 77,)),
    "D": ("F4", (CHUNK,)),
    "E": ("F64", (1001,)),
}
BIG_RULES = ["exact", "atol=1e-3", "exact@bf16"]


def planted(seed: int) -> dict[str, list[tuple[int, Pair]]]:
    """(first element, elements) written into the big tensors: at their ends, at blocks' ends."""
    noise = random.Random(seed)
    out: dict[str, list[tuple[int, Pair]]] = {}
    for name, (dtype, (count,)) in BIG.items():
        size = min(count, 600)
        places = {0, count - size}
        if count > 10_000:
            places |= {noise.randrange(count // 2 // 4096) * 4096 + 1000, 65536 * 9 - 256,
                       SMALLEST_WINDOW * 3 - 64}  # fmt: skip
        for place in sorted(places):
            pair = some_pair(dtype, (size,), noise.randrange(1 << 30))
            if dtype == "F64":
                pair = Pair(dtype, (size,), bytes(8 * size), pair.tuned[: 4 * size] * 2)
            if not out.get(name) or place >= out[name][-1][0] + size:
                out.setdefault(name, []).append((place, pair))
    return out


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("big")
    pieces = planted(1)
    for side in ("base", "tuned"):
        written = {
            name: [
                (at * naive.FORMATS[BIG[name][0]].bits // 8, getattr(p, side)) for at, p in found
            ]
            for name, found in pieces.items()
        }
        tensors = dict(reversed(BIG.items())) if side == "base" else BIG
        write_sparse(folder / side / "model.safetensors", tensors, written)
    result = run(folder / "base", folder / "tuned", folder / "out", rules=BIG_RULES, stats=True)
    return folder, pieces, result


def test_counts_and_masks_across_chunks(big: Any) -> None:
    _, pieces, result = big
    store = result.store
    assert store.manifest["layout"]["addresses"] > 2 * CHUNK
    for record in store.tensors:
        found = pieces[record.name]
        for rule in BIG_RULES:
            wants = [pair.masks([rule])[rule] for _, pair in found]
            assert record.changed[rule] == sum(int(w.sum()) for w in wants), (record.name, rule)
            for (at, _), want in zip(found, wants, strict=True):
                low, high = max(at - 700, 0), min(at + len(want) + 700, record.elements)
                mask = store.mask(record.name, rule, start=low, stop=high)
                assert (mask[at - low :][: len(want)] == want).all()
        whole = np.unpackbits(store.packed(record.name), bitorder="little")
        assert int(whole.sum()) == record.changed["exact"]
        if record.statistics is not None and record.dtype != "F64":
            # zeros add nothing to any sum
            base, tuned = (b"".join(getattr(p, s) for _, p in found) for s in ("base", "tuned"))
            same_statistics(record.statistics, naive.statistics(record.dtype, base, tuned))
    store.check()
    counted = np.bitwise_count(store.dask("exact")).sum().compute(scheduler="threads")
    assert int(counted) == result.rules["exact"]["changed"]


def test_hashes_across_chunks(big: Any) -> None:
    folder, _, result = big
    for side in ("base", "tuned"):
        with ckdiff.open_checkpoint(folder / side) as checkpoint:  # type: ignore[attr-defined]
            raw = (folder / side / "model.safetensors").read_bytes()
            for record in result.store.tensors:
                i = checkpoint.table.names.index(record.name)
                at = int(checkpoint.offset[i])
                if record.name in "ABE":
                    data = raw[at : at + int(checkpoint.table.nbytes[i])]
                    expected = naive.content_hash(record.dtype, data)
                    assert getattr(record, f"{side}_hash") == expected


@pytest.mark.parametrize(
    ("workers", "window"),
    [(1, 1 << 21), (1, 1 << 19), (2, 1 << 20), (3, 1 << 19), (3, 1 << 21)],
)
def test_workers_and_windows_do_not_matter(
    big: Any, workers: int, window: int, tmp_path: Path
) -> None:
    """The finished store is the same, file by file and byte by byte."""
    folder, _, result = big
    again = run(folder / "base", folder / "tuned", tmp_path / "out", rules=BIG_RULES, stats=True,
                workers=workers, window=window)  # fmt: skip
    expected, found = files_of(folder / "out"), files_of(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    for name, data in expected.items():
        assert found[name] == data, name
    assert again.rules == result.rules
    assert again.table == result.table


def test_memory_and_order_of_rules_do_not_matter(big: Any, tmp_path: Path) -> None:
    folder, _, result = big
    rules = list(reversed(BIG_RULES))
    sides = folder / "base", folder / "tuned"
    counted = []
    for i, memory in enumerate(("600MiB", "8GiB")):
        try:
            out = tmp_path / str(i)
            got = ckdiff.diff(*sides, out, rules=rules, stats=True, memory=memory, workers=2)
        except ckdiff.BudgetError:
            assert memory == "600MiB"  # what the test process holds already counts
            continue
        counted.append(files_of(out))
        assert list(got.rules) == rules
        assert {r: got.rules[r] for r in BIG_RULES} == result.rules
    assert counted
    assert all(files == counted[0] for files in counted)
    expected = files_of(folder / "out")
    for rule in rules:
        for key, data in expected.items():
            if key.startswith(f"masks/{rule}/"):
                assert counted[0][key] == data


# -- very large, very many -------------------------------------------------------------------------


def test_2_to_the_33_elements_in_one_tensor(tmp_path: Path) -> None:
    count = 1 << 33
    tensors = {"w": ("F4", (1 << 16, 1 << 17)), "x": ("U8", (3,))}
    places = [0, 1, 511, CHUNK - 1, CHUNK, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1,
              count - 513, count - 2, count - 1]  # fmt: skip
    changed: dict[int, int] = {}
    for place in places:
        changed[place // 2] = changed.get(place // 2, 0) | 0x5 << 4 * (place % 2)
    base = write_sparse(tmp_path / "base.safetensors", tensors, {"x": [(0, b"abc")]})
    written = {"w": [(at, bytes([value])) for at, value in changed.items()], "x": [(0, b"aXc")]}
    tuned = write_sparse(tmp_path / "tuned.safetensors", tensors, written)
    if os.stat(tuned).st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no holes")
    store = run(base, tuned, tmp_path / "out").store
    record = store.tensors[0]
    assert record.elements == count
    assert record.changed["exact"] == len(places)
    assert store.tensors[1].changed["exact"] == 1
    assert store.tensors[1].start == count
    for place in places:
        low = max(0, place - 600)
        found = np.flatnonzero(store.mask("w", start=low, stop=place + 600)) + low
        assert found.tolist() == [p for p in places if low <= p < place + 600]
    assert store.mask("x").tolist() == [False, True, False]


def test_100_000_tensors(tmp_path: Path) -> None:
    noise = random.Random(1)
    count = 100_000
    dense = np.random.default_rng(1)
    pool = dense.bytes(2 * 40 * count)
    twin = dense.random(40 * count) < 0.1  # a change flips the lowest bit
    other = (np.frombuffer(pool, "<u2") ^ twin).astype("<u2").tobytes()
    base, tuned, expected = {}, {}, {}
    at = 0
    for i in range(count):
        size = noise.randrange(40)
        name, piece = f"model.layers.{i // 100}.experts.{i % 100}.w", slice(2 * at, 2 * (at + size))
        base[name] = ("BF16", (size,), pool[piece])
        tuned[name] = ("BF16", (size,), other[piece])
        expected[name] = twin[at : at + size]
        at += size
    order = list(tuned)
    noise.shuffle(order)
    first = write_safetensors(tmp_path / "base.safetensors", base)
    second = write_safetensors(
        tmp_path / "tuned.safetensors", {name: tuned[name] for name in order}
    )
    store = run(first, second, tmp_path / "out").store
    assert len(store.tensors) == count
    for record in store.tensors:
        assert record.changed["exact"] == int(expected[record.name].sum())
    for name in noise.sample(order, 300):
        assert (store.mask(name) == expected[name]).all()
        index = store.table.find(name)
        assert store.tensors[index].base_hash == naive.content_hash("BF16", base[name][2])
    assert sum(int(e.sum()) for e in expected.values()) == store.manifest["changed"]["exact"]
    assert math.prod(store.array().shape) * 8 == store.manifest["layout"]["addresses"]
