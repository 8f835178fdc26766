"""``ckdiff overlap``: its JSON against numpy, its text, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import numpy as np
import numpy.typing as npt
import pytest
from cli_support import error, ok, python, run
from mask_stores import Base, Flags, make_base, make_store, random_base

import ckdiff
from ckdiff.cli import options, overlap_page
from ckdiff.cli import overlap as overlap_command
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.running import dask as daskrun
from ckdiff.stores.summaries import By, layer_of, module_of

SHAPES = {
    "model.embed.weight": ("BF16", (60, 32)),
    "model.layers.0.attn.q.weight": ("BF16", (64, 64)),
    "model.layers.0.mlp.up.weight": ("BF16", (33, 40)),
    "model.layers.1.attn.q.weight": ("BF16", (64, 64)),
    "model.layers.1.mlp.up.weight": ("U8", (33, 40)),
    "model.layers.1.norm.weight": ("BF16", (9,)),
    "nothing": ("U8", (0, 4)),
}
GROUP_OF = {
    "tensor": lambda name: name,
    "layer": layer_of,
    "module": module_of,
    "dtype": lambda name: SHAPES[name][0],
    "model": lambda name: "model",
}


class Runs(NamedTuple):
    """Stores with known masks."""

    base: str
    stores: list[str]
    masks: list[dict[str, Flags]]
    tensors: Base


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Three runs that share more than chance gives."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(3)
    base = random_base(rng, SHAPES)
    common = {name: rng.random(shape) < 0.2 for name, (_, shape) in SHAPES.items()}
    masks = [
        {name: both ^ (rng.random(both.shape) < noise) for name, both in common.items()}
        for noise in (0.05, 0.1, 0.3)
    ]
    stores = [
        str(make_store(folder / f"run{i}.zarr", base, mask).path) for i, mask in enumerate(masks)
    ]
    ok("overlap", *stores, "--base", str(make_base(folder / "base", base)), "--null", "magnitude")
    return Runs(str(folder / "base"), stores, masks, base)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def overlap_json(*args: str) -> Any:
    return json.loads(ok("overlap", *args, "--json").stdout)


def overlap_text(*args: str) -> str:
    return ok("overlap", *args).stdout


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))


def flat(mask: dict[str, Flags], names: list[str]) -> Flags:
    return np.concatenate([mask[name].ravel() for name in names])


def tensor_expectation(masks: list[Flags]) -> float:
    """What chance gives two masks of one tensor."""
    one, other = (int(mask.sum()) for mask in masks)
    return one * other / masks[0].size if masks[0].size else 0.0


# JSON


@pytest.mark.parametrize("by", options.BY)
def test_json_is_the_contract(runs: Runs, by: str) -> None:
    found = overlap_json(*runs.stores, "--by", by, "--null", "tensor", "--null", "model")
    assert found.keys() == {
        "stores", "rule", "by", "nulls", "rows", "left_out", "other_base", "unknown_base", "seconds"
    }  # fmt: skip
    assert found["stores"] == runs.stores
    assert (found["rule"], found["by"], found["nulls"]) == ("exact", by, ["tensor", "model"])
    assert found["left_out"] == found["other_base"] == []
    groups = {"model": list(SHAPES)}
    if by != "model":
        for name in SHAPES:
            groups.setdefault(GROUP_OF[by](name), []).append(name)
    rows = {row["group"]: row for row in found["rows"]}
    assert rows.keys() == groups.keys()
    assert found["rows"][0]["group"] == "model"
    for group, names in groups.items():
        check_row(rows[group], names, runs.masks)


def check_row(row: Any, names: list[str], masks: list[dict[str, Flags]]) -> None:
    """A row against numpy."""
    assert row.keys() == {"group", "elements", "sizes", "pairs", "votes"}
    flags = [flat(mask, names) for mask in masks]
    elements = len(flags[0])
    assert row["elements"] == elements
    assert row["sizes"] == [int(flag.sum()) for flag in flags]
    votes = np.bincount(np.sum(flags, axis=0), minlength=len(masks) + 1)
    assert row["votes"] == votes.tolist()
    assert sum(row["votes"]) == elements
    pairs = list(itertools.combinations(range(len(masks)), 2))
    assert [(pair["a"], pair["b"]) for pair in row["pairs"]] == pairs
    for pair in row["pairs"]:
        one, other = flags[pair["a"]], flags[pair["b"]]
        expected = {
            "tensor": sum(
                tensor_expectation([masks[pair[k]][name] for k in "ab"]) for name in names
            ),
            "model": tensor_expectation([one, other]),
        }
        check_pair(pair, one, other, expected)


def check_pair(pair: Any, one: Flags, other: Flags, expected: dict[str, float]) -> None:
    both, union = int((one & other).sum()), int((one | other).sum())
    a, b = int(one.sum()), int(other.sum())
    assert pair.keys() >= {
        "a", "b", "intersection", "union", "jaccard", "o1", "o2", "lift", "z", "expected_jaccard",
        "nulls",
    }  # fmt: skip
    assert (pair["intersection"], pair["union"]) == (both, union)
    assert pair["jaccard"] == (both / union if union else None)
    assert pair["o1"] == (both / a if a else None)
    assert pair["o2"] == (both / b if b else None)
    if a and b:
        assert pair["o1"] * a == pytest.approx(pair["o2"] * b, rel=1e-12)
    assert list(pair["nulls"]) == list(expected)
    for name, mean in expected.items():
        found = pair["nulls"][name]
        assert found.keys() == {"expected", "lift", "z", "expected_jaccard"}
        assert found["expected"] == pytest.approx(mean, rel=1e-12)
        assert found["lift"] == (pytest.approx(both / mean, rel=1e-12) if mean else None)
        if mean:
            assert found["expected_jaccard"] == pytest.approx(mean / (a + b - mean), rel=1e-12)
    first = next(iter(pair["nulls"].values()))
    assert {key: pair[key] for key in ("lift", "z", "expected_jaccard")} == {
        key: first[key] for key in ("lift", "z", "expected_jaccard")
    }


def test_the_default_null_is_tensor_and_rows_are_layers(runs: Runs) -> None:
    found = overlap_json(*runs.stores[:2])
    assert (found["by"], found["nulls"]) == ("layer", ["tensor"])
    assert list(found["rows"][0]["pairs"][0]["nulls"]) == ["tensor"]


def test_every_null(runs: Runs) -> None:
    nulls = [word for name in NULLS for word in ("--null", name)]
    found = overlap_json(*runs.stores, *nulls, "--base", runs.base)
    for row in found["rows"]:
        for pair in row["pairs"]:
            assert list(pair["nulls"]) == list(NULLS)
            if row["group"] == "model":
                assert all(figures["z"] > 10 for figures in pair["nulls"].values())


def test_the_order_of_stores_changes_only_positions(runs: Runs) -> None:
    one = overlap_json(*runs.stores)["rows"][0]
    other = overlap_json(*runs.stores[::-1])["rows"][0]
    mirrored = {(2 - pair["b"], 2 - pair["a"]): pair for pair in other["pairs"]}
    for pair in one["pairs"]:
        mirror = mirrored[pair["a"], pair["b"]]
        assert (pair["jaccard"], pair["o1"], pair["o2"]) == (
            mirror["jaccard"], mirror["o2"], mirror["o1"]
        )  # fmt: skip
        assert pair["lift"] == pytest.approx(mirror["lift"], rel=1e-12)
    assert one["votes"] == other["votes"]


def test_what_the_command_prints_is_what_the_api_gives(runs: Runs) -> None:
    result = ckdiff.overlap(runs.stores, by="module", nulls=["rowcol"])
    found = overlap_json(
        *runs.stores, "--by", "module", "--null", "rowcol", "--workers", "1", "--memory", "512MiB"
    )
    expected = json.loads(json.dumps(result.to_dict()))
    assert expected.pop("seconds") > 0
    assert found.pop("seconds") > 0
    assert found == expected


def test_choices_are_those_of_the_library() -> None:
    (asked,) = (option for option in overlap_command.command.params if option.name == "nulls")
    assert isinstance(asked.type, click.Choice)
    assert tuple(NULLS) == tuple(asked.type.choices)
    assert get_args(By) == options.BY


# masks at the edge


def store_of(folder: Path, name: str, value: npt.ArrayLike) -> str:
    """A store of two matrices whose masks are ``value`` and its first half."""
    mask = np.zeros((16, 16), bool)
    mask[:] = value
    masks = {"layers.0.w": mask, "layers.1.w": mask & (np.arange(16) < 8)}
    base: Base = {key: ("U8", (16, 16), np.zeros(256, np.uint8)) for key in masks}
    return str(make_store(folder / name, base, masks).path)


def test_the_same_store_twice(runs: Runs) -> None:
    row = overlap_json(runs.stores[0], runs.stores[0])["rows"][0]
    (pair,) = row["pairs"]
    assert (pair["jaccard"], pair["o1"], pair["o2"]) == (1, 1, 1)
    assert row["votes"][1] == 0
    text = overlap_text(runs.stores[0], runs.stores[0])
    assert re.search(r"^1 run0, 2 run0 +[\d,]+ +100 % +100 % +1 +\d\.\d\d$", text, re.M)


def test_disjoint_masks(tmp_path: Path) -> None:
    even = store_of(tmp_path, "even.zarr", np.arange(16) % 2 == 0)
    odd = store_of(tmp_path, "odd.zarr", np.arange(16) % 2 == 1)
    row = overlap_json(even, odd)["rows"][0]
    (pair,) = row["pairs"]
    assert (pair["jaccard"], pair["lift"], row["votes"][2]) == (0, 0, 0)
    assert pair["z"] < 0
    assert "They share 0 changed elements: 0.00 times what chance" in overlap_text(even, odd)


def test_empty_masks_have_no_figures(tmp_path: Path) -> None:
    none, full = store_of(tmp_path, "none.zarr", 0), store_of(tmp_path, "full.zarr", 1)
    nulls = [word for name in ("model", "tensor", "rowcol") for word in ("--null", name)]
    for stores in ([none, none], [none, full], [none, full, none]):
        found = overlap_json(*stores, *nulls)
        pair = found["rows"][0]["pairs"][0]
        assert pair["intersection"] == 0
        assert pair["o1"] is pair["lift"] is pair["z"] is None
        assert pair["jaccard"] == (0 if full in stores else None)
        text = overlap_text(*stores, *nulls)
        assert "There is no lift: chance would give no shared elements over all elements." in text
        assert "No layer is ranked" in text
        assert "nan" not in text
    row = re.search(r"^1 none, 2 full +(.*)$", overlap_text(none, full), re.M)
    assert row is not None
    assert row[1].split() == ["0", "-", "0", "%", "0", "-"]


def test_groups_that_leave_chance_nothing_are_not_ranked(tmp_path: Path) -> None:
    full = store_of(tmp_path, "full.zarr", 1)
    text = overlap_text(full, store_of(tmp_path, "some.zarr", np.arange(16) % 3 == 0))
    assert re.search(r"^layers\.1 +256 +", text, re.M)
    assert "\nlayers.0 " not in text
    assert "Not ranked: 1 layer; chance gives" in text


def test_tensors_without_elements(tmp_path: Path) -> None:
    base: Base = {"w": ("U8", (0, 3), np.zeros(0, np.uint8))}
    masks = {"w": np.zeros((0, 3), bool)}
    stores = [str(make_store(tmp_path / f"{i}.zarr", base, masks).path) for i in range(2)]
    row = overlap_json(*stores)["rows"][0]
    assert (row["elements"], row["votes"]) == (0, [0, 0, 0])
    assert "2 runs, exact masks of 0 elements" in overlap_text(*stores)


def test_sixty_four_stores(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    many = (runs.stores * 22)[:64]
    row = overlap_json(*many, "--by", "model")["rows"][0]
    assert len(row["pairs"]) == 64 * 63 // 2
    assert len(row["votes"]) == 65
    assert sum(row["votes"]) == row["elements"]
    on_terminal(monkeypatch, 80)
    text = overlap_text(*many, "--top", "2")
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^… 2,012 more$", text, re.M)
    assert [line.split("  ")[0] for line in text.splitlines() if " runs  " in line] == [
        "2–3 runs", "4–7 runs", "8–15 runs", "16–31 runs", "32–63 runs", "all 64 runs"
    ]  # fmt: skip
    assert "the null tensor; all of them are in --json" in text


# text


def test_text_of_two_runs(runs: Runs) -> None:
    a, b = (flat(mask, list(SHAPES)) for mask in runs.masks[:2])
    both, union = int((a & b).sum()), int((a | b).sum())
    pair = overlap_json(*runs.stores[:2])["rows"][0]["pairs"][0]
    result = ok("overlap", *runs.stores[:2])
    text = result.stdout
    assert result.stderr == ""
    assert text.startswith(f"2 runs, exact masks of {len(a):,} elements\n")
    assert f"They share {both:,} changed elements: {pair['lift']:.2f} times what" in text
    assert re.search(rf"^1 run0 +{a.sum():,} +[\d.]+ %  {re.escape(runs.stores[0])}$", text, re.M)
    jaccard, lift = f"{both / union:.3f}", f"{pair['lift']:.2f}"
    assert re.search(rf"^1 run0, 2 run1 +{both:,} .* {jaccard} +{lift}$", text, re.M)
    assert re.search(rf"^no run +{len(a) - union:,} ", text, re.M)
    assert re.search(rf"^exactly 1 run +{union - both:,} ", text, re.M)
    assert re.search(rf"^both runs +{both:,} ", text, re.M)
    expected = f"{pair['expected_jaccard']:.3f}"
    assert re.search(rf"^tensor +{lift} +{expected} +{pair['z']:.1f}$", text, re.M)
    assert NULLS["tensor"].rules_out in " ".join(text.split())
    assert NULLS["tensor"].leaves in " ".join(text.split())


def test_text_of_several_runs_and_nulls(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch, 80)
    nulls = [word for name in NULLS for word in ("--null", name)]
    text = overlap_text(*runs.stores, *nulls, "--base", runs.base, "--by", "tensor")
    assert max(map(len, text.splitlines())) <= 80
    pairs = overlap_json(*runs.stores, "--null", "model")["rows"][0]["pairs"]
    lifts = sorted(pair["lift"] for pair in pairs)
    assert re.search(rf"^model +{' +'.join(f'{lift:.2f}' for lift in lifts)} ", text, re.M)
    cells = {(p["a"], p["b"]): f"{p['jaccard']:.3f} +{p['lift']:.2f}" for p in pairs}
    assert "Jaccard of each pair, and lift against the null model" in text
    assert re.search(rf"^1 run0 +{cells[0, 1]} +{cells[0, 2]}$", text, re.M)
    assert re.search(rf"^2 run1 +{cells[1, 2]}$", text, re.M)
    words = " ".join(text.split())
    for name, null in NULLS.items():
        assert f"{name} rules out {null.rules_out}; leaves {null.leaves}." in words
    assert "In a group's row masks are spread over that group" in words
    assert "any other tensor is one cell" in words
    assert "binade (power of two) of |base|" in words
    assert "Read the lift" in words


def test_a_matrix_that_is_too_wide_is_halved(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch, 80)
    text = overlap_text(*runs.stores, *runs.stores, *runs.stores)
    assert "Jaccard above the diagonal, and below it lift against the null tensor" in text
    assert max(map(len, text.splitlines())) <= 80
    first = re.search(r"^1 run0 +– .*$", text, re.M)
    fourth = re.search(r"^4 run0 .*$", text[first.end() :] if first else "", re.M)
    assert first is not None
    assert fourth is not None
    assert first[0].split()[5] == "1", "a run and itself"
    assert float(fourth[0].split()[2]) > 2, "their lift"


def test_groups_are_ranked_by_their_lift_over_all_pairs(runs: Runs) -> None:
    found = overlap_json(*runs.stores, "--by", "tensor")
    lifts = {}
    for row in found["rows"][1:]:
        shared = sum(pair["intersection"] for pair in row["pairs"])
        expected = [pair["nulls"]["tensor"]["expected"] for pair in row["pairs"]]
        if min(expected) >= 10:
            lifts[row["group"]] = shared / sum(expected)
    assert len(lifts) == 5
    ranked = sorted(lifts, key=lambda group: -lifts[group])
    text = overlap_text(*runs.stores, "--by", "tensor", "--top", "1")
    for group in (ranked[0], ranked[-1]):
        assert re.search(rf"^{re.escape(group)} .* {lifts[group]:.2f}$", text, re.M)
    assert f"\n{ranked[1]} " not in text
    assert "\n… 3 more\n" in text
    whole = overlap_text(*runs.stores, "--by", "tensor")
    places = [whole.rindex(f"\n{group} ") for group in ranked]
    assert places == sorted(places)
    assert "Not ranked: 2 tensors" in whole


def test_grouping_by_model_shows_no_groups(runs: Runs) -> None:
    text = overlap_text(*runs.stores, "--by", "model")
    assert "ranked" not in text
    assert text.endswith("z is far from 0.\n")


def test_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    hostile = "layers.0.\x1b[31m\n\u202eevil"
    base: Base = {hostile: ("U8", (64,), np.zeros(64, np.uint8))}
    mask = {hostile: np.arange(64) % 2 == 0}
    stores = [str(make_store(tmp_path / f"\x1b[31m{i}.zarr", base, mask).path) for i in range(2)]
    text = overlap_text(*stores, "--by", "tensor")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "layers.0.\\x1b[31m\\n\\u202eevil" in text
    assert overlap_json(*stores, "--by", "tensor")["rows"][1]["group"] == hostile


def test_figures() -> None:
    ratios = (0.0, 4e-5, 0.25, 0.99999, 1.0, float("nan"))
    assert [*map(overlap_page.ratio, ratios)] == ["0", "4e-05", "0.250", "0.99999", "1", "-"]
    lifts = (0.0, 0.004, 2.206, 12345.6, float("nan"))
    assert [*map(overlap_page.lift, lifts)] == ["0.00", "0.004", "2.21", "12,346", "-"]
    assert [*map(overlap_page.z, (-3.21, 4521.0, float("nan")))] == ["-3.2", "4,521", "-"]


# stores that differ


def test_what_is_left_out_is_listed(runs: Runs, tmp_path: Path) -> None:
    q, up = "model.layers.0.attn.q.weight", "model.layers.0.mlp.up.weight"
    tensors = {**runs.tensors, q: ("BF16", (32, 128), runs.tensors[q][2])}
    mask = {name: flags.reshape(tensors[name][1]) for name, flags in runs.masks[0].items()}
    other = str(make_store(tmp_path / "other.zarr", tensors, mask, skip=[up]).path)
    found = overlap_json(runs.stores[0], other)
    assert found["left_out"] == [
        {"name": q, "reason": "reshaped", "shapes": [[64, 64], [32, 128]]},
        {"name": up, "reason": "missing", "stores": [1]},
    ]
    result = ok("overlap", runs.stores[0], other)
    assert "2 tensors are not in all stores" in result.stderr
    assert re.search(rf"^{re.escape(q)} +shapes \[64, 64\], \[32, 128\]$", result.stdout, re.M)
    assert re.search(rf"^{re.escape(up)} +not in 2 other$", result.stdout, re.M)


@pytest.fixture
def rebased(runs: Runs, tmp_path: Path) -> str:
    """A store whose runs started from another embedding."""
    name = "model.embed.weight"
    dtype, shape, bits = runs.tensors[name]
    tensors = {**runs.tensors, name: (dtype, shape, bits ^ 1)}
    return str(make_store(tmp_path / "rebased.zarr", tensors, runs.masks[1]).path)


def test_other_bases_are_said_or_refused(runs: Runs, rebased: str) -> None:
    result = ok("overlap", runs.stores[0], rebased)
    assert "warning: the stores have different bases" in result.stderr
    assert "The runs have different bases: model.embed.weight differs in content." in result.stdout
    assert overlap_json(runs.stores[0], rebased)["other_base"] == ["model.embed.weight"]
    said = error("overlap", runs.stores[0], rebased, "--require-same-base")
    assert "different bases: model.embed.weight" in said
    assert ok("overlap", *runs.stores, "--require-same-base").stderr == ""


# bad input


def test_stores_that_cannot_be_compared(runs: Runs, tmp_path: Path) -> None:
    assert "not 1" in error("overlap", runs.stores[0])
    assert "STORE" in error("overlap")
    assert "not 65" in error("overlap", *(runs.stores * 22)[:65])
    assert str(tmp_path) in error("overlap", runs.stores[0], str(tmp_path))
    assert "gone.zarr" in error("overlap", runs.stores[0], str(tmp_path / "gone.zarr"))
    elsewhere = store_of(tmp_path, "elsewhere.zarr", 1)
    assert "no tensor in common" in error("overlap", runs.stores[0], elsewhere)


def test_incomplete_and_corrupt_stores(runs: Runs, tmp_path: Path) -> None:
    incomplete, corrupt = tmp_path / "incomplete.zarr", tmp_path / "corrupt.zarr"
    for copy in (incomplete, corrupt):
        shutil.copytree(runs.stores[1], copy)
    (manifest,) = incomplete.glob("*manifest*")
    manifest.unlink()
    assert "incomplete.zarr" in error("overlap", runs.stores[0], str(incomplete))
    (mask,) = (path for path in corrupt.rglob("c/*") if path.is_file())
    damaged = bytearray(mask.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    mask.write_bytes(damaged)
    assert "corrupt.zarr" in error("overlap", runs.stores[0], str(corrupt))


def test_nulls_that_cannot_be(runs: Runs) -> None:
    said = error("overlap", *runs.stores, "--null", "nonsense")
    assert "'nonsense'" in said
    assert "magnitude" in said
    assert "--base" in error("overlap", *runs.stores, "--null", "magnitude")


def test_bases_that_are_not_the_stores(runs: Runs, rebased: str, tmp_path: Path) -> None:
    ask = ("overlap", *runs.stores, "--null", "magnitude", "--base")
    name = "model.embed.weight"
    dtype, shape, bits = runs.tensors[name]
    other = make_base(tmp_path / "other", {**runs.tensors, name: (dtype, shape, bits ^ 1)})
    assert "is not the base of these stores" in error(*ask, str(other))
    fewer = make_base(tmp_path / "fewer", {name: runs.tensors[name]})
    assert "has no model.layers.0" in error(*ask, str(fewer))
    assert "gone" in error(*ask, str(tmp_path / "gone"))
    result = run(
        "overlap", runs.stores[0], rebased, "--null", "magnitude", "--base", runs.base
    )  # fmt: skip
    warning, said = result.stderr.splitlines()
    assert result.exit_code == 2
    assert "warning: the stores have different bases" in warning
    assert "one base" in said


def test_a_base_that_nothing_reads_is_mentioned(runs: Runs) -> None:
    result = ok("overlap", *runs.stores, "--base", runs.base)
    assert (
        "hint: --base was not needed: only --null magnitude reads it, and directions"
        in result.stderr
    )


def test_rules(runs: Runs, tmp_path: Path) -> None:
    folder = Path(runs.stores[0]).with_suffix(".checkpoints")
    for name, rules in (("a", ["ulp=0"]), ("b", ["ulp=1"]), ("both", ["ulp=1", "ulp=0"])):
        ckdiff.diff(folder / "base", folder / "tuned", tmp_path / f"{name}.zarr", rules=rules)
    a, b, both = (str(tmp_path / f"{name}.zarr") for name in ("a", "b", "both"))
    assert "--rule" in error("overlap", a, b)
    assert "--rule" in error("overlap", a, both)
    assert "no mask for the rule ulp=1" in error("overlap", a, both, "--rule", "ulp=1")
    assert "ulp=x" in error("overlap", a, both, "--rule", "ulp=x")
    found = overlap_json(a, both, "--rule", "ulp=0")
    assert found["rule"] == "ulp=0"
    assert found["rows"][0]["pairs"][0]["jaccard"] == 1


def test_options_that_make_no_sense(runs: Runs) -> None:
    for bad in (("--by", "colour"), ("--workers", "0"), ("--top", "0"), ("--memory", "much")):
        assert bad[1] in error("overlap", *runs.stores, *bad)
    assert "too little" in error("overlap", *runs.stores, "--memory", "1MiB")


def test_a_scheduler_that_does_not_answer(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daskrun, "_PATIENCE", 0.5)
    assert daskrun._CONNECTING <= 30  # as documented
    monkeypatch.setattr(daskrun, "_CONNECTING", 1.5)
    with socket.socket() as taken:  # bound and not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        said = error("overlap", *runs.stores, "--scheduler", address)
    assert f"the scheduler {address} does not answer" in said
    assert "does not answer" in error("overlap", *runs.stores, "--scheduler", "nonsense://x")


_STOPPED = """
import os, signal, sys
from ckdiff.cli import main
from ckdiff.overlaps.counting import OverlapTask
def stop(self, chunk, stop):
    os.kill(os.getpid(), signal.SIGINT)
    stop.wait(30)
OverlapTask.__call__ = stop
main(sys.argv[1:])
"""


def test_ctrl_c_is_one_line(runs: Runs) -> None:
    done = python(_STOPPED, "overlap", *runs.stores)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ckdiff: error: interrupted\n"
