"""``ckdiff combine`` and ``ckdiff random``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import error, ok
from derived_stores import first_bits, tree

import ckdiff


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nested masks of two tensors; the last store has a third one."""
    folder = tmp_path_factory.mktemp("stores")
    numbers = ((100, 0), (200, 10), (700, 20))
    made = []
    for i, (a, b) in enumerate(numbers):
        tensors = {"layers.0.a": (1000, a), "layers.1.b": (50, b)}
        if i == 2:
            tensors["only.here"] = (10, 5)
        made.append(first_bits(folder / f"run{i}.zarr", tensors))
    first_bits(folder / "ulp.zarr", {"layers.0.a": (1000, 1)}, rule="ulp=1")
    return [str(store.path) for store in made]


@pytest.mark.parametrize(
    ("operation", "changed"),
    [
        ("intersection", 100),
        ("union", 720),
        ("difference", 0),
        ("symmetric-difference", 610),
        ("at-least=2", 210),
    ],
)
def test_combine(operation: str, changed: int, stores: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out.zarr")
    result = ok("combine", operation, *stores, "-o", out)
    density = f"{100 * changed / 1050:.2f} %" if changed else "0 %"
    assert result.stdout.splitlines() == [
        f"{operation} of run0.zarr, run1.zarr, run2.zarr: 1,050 elements in 2 tensors",
        f"exact: {changed} changed, {density}",
        f"written to {out}",
    ]
    warning = "1 tensor is not in all stores with one shape and is left out: only.here"
    assert f"ckdiff: warning: {warning}" in result.stderr.splitlines()
    assert ok("check", out).stdout.startswith(f"{out}: ok")
    assert f"{operation} of run0.zarr, run1.zarr, run2.zarr: " in ok("show", out).stdout


def test_combine_json(stores: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out.zarr")
    options = ["--rule", "exact", "--workers", "1", "--json"]
    found = json.loads(ok("combine", "union", *stores[:2], *options, "-o", out).stdout)
    assert found == {
        "store": out,
        "elements": 1050,
        "tensors": 2,
        "rules": {"exact": {"changed": 210, "density": 0.2}},
        "made_by": ckdiff.open_store(out).manifest["made_by"],
    }
    ok("combine", "intersection", *stores[:2], "--overwrite", "-o", out)


def test_combine_many_stores_has_a_short_title(stores: list[str], tmp_path: Path) -> None:
    first = ok("combine", "union", *stores * 3, "-o", str(tmp_path / "o.zarr")).stdout
    assert first.startswith("union of run0.zarr, run1.zarr, run2.zarr, run0.zarr and 5 more: ")


def test_random(stores: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    result = ok("random", "--like", stores[1], "--seed", "7", "-o", str(out))
    assert result.stdout.splitlines() == [
        "random within each tensor, seed 7: 1,050 elements in 2 tensors",
        "exact: 210 changed, 20.00 %",
        f"written to {out}",
    ]
    assert "random within each tensor, seed 7: " in ok("show", str(out)).stdout
    ok("check", str(out))
    before = tree(out)
    more = ["--workers", "1", "--rule", "exact", "--overwrite", "--json"]
    found = json.loads(
        ok("random", "--like", stores[1], "--seed", "7", *more, "-o", str(out)).stdout
    )
    assert tree(out) == before
    assert found["rules"] == {"exact": {"changed": 210, "density": 0.2}}
    assert found["made_by"]["seed"] == 7
    model = ["--within", "model", "-o", str(tmp_path / "model.zarr")]
    first = ok("random", "--like", stores[1], "--seed", "7", *model).stdout.splitlines()[0]
    assert first == "random within the model, seed 7: 1,050 elements in 2 tensors"
    overlap = json.loads(ok("overlap", stores[1], str(out), "--by", "model", "--json").stdout)
    assert overlap["rows"][0]["sizes"] == [210, 210]


def test_one_line_says_what_is_wrong(stores: list[str], tmp_path: Path) -> None:
    one, two, three = stores
    ulp = str(Path(one).with_name("ulp.zarr"))
    exists = str(first_bits(tmp_path / "exists.zarr", {"w": (10, 1)}).path)
    out = ["-o", str(tmp_path / "out.zarr")]
    into = ["-o", exists]
    cases = {
        ("combine", "xor", one, two, *out): "there is no operation 'xor' (one of intersection",
        ("combine", "at-least=0", one, two, *out): "at-least=0 makes no sense with 2 stores",
        ("combine", "at-least=4", *stores, *out): "at-least=4 makes no sense with 3 stores",
        ("combine", "union", one, *out): "not 1",
        ("combine", "union", *out): "Missing argument",
        ("combine", "union", one, two): "Missing option '-o'",
        ("combine", "union", one, two, *into): f"{exists} exists (use --overwrite",
        ("combine", "union", one, ulp, *out): "different rules",
        ("combine", "union", one, two, "--rule", "ulp=1", *out): "no mask for the rule ulp=1",
        ("combine", "union", one, two, "--rule", "nonsense", *out): "rule",
        ("combine", "union", one, exists, *out): "no tensor in common",
        ("combine", "union", one, str(tmp_path), *out): "not a mask store",
        ("combine", "union", one, two, "-o", two, "--overwrite"): "would replace the input",
        ("combine", "union", one, two, "--workers", "0", *out): "workers",
        ("random", "--like", one, *out): "Missing option '--seed'",
        ("random", "--seed", "1", *out): "Missing option '--like'",
        ("random", "--like", one, "--seed", "1"): "Missing option '-o'",
        ("random", "--like", one, "--seed", "-1", *out): "seed must be from 0",
        ("random", "--like", one, "--seed", "x", *out): "not a valid integer",
        ("random", "--like", one, "--seed", "1", "--within", "layer", *out): "layer",
        ("random", "--like", one, "--seed", "1", "--rule", "ulp=1", *out): "no counts for",
        ("random", "--like", one, "--seed", "1", *into): f"{exists} exists",
        ("random", "--like", str(tmp_path), "--seed", "1", *out): "not a mask store",
        ("random", "--like", three, "--seed", "1", "-o", three + "/x"): "lies inside the input",
    }
    for arguments, message in cases.items():
        assert message in error(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["exists.zarr"]
