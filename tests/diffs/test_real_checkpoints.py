"""Published checkpoints: a fine-tune, a successor, the folds of a training, identity controls.

``fetch_checkpoints.py`` brings them. What ckdiff says about them is held against torch, which reads
the same files through its own reader and computes with its own kernels.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fetch_checkpoints import MODEL, ORIGINAL, cache_directory
from safetensors.torch import load_file, save_file
from support import write_index

import ckdiff
from ckdiff.diffs.result import unpaired_names

RULES = ["exact", "atol=1e-5", "rtol=1e-3", "ulp=1", "exact@bf16"]
FOLDS = [f"pocketnet/v3_fold{fold}" for fold in range(5)]
CONSTANTS = ["rax.mu", "rbf.mu", "rrad.mu"]  # of the folds

Model = dict[str, torch.Tensor]

torch.set_num_threads(1)  # these tensors are small: threads would only wait for each other


def real(name: str) -> Path:
    """The file of a fetched checkpoint."""
    path = cache_directory() / name / MODEL
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make test`, which fetches it", pytrace=False)
    return path


def original(name: str) -> Path:
    """The directory of a fetched checkpoint as it was published, in a torch file."""
    return real(name).parent / ORIGINAL


# -- the rules and the statistics, said in torch ---------------------------------------------------


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, as signed integers."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind)


def places(tensor: torch.Tensor) -> torch.Tensor:
    """Where each value stands among all values of its float type; both zeros at 0."""
    bits = raw(tensor).to(torch.int64)
    magnitude = bits & (1 << 8 * tensor.element_size() - 1) - 1
    return torch.where(bits < 0, -magnitude, magnitude)


def changed(rule: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements changed: floats of up to 32 bits, all finite, and small integers."""
    if rule == "exact":
        return raw(a) != raw(b)
    if rule == "exact@bf16":
        if a.is_floating_point():
            a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        return raw(a) != raw(b)
    kind, _, text = rule.partition("=")
    if kind == "ulp":
        if a.is_floating_point():
            a, b = places(a), places(b)
        return (a - b).abs() > int(text)
    bound = torch.tensor(float(text), dtype=torch.float32)
    a, b = a.to(torch.float32), b.to(torch.float32)
    if kind == "rtol":
        bound = bound * torch.maximum(a.abs(), b.abs())
    return (a - b).abs() > bound


def statistics(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """The statistics of two tensors of finite elements."""
    x, y = a.to(torch.float64), b.to(torch.float64)
    delta = (x - y).abs()
    far = (places(a) - places(b)).abs()[raw(a) != raw(b)]
    # the bucket of a distance is its number of binary digits
    buckets = torch.frexp(far.to(torch.float64)).exponent
    norms = float(x.norm()), float(y.norm())
    dot = float((x * y).sum())
    return {
        "sum_abs_delta": float(delta.sum()),
        "l2_delta": float(delta.norm()),
        "max_abs_delta": float(delta.max()),
        "l2_base": norms[0],
        "l2_tuned": norms[1],
        "cosine": dot / (norms[0] * norms[1]) if all(norms) else None,
        "sign_flips": int((x * y < 0).sum()),
        "nonfinite": 0,
        "ulp_histogram": torch.bincount(buckets).tolist() if len(buckets) else [],
    }


def assert_same_statistics(found: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """Counts and maxima exactly; sums but for the order in which they were added."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key == "cosine" and value is not None:
            assert found[key] == pytest.approx(value, rel=0, abs=1e-12), (name, key)
        elif key.startswith(("sum", "l2")):
            assert found[key] == pytest.approx(value, rel=1e-12, abs=0), (name, key)
        else:
            assert found[key] == value, (name, key)


def assert_agrees(result: ckdiff.DiffResult, base: Model, tuned: Model) -> None:
    """Every count, mask, density and statistic of a stored diff against torch."""
    store = result.store
    assert store is not None
    totals = dict.fromkeys(store.rules, 0)
    for record in store.tensors:
        a, b = base[record.name], tuned[record.name]
        assert record.shape == tuple(a.shape)
        for rule in store.rules:
            expected = changed(rule, a, b)
            count = int(expected.sum())
            totals[rule] += count
            assert record.changed[rule] == count, (record.name, rule)
            found = store.mask(record.name, rule)
            assert np.array_equal(found, expected.numpy()), (record.name, rule)
        if record.statistics is not None:
            assert_same_statistics(record.statistics, statistics(a, b), record.name)
    elements = sum(record.elements for record in store.tensors)
    assert result.elements == elements == sum(base[r.name].numel() for r in store.tensors)
    assert result.rules == {
        rule: {"changed": count, "density": count / elements} for rule, count in totals.items()
    }


def run(*arguments: str | Path) -> tuple[int, Any]:
    """The command's exit status and the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ckdiff", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


# -- a documented fine-tune, and a model and its successor -----------------------------------------


def test_fine_tune_has_the_published_density(tmp_path: Path) -> None:
    paths = real("chgnet/0.3.0"), real("chgnet/r2scan")
    base, tuned = map(load_file, paths)
    result = ckdiff.diff(*paths, tmp_path / "out.zarr", rules=RULES, stats=True)
    assert_agrees(result, base, tuned)

    assert len(result.table) == 136
    assert result.elements == 412_525
    assert not any(result.unpaired.values())
    assert result.rules["exact"]["changed"] == 378_067
    assert round(result.rules["exact"]["density"], 4) == 0.9165
    untouched = [record.name for record in result.table if not record.changed["exact"]]
    assert untouched == [
        name for name in result.table.names if torch.equal(base[name], tuned[name])
    ]
    assert len(untouched) == 8
    # an unchanged tensor has the same content hash on both sides, and no other has
    same = [record.name for record in result.table if record.base_hash == record.tuned_hash]
    assert same == untouched
    # why a tolerance is no measure of density
    assert result.rules["atol=1e-5"]["density"] < result.rules["exact"]["density"]


def test_what_was_published_is_read_as_it_is(tmp_path: Path) -> None:
    """Not converted: the same counts, masks and hashes, whichever side is which."""
    names = "chgnet/0.3.0", "chgnet/r2scan"
    (base, tuned), (first, second) = map(original, names), map(real, names)
    result = ckdiff.diff(base, tuned, tmp_path / "out.zarr", rules=RULES, stats=True)
    assert_agrees(result, load_file(first), load_file(second))
    assert round(result.rules["exact"]["density"], 4) == 0.9165
    for one, other in ((base, second), (first, tuned)):
        mixed = ckdiff.diff(one, other, rules=RULES, stats=True)
        assert [*mixed.table] == [*result.table]
    for name in ("chgnet/0.2.0", *names, *FOLDS):
        assert not ckdiff.diff(original(name), real(name)).differs


def test_fine_tune_on_the_command_line() -> None:
    paths = real("chgnet/0.3.0"), real("chgnet/r2scan")
    status, found = run("diff", *paths, "--exit-code")
    assert status == 1
    assert (found["elements"], found["tensors"]) == (412_525, 136)
    assert round(found["rules"]["exact"]["density"], 4) == 0.9165
    assert found["unpaired"] == unpaired_names([])
    assert found["bytes_read"] == 2 * 4 * 412_525


def test_successor_has_added_removed_and_reshaped_tensors(tmp_path: Path) -> None:
    paths = real("chgnet/0.2.0"), real("chgnet/0.3.0")
    base, tuned = map(load_file, paths)
    result = ckdiff.diff(*paths, tmp_path / "out.zarr", rules=RULES, stats=True)
    assert_agrees(result, base, tuned)

    shared = base.keys() & tuned.keys()
    reshaped = {name for name in shared if base[name].shape != tuned[name].shape}
    assert {reason: set(names) for reason, names in result.unpaired.items()} == {
        "added": tuned.keys() - base.keys(),
        "removed": base.keys() - tuned.keys(),
        "reshaped": reshaped,
        "retyped": set(),
        "missing": set(),
    }
    counts = {reason: len(names) for reason, names in result.unpaired.items()}
    assert counts == {"added": 46, "removed": 9, "reshaped": 7, "retyped": 0, "missing": 0}
    assert set(result.table.names) == shared - reshaped
    for detail in result.unpaired_details:
        if detail["reason"] == "reshaped":
            assert detail["base_shape"] == list(base[detail["name"]].shape)
            assert detail["tuned_shape"] == list(tuned[detail["name"]].shape)


# -- five folds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(combinations(FOLDS, 2)))
def test_folds_pairwise(first: str, second: str, tmp_path: Path) -> None:
    paths = real(first), real(second)
    result = ckdiff.diff(*paths, tmp_path / "out.zarr", rules=RULES, stats=True)
    assert_agrees(result, *map(load_file, paths))

    assert len(result.table) == 98
    assert result.elements == 1_036_460
    # what is computed and not trained is the same in every fold
    assert [record.name for record in result.table if not record.changed["exact"]] == CONSTANTS
    assert result.store is not None
    assert result.store.masks == tuple(RULES)
    result.store.check()


def test_swapping_the_sides_of_a_diff_changes_nothing_but_the_norms(tmp_path: Path) -> None:
    one, other = real(FOLDS[0]), real(FOLDS[1])
    there = ckdiff.diff(one, other, tmp_path / "there.zarr", rules=RULES, stats=True)
    back = ckdiff.diff(other, one, tmp_path / "back.zarr", rules=RULES, stats=True)
    assert there.rules == back.rules
    assert there.store is not None
    assert back.store is not None
    for rule in RULES:
        assert np.array_equal(there.store.array(rule)[:], back.store.array(rule)[:])
    for record, reverse in zip(there.table, back.table, strict=True):
        assert record.statistics is not None
        assert reverse.statistics is not None
        swapped = dict(reverse.statistics)
        swapped["l2_base"], swapped["l2_tuned"] = swapped["l2_tuned"], swapped["l2_base"]
        assert record.statistics == swapped


# -- identity, and a few elements of a large model -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "dtypes"),
    [
        ("minilm", 104, 22_713_728, {"F32", "I64"}),
        ("wordllama", 1, 8_192_000, {"F16"}),
    ],
)
def test_a_checkpoint_equals_itself(
    name: str, tensors: int, elements: int, dtypes: set[str], tmp_path: Path
) -> None:
    path = real(name)
    result = ckdiff.diff(path, path, tmp_path / "out.zarr", rules=RULES, stats=True)
    assert not result.differs
    assert (len(result.table), result.elements) == (tensors, elements)
    assert set(result.table.dtypes) == dtypes
    assert result.rules == {rule: {"changed": 0, "density": 0.0} for rule in RULES}
    assert result.store is not None
    for rule in RULES:
        assert np.count_nonzero(result.store.array(rule)[:]) == 0
    for record in result.table:
        assert record.base_hash == record.tuned_hash
        assert record.statistics is not None
        assert record.statistics["l2_delta"] == record.statistics["max_abs_delta"] == 0
        assert record.statistics["ulp_histogram"] == []


def lightly_modified(base: Model) -> tuple[Model, dict[str, set[int]]]:
    """A copy with a few elements changed, and which: tensor -> flat positions."""
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    chosen = random.Random(7)
    names = sorted(name for name, tensor in tuned.items() if tensor.is_floating_point())
    touched: dict[str, set[int]] = {}
    for name in chosen.sample(names, 12):  # the lowest bit of a few elements
        bits = raw(tuned[name]).view(-1)
        at = chosen.sample(range(len(bits)), 5)
        bits[at] ^= 1
        touched[name] = set(at)
    quiet = next(name for name in names if name not in touched)
    flat = tuned[quiet].view(-1)
    flat[0], flat[1], flat[2] = torch.nan, torch.inf, -flat[2]
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    touched[quiet] = {0, 1, 2, len(flat) - 1}
    return tuned, touched


def reshard(model: Model, directory: Path) -> Path:
    """Write a model as three shards in no order, with an index."""
    directory.mkdir()
    names = list(model)
    random.Random(8).shuffle(names)
    weight_map = {}
    for shard in range(3):
        part = names[shard::3]
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file({name: model[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(directory, weight_map)
    return directory


def test_a_few_elements_found_across_other_shards(tmp_path: Path) -> None:
    path = real("minilm")
    base = load_file(path)
    tuned, touched = lightly_modified(base)
    tuned["embeddings.position_ids"][0, 100] += 2**40
    touched["embeddings.position_ids"] = {100}

    shards = reshard(tuned, tmp_path / "shards")
    result = ckdiff.diff(path, shards, tmp_path / "shards.zarr", rules=["exact", "ulp=1"])
    assert result.store is not None
    assert not any(result.unpaired.values())
    for record in result.table:
        positions = touched.get(record.name, set())
        found = np.flatnonzero(result.store.mask(record.name, "exact"))
        assert set(found.tolist()) == positions, record.name
        assert (record.base_hash == record.tuned_hash) == (not positions), record.name
    assert result.rules["exact"]["changed"] == 12 * 5 + 4 + 1
    # a NaN, an infinity, a changed sign and 2**40: all the rest are neighbours
    assert result.rules["ulp=1"]["changed"] == 4

    # the shards make no difference: one file gives the same masks, counts and hashes
    save_file(tuned, tmp_path / "one.safetensors")
    single = ckdiff.diff(
        path, tmp_path / "one.safetensors", tmp_path / "one.zarr", rules=["exact", "ulp=1"]
    )
    assert single.store is not None
    assert list(single.store.tensors) == list(result.store.tensors)
    for rule in ("exact", "ulp=1"):
        assert np.array_equal(single.store.array(rule)[:], result.store.array(rule)[:])
    assert not ckdiff.diff(tmp_path / "one.safetensors", shards).differs


def test_half_precision_under_every_rule(tmp_path: Path) -> None:
    path = real("wordllama")
    base = load_file(path)
    torch.manual_seed(11)
    moved = {}
    for name, tensor in base.items():
        step = torch.randn(tensor.shape) * tensor.abs().float() * 2**-10
        moved[name] = torch.where(torch.rand(tensor.shape) < 0.1, tensor.float() + step, tensor)
    tuned = {name: tensor.to(torch.float16) for name, tensor in moved.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    result = ckdiff.diff(
        path, tmp_path / "tuned.safetensors", tmp_path / "out.zarr", rules=RULES, stats=True
    )
    assert_agrees(result, base, tuned)
    counts = [result.rules[rule]["changed"] for rule in RULES]
    assert all(0 < count < result.elements / 10 for count in counts)
    assert max(counts) == counts[0]
