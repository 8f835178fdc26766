"""Timelines, structure and spectra as notebooks show them: the numbers are those of the JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_data import Runs, make_runs
from timelines import some_run, write_run

import ckdiff
from ckdiff.errors import UsageError
from ckdiff.stores.summaries import module_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("shown"), 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ckdiff.Timeline:
    folder = tmp_path_factory.mktemp("<b>run")
    return ckdiff.timeline(write_run(folder, some_run(3, 5)), folder / "<i>.timeline")


def test_a_timeline(run: ckdiff.Timeline) -> None:
    records = run.records()
    assert [record.pop("step") for record in records] == [1, 2, 3, 4]
    assert records == run.steps
    shown = run._repr_html_()
    assert "4 steps of" in shown
    assert f"{run.steps[-1]['changed_since_first']:,}" in shown
    assert "<i>" not in shown
    assert "<b>" not in shown
    for frame in (run.to_pandas(), run.to_polars()):
        assert list(frame["changed_since_first"]) == [s["changed_since_first"] for s in run.steps]


def test_a_timeline_by_layer(run: ckdiff.Timeline) -> None:
    frame = run.to_polars(by="layer")
    assert len(frame) == 4 * len(run.summary("layer"))
    for step, said in enumerate(run.steps, 1):
        some = frame.filter(frame["step"] == step)
        assert some["changed_since_first"].sum() == said["changed_since_first"]
        assert set(some["checkpoint"]) == {said["checkpoint"]}
    assert len(run.to_pandas(by="model")) == 4
    with pytest.raises(UsageError, match="cannot group by"):
        run.to_pandas(by="nonsense")  # type: ignore[arg-type]


def test_pictures_of_a_timeline(run: ckdiff.Timeline) -> None:
    plot = run.plot
    drawn = [plot.timeline(), plot.coverage(), plot.fates(), plot.layers()]
    assert [f.name for f in drawn] == ["timeline", "coverage", "fates", "layers-over-time"]
    assert {row["elements"] for row in drawn[2].rows} == {run.never, run.returned, run.final}
    assert not plot.lengths().rows  # there are no statistics
    assert not plot.directions().rows
    assert all(figure.svg().startswith("<svg") for figure in drawn)


def test_structure(runs: Runs) -> None:
    found = ckdiff.structure(runs.stores)
    rows, records = list(found.each_row()), found.records()
    for row, record in zip(rows, records, strict=True):
        assert record.pop("run") == runs.stores[row["store"]]
        assert row.pop("fours") == [record.pop(f"fours_{k}") for k in range(5)]
        assert record == row
    for frame in (found.to_pandas(), found.to_polars()):
        assert len(frame) == len(rows)
        assert frame["changed"].sum() == sum(row["changed"] for row in rows)
    shown = found._repr_html_()
    assert f"{len(found.names)} matrices (exact)" in shown
    assert "of fewer than two dimensions" in shown
    assert "<script" not in shown
    assert found.plot.concentration().rows


def test_structure_by_module(runs: Runs) -> None:
    found = ckdiff.structure(runs.stores)
    for row in found.by_module():
        some = [
            r
            for r in found.each_row()
            if (r["store"], module_of(r["name"])) == (row["store"], row["module"])
        ]
        total = sum(r["changed"] for r in some)
        assert (row["matrices"], row["changed"]) == (len(some), total)
        mean = sum(r["changed"] * (r["top10_rows"] or 0) for r in some) / total
        assert row["top10_rows"] == pytest.approx(mean)


def test_spectrum(runs: Runs) -> None:
    tuned = Path(runs.stores[0]).with_suffix(".checkpoints") / "tuned"
    found = ckdiff.spectrum(runs.base, tuned, tensors=["*.layers.1.*", "*script*"])
    assert found.records() == found.rows
    for frame in (found.to_pandas(), found.to_polars()):
        assert list(frame["rank"]) == [row["rank"] for row in found.rows]
    shown = found._repr_html_()
    assert f"{len(found.rows)} of {found.matrices} matrices looked at" in shown
    assert "<script" not in shown
    assert found.plot.ranks().rows
    assert len(found.plot.norms().rows) == len(found.rows)
