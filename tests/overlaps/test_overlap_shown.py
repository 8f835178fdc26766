"""Overlaps as notebooks show them: the numbers are those of the JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_data import make_runs

import ckdiff
from ckdiff.errors import UsageError


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ckdiff.Overlap:
    runs = make_runs(tmp_path_factory.mktemp("overlap"), 3)
    return ckdiff.overlap(runs.stores, nulls=["tensor", "model"])


def test_records_are_rows_and_pairs(found: ckdiff.Overlap) -> None:
    records = iter(found.records())
    for row in found.rows():
        for pair in row["pairs"]:
            record = next(records)
            assert record["group"] == row["group"]
            assert record["run_b"] == found.stores[pair["b"]]
            assert record["size_a"] == row["sizes"][pair["a"]]
            assert record["size_b"] == row["sizes"][pair["b"]]
            assert record["z:model"] == pair["nulls"]["model"]["z"]
            assert {k: record[k] for k in pair if k != "nulls"} == {
                k: v for k, v in pair.items() if k != "nulls"
            }
    assert next(records, None) is None
    for frame in (found.to_pandas(), found.to_polars()):
        assert len(frame) == 3 * len(found.groups)
        assert list(frame.columns) == list(found.records()[0])


def test_the_table_of_a_notebook(found: ckdiff.Overlap) -> None:
    shown = found._repr_html_()
    assert "3 runs (exact)" in shown
    assert f"{found.counts[0, 1]:,}" in shown
    assert "lift (tensor)" in shown
    assert "lift (model)" in shown
    assert "left out" not in shown
    listed = replace(
        found, left_out=[{"name": "<b>"}], other_base=["x", "y"], unknown_base=["z"], rule="<i>"
    )._repr_html_()
    assert "1 tensor left out" in listed
    assert "2 tensors began with different weights" in listed
    assert "1 tensor may have begun with different weights" in listed
    assert "<i>" not in listed


def test_pictures(found: ckdiff.Overlap) -> None:
    assert len(found.plot.overlap().rows) == 6
    lifts = {row["lift"] for row in found.plot.overlap("model").rows}
    assert lifts == {pair["nulls"]["model"]["lift"] for pair in found.rows()[0]["pairs"]}
    assert [row["elements"] for row in found.plot.votes().rows] == found.rows()[0]["votes"]
    with pytest.raises(UsageError, match=r"magnitude was not asked for.*tensor, model"):
        found.plot.overlap("magnitude")


def test_a_store_that_is_given_twice(found: ckdiff.Overlap) -> None:
    twice = replace(found, stores=[found.stores[0]] * 3)
    assert {row["a"] for row in twice.plot.overlap().rows} == {"run0", "run0 (2)", "run0 (3)"}
