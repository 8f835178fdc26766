"""Comma-separated values: whole, one line for each row, and nothing that a spreadsheet runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import Pair, bf16, bump, error, ok, write_pair
from support import write_safetensors

from ckdiff.cli import csvs

FORMULAS = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", " =1+1", "\t=1", "\r=1", "\uff1d1"]


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def close(text: str, value: Any) -> bool:
    return text == "" if value is None else float(text) == value


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stores(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("stores")
    found = [str(root / f"{i}.zarr") for i in range(3)]
    for store in found:
        ok("diff", *pair, "-o", store)
    return found


@pytest.mark.parametrize("by", ["tensor", "layer", "module", "dtype", "model"])
def test_diff_prints_what_show_does(pair: Pair, stores: list[str], by: str) -> None:
    assert (
        ok("diff", *pair, "--by", by, "--csv").stdout
        == ok("show", stores[0], "--by", by, "--csv").stdout
    )
    rows = json.loads(ok("diff", *pair, "--by", by, "--json").stdout)
    assert rows["by"] == by
    assert rows["rows"] == json.loads(ok("show", stores[0], "--by", by, "--json").stdout)["rows"]
    top = ("--by", by, "--top", "2")
    assert ok("diff", *pair, *top, "--csv").stdout == ok("show", stores[0], *top, "--csv").stdout


def test_diff_prints_a_table_of_what_is_asked_for(pair: Pair) -> None:
    text = ok("diff", *pair, "--by", "tensor").stdout
    assert text.count("model.layers.") == 9
    assert "model.embed_tokens.weight" in text
    text = ok("diff", *pair, "--by", "tensor", "--top", "1").stdout
    assert text.count("model.layers.") == 1
    assert "model.layers.2.self_attn.q_proj.weight" in text
    assert "rows" not in json.loads(ok("diff", *pair, "--json").stdout)


def test_alone_csv_and_top_mean_layers(pair: Pair) -> None:
    assert parsed(ok("diff", *pair, "--csv").stdout)[0]["group"] == "model.embed_tokens.weight"
    assert len(parsed(ok("diff", *pair, "--csv", "--top", "2").stdout)) == 2
    assert json.loads(ok("diff", *pair, "--top", "2", "--json").stdout)["by"] == "layer"


def test_refusals(pair: Pair, stores: list[str], tmp_path: Path) -> None:
    for command in (
        ("diff", *pair),
        ("overlap", *stores),
        ("show", stores[0]),
        ("structure", stores[0]),
    ):
        assert "cannot be used together" in error(*command, "--csv", "--json")
    for option in (("--csv",), ("--by", "layer"), ("--top", "3")):
        assert "--dry-run compares nothing" in error("diff", *pair, "--dry-run", *option)


@pytest.mark.parametrize("many", [2, 3])
def test_overlap_has_a_line_for_each_row_and_pair(stores: list[str], many: int) -> None:
    asked = ("overlap", *stores[:many], "--by", "layer", "--null", "tensor", "--null", "model")
    lines = parsed(ok(*asked, "--csv").stdout)
    whole = json.loads(ok(*asked, "--json").stdout)
    expected = [(row, pair) for row in whole["rows"] for pair in row["pairs"]]
    assert len(lines) == len(expected) == len(whole["rows"]) * many * (many - 1) // 2
    for line, (row, pair) in zip(lines, expected, strict=True):
        assert line["group"] == row["group"]
        assert int(line["elements"]) == row["elements"]
        assert [int(line["size_a"]), int(line["size_b"])] == [row["sizes"][pair[k]] for k in "ab"]
        assert [line["run_a"], line["run_b"]] == [whole["stores"][pair[k]] for k in "ab"]
        for key in ("intersection", "union", "jaccard", "o1", "o2", "lift", "z"):
            assert close(line[key], pair[key])
        for null, found in pair["nulls"].items():
            assert all(close(line[f"{key}:{null}"], value) for key, value in found.items())


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_stay_text(text: str) -> None:
    (row,) = csv.reader([csvs.line(["x", text, 1.5, -2])])
    assert row[2:] == ["1.5", "-2"], "numbers stay numbers"
    assert row[1].startswith(("'", "\\"))
    assert len(csvs.line([text]).splitlines()) == 1


def test_what_has_no_value_is_empty() -> None:
    assert csvs.line([None, float("nan"), float("inf"), [12, 96], "a,b"]) == ',,,12x96,"a,b"'


def test_hostile_names_in_all_tables(tmp_path: Path) -> None:
    names = [f"{text}.{i}.w" for i, text in enumerate(FORMULAS)]
    base = {name: bf16((4, 8)) for name in names}
    tuned = {name: bump(tensor, 3) for name, tensor in base.items()}
    sides = [
        str(write_safetensors(tmp_path / f"{side}.safetensors", given))
        for side, given in (("base", base), ("tuned", tuned))
    ]
    store = str(tmp_path / "=s.zarr")
    ok("diff", *sides, "-o", store)
    for command in (
        ("diff", *sides, "--by", "tensor"),
        ("diff", *sides, "--by", "layer"),
        ("show", store, "--by", "tensor"),
        ("overlap", store, store, "--by", "tensor"),
        ("structure", store),
        ("timeline", *sides, "--by", "tensor", "-o", str(tmp_path / "run")),
    ):
        text = ok(*command, "--csv").stdout
        lines = list(csv.reader(io.StringIO(text)))
        assert len(lines) == len(text.splitlines()) >= len(names)
        fields = [field for line in lines for field in line]
        wrong = [f for f in fields if f.lstrip().startswith(tuple("=+-@\uff1d\t\r"))]
        assert [f for f in wrong if not f.lstrip("-").replace(".", "").isdigit()] == [], command
