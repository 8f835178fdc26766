"""``ckdiff report``: its numbers are those of the stores, and nothing in it can act or be lost."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import error, ok
from mask_stores import make_store, random_base
from report_data import HOSTILE, Runs, make_runs, page_json, page_table
from support import write_safetensors
from timelines import some_run, write_run

import ckdiff
from ckdiff.errors import CkdiffError, OutputError, UsageError, printable
from ckdiff.figures import drawing
from ckdiff.figures.figure import shown
from ckdiff.reports.page import document
from ckdiff.reports.report import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def made(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A page of two runs with their base, and its data."""
    out = tmp_path_factory.mktemp("page") / "r.html"
    data = report(runs.stores, out, base=runs.base).to_dict()
    return out.read_text("utf-8"), data


def test_the_numbers_are_those_of_the_stores(made: tuple[str, dict[str, Any]], runs: Runs) -> None:
    page, data = made
    stores = [ckdiff.open_store(path) for path in runs.stores]
    for run, store in zip(data["runs"], stores, strict=True):
        assert run["elements"] == store.table.total_elements
        assert run["rules"]["exact"]["changed"] == int(store.table.changed["exact"].sum())
        assert run["layers"] == store.summary("layer")
    table = page_table(page)
    densities = data["tensors"]["density"]
    assert table["name"] == list(map(printable, data["tensors"]["name"]))
    assert table | {"density": densities, "name": data["tensors"]["name"]} == data["tensors"]
    for column, shares in zip(table["changed"], densities, strict=True):
        assert shares == [n / size for n, size in zip(column, table["elements"], strict=True)]
    for i, name in enumerate(data["tensors"]["name"]):
        for column, store in zip(table["changed"], stores, strict=True):
            assert column[i] == int(store.mask(name).sum())
    overlap = ckdiff.overlap(runs.stores, by="model", nulls=["magnitude"], base=runs.base)
    (pair,) = overlap.rows()[0]["pairs"]
    (shown,) = data["overlap"]["rows"][0]["pairs"]
    assert shown["nulls"]["magnitude"] == pair["nulls"]["magnitude"]


#: where a mark stands, not what it says
_PLACES = ("layer", "bin", "step", "position", "order", "runs")


def test_every_number_drawn_is_in_the_data(made: tuple[str, dict[str, Any]]) -> None:
    page, data = made
    known = set(map(str, numbers({k: v for k, v in data.items() if k != "drawn"})))
    figures = page_json(page)["figures"]
    rows = [json.loads(json.dumps(rows)) for rows in data["drawn"].values()]
    assert [figure["rows"] for figure in figures if figure["rows"]] == shown(rows)
    for figure in figures:
        for row in figure["rows"]:
            for key, value in row.items():
                if isinstance(value, int) and not isinstance(value, bool) and key not in _PLACES:
                    assert str(value) in known, (key, value)


def numbers(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [n for value in data.values() for n in numbers(value)]
    if isinstance(data, list):
        return [n for value in data for n in numbers(value)]
    return [data]


def test_magnitudes_are_those_of_the_base(made: tuple[str, dict[str, Any]], runs: Runs) -> None:
    _, data = made
    stores = [ckdiff.open_store(path) for path in runs.stores]
    with ckdiff.open_checkpoint(runs.base) as base:
        names = list(base.table.names)
    counts: dict[int, np.ndarray[Any, Any]] = {}
    from safetensors.torch import load_file  # numpy has no bfloat16

    values = {k: v.float().numpy() for k, v in load_file(runs.base).items()}
    for name in names:
        exponents = np.frexp(np.abs(values[name]))[1] - 1
        for exponent in np.unique(exponents).tolist():
            here = exponents == exponent
            row = counts.setdefault(exponent, np.zeros(3, np.int64))
            row += [here.sum(), *(int((store.mask(name) & here).sum()) for store in stores)]
    found = {row["exponent"]: [row["elements"], *row["changed"]] for row in data["magnitudes"]}
    assert found == {k: row.tolist() for k, row in counts.items()}


def test_nothing_in_a_name_acts(made: tuple[str, dict[str, Any]]) -> None:
    page, _ = made
    assert "<img" not in page.split('<script type="module">')[0]
    assert printable(HOSTILE) in page_table(page)["name"]
    scripts = re.findall(r"<script[ >].*?</script>", page, re.S)
    assert len(scripts) == 3  # the data, the table, the code: none was ended early
    assert page.count("</script>") == 3
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert not re.search(r'(src|href)="(?!#)', page.split('<script type="module">')[0])


def test_no_address_is_asked_for(made: tuple[str, dict[str, Any]]) -> None:
    """The page loads nothing: no tag of it names another file."""
    page, _ = made
    markup = re.sub(r"<script[ >].*?</script>", "", page, flags=re.S)
    assert not re.findall(r"<(?:link|script|img|iframe|object|embed)\b", markup)
    assert "url(" not in markup


def test_it_is_the_same_each_time(runs: Runs, tmp_path: Path) -> None:
    pages = []
    for name in "ab":
        report(runs.stores, tmp_path / f"{name}.html")
        pages.append((tmp_path / f"{name}.html").read_bytes())
    assert pages[0] == pages[1]


def test_one_store_without_a_base(runs: Runs, tmp_path: Path) -> None:
    data = json.loads(ok("report", runs.stores[0], "-o", str(tmp_path / "r.html"), "--json").stdout)
    assert data["overlap"] is None
    assert data["magnitudes"] is None
    assert data["report"] == str(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert 'id="overlap"' not in page
    assert 'id="heatmap-1-1"' in page


def test_figures_are_files(runs: Runs, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    out = str(tmp_path / "r.html")
    said = ok("report", *runs.stores, "-o", out, "--figures", str(figures)).stdout
    assert "pictures in" in said
    listed = json.loads((figures / "figures.json").read_text())
    assert sorted(listed["files"]) == sorted(
        p.name for p in figures.iterdir() if p.suffix != ".json"
    )
    for path in figures.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    for path in figures.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    ok("report", runs.stores[0], "-o", out, "--figures", str(figures))  # ours: made anew
    assert not (figures / "overlap.svg").exists()
    (figures / "notes.txt").write_text("mine")
    assert "holds more than" in error(
        "report", runs.stores[0], "-o", out, "--figures", str(figures)
    )
    assert (figures / "notes.txt").read_text() == "mine"


def test_only_a_report_is_replaced(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    out.write_text("<!doctype html>\nmine")
    with pytest.raises(OutputError, match="is not a report"):
        report(runs.stores[:1], out)
    assert out.read_text() == "<!doctype html>\nmine"
    with pytest.raises(OutputError, match=r"lies inside|would replace"):
        report(runs.stores[:1], Path(runs.stores[0]) / "new.html")


def test_a_spectrum_is_shown(runs: Runs, tmp_path: Path) -> None:
    row = {"name": HOSTILE, "shape": [8, 8], "rank": 8, "stable_rank": 2.5, "rank99": 6}
    rows = [row | {"norm2": 0.5, "sampled": True}]
    (tmp_path / "s.json").write_text(json.dumps({"rows": rows}))
    data = report(runs.stores[:1], tmp_path / "r.html", spectrum=tmp_path / "s.json").to_dict()
    assert data["spectrum"]["rows"] == rows
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "They are a sample" in page
    assert "<img" not in page.split('<script type="module">')[0]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"rows": 3}', '{"rows": [{}]}', "[" * 5000,
        '{"rows": [{"name": "a", "sampled": true, "shape": ["x"]}]}',
    ],
)  # fmt: skip
def test_what_is_no_spectrum(text: str, runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match="is not what ckdiff spectrum --json prints"):
        report(runs.stores[:1], tmp_path / "r.html", spectrum=tmp_path / "s.json")
    assert not (tmp_path / "r.html").exists()


def test_another_base_is_refused(runs: Runs, tmp_path: Path) -> None:
    other = make_runs(tmp_path / "other", 1)
    tuned = Path(other.stores[0]).with_suffix(".checkpoints") / "tuned" / "model.safetensors"
    with pytest.raises(CkdiffError, match="base"):
        report(runs.stores, tmp_path / "r.html", base=tuned)
    assert not (tmp_path / "r.html").exists()


def test_without_the_library(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise UsageError("pictures need the package vl-convert-python", hint="pip install it")

    drawing.script.cache_clear()
    monkeypatch.setattr(drawing, "_library", missing)
    with pytest.raises(UsageError, match="vl-convert-python"):
        report(runs.stores[:1], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_scripts_end_where_they_end() -> None:
    assert "</script" not in document._script("a = '</script>'; b = '<!-- x';")
    assert "<!--" not in document._script("a = '</script>'; b = '<!-- x';")


def test_a_timeline_is_shown_with_its_last_step(runs: Runs, tmp_path: Path) -> None:
    tuned = [Path(store).with_suffix(".checkpoints") / "tuned" for store in runs.stores]
    made = ckdiff.timeline([runs.base.parent, *tuned], tmp_path / "run", stats=True)
    data = report([tmp_path / "run"], tmp_path / "r.html").to_dict()
    (shown,) = data["timelines"]
    counted = [{k: v for k, v in step.items() if k != "checkpoint"} for step in made.steps]
    assert [{k: step[k] for k in counted[0]} for step in shown["steps"]] == counted
    assert shown["layers"] == made.summary("layer")
    (run,) = data["runs"]
    assert run["rules"]["exact"]["changed"] == made.final
    page = (tmp_path / "r.html").read_text("utf-8")
    for drawn in ("timeline-1", "lengths-1", "directions-1"):
        assert f'id="{drawn}"' in page
    found = re.search('id="steps-1">.*?</table>', page, re.S)
    assert found is not None
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in found[0].split("<tr>")[2:]]
    assert [row[1] for row in rows] == shown["checkpoints"]
    since = [
        [f"{step[f'changed_since_{k}']:,}" for k in ("first", "previous")] for step in made.steps
    ]
    assert [[row[2], row[4]] for row in rows[1:]] == since
    again = report([made], tmp_path / "again.html").to_dict()
    assert again["timelines"][0]["layers"] == shown["layers"]


def test_what_a_step_lacks_was_not_compared(tmp_path: Path) -> None:
    """Also where the last checkpoint has it again."""
    made = some_run(3, 4)
    paths, name = write_run(tmp_path, made), "model.layers.0.mlp.weight"
    some = {n: (d, s, sides[1]) for n, (d, s, sides) in made.items() if n != name}
    write_safetensors(paths[1] / "model.safetensors", some)
    ckdiff.timeline(paths, tmp_path / "run")
    data = report([tmp_path / "run"], tmp_path / "r.html").to_dict()
    assert data["timelines"][0]["left_out"] == [name]
    page = (tmp_path / "r.html").read_text("utf-8").split('id="left-out-1"')[1]
    assert f"<td>{name}</td>" in page.split("</table>")[0]


def test_the_shape_is_that_of_structure(made: tuple[str, dict[str, Any]], runs: Runs) -> None:
    _, data = made
    found = ckdiff.structure(runs.stores)
    rows = [row for row in found.each_row() if row["store"] == 0 and "attn.q" in row["name"]]
    changed = sum(row["changed"] for row in rows)
    (shown,) = (
        row
        for row in data["structure"]["modules"]
        if row["store"] == 0 and row["module"] == "attn.q"
    )
    assert (shown["matrices"], shown["changed"]) == (len(rows), changed)
    mean = sum(row["top10_rows"] * row["changed"] for row in rows) / changed
    assert shown["top10_rows"] == pytest.approx(mean)
    for stripe in data["structure"]["stripes"]:
        mask = ckdiff.open_store(runs.stores[stripe["store"]]).mask(stripe["name"])
        assert stripe["rows"] == pytest.approx(mask.mean(1)[: len(stripe["rows"])].tolist())
        assert len(stripe["columns"]) == mask.shape[1]


def test_stores_of_two_models(runs: Runs, tmp_path: Path) -> None:
    """Nothing in common: each is shown, and their agreement is not."""
    rng = np.random.default_rng(1)
    base = random_base(rng, {"other.weight": ("BF16", (64, 64))})
    made = make_store(tmp_path / "o.zarr", base, {"other.weight": rng.random((64, 64)) < 0.5})
    notes: list[str] = []
    observer = ckdiff.Observer(note=notes.append)
    data = report([*runs.stores, made], tmp_path / "r.html", observer=observer).to_dict()
    assert data["overlap"] is None
    assert {row["store"] for row in data["structure"]["modules"]} == {0, 1, 2}
    assert any("no tensor in common" in note for note in notes)
