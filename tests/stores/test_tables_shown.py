"""Stores and diffs as notebooks show them: the numbers are those of the JSON, names are text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_data import HOSTILE, Runs, make_runs

import ckdiff
from ckdiff.errors import CkdiffError, UsageError
from ckdiff.naming import BY


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("shown"), 1)


@pytest.fixture(scope="module")
def store(runs: Runs) -> ckdiff.MaskStore:
    return ckdiff.open_store(runs.stores[0])


@pytest.fixture(scope="module")
def result(runs: Runs) -> ckdiff.DiffResult:
    """Of two rules and with statistics."""
    tuned = Path(runs.stores[0]).with_suffix(".checkpoints") / "tuned"
    return ckdiff.diff(runs.base, tuned, rules=["exact", "atol=0.01"], stats=True)


@pytest.mark.parametrize("by", BY)
def test_records_are_the_summary(store: ckdiff.MaskStore, by: Any) -> None:
    found = store.records(by)
    assert len(found) == len(store.summary(by))
    for record, row in zip(found, store.summary(by), strict=True):
        counts = row["rules"]["exact"]
        assert record["elements"] == row["elements"]
        assert (record["changed:exact"], record["density:exact"]) == tuple(counts.values())
        assert record.get("shape") == row.get("shape")
    for frame in (store.to_pandas(by), store.to_polars(by)):
        assert list(frame.columns) == list(found[0])
        assert len(frame) == len(found)
        assert frame["changed:exact"].sum() == sum(row["changed:exact"] for row in found)


def test_records_of_two_rules_and_statistics(result: ckdiff.DiffResult) -> None:
    found = result.records()
    assert len(found) == len(result.table)
    for record, row in zip(found, result.to_dict()["statistics"], strict=True):
        assert record["name"] == row["name"]
        assert record["sign_flips"] == row["sign_flips"]
    total = sum(record["changed:atol=0.01"] for record in found)
    assert 0 < total == result.rules["atol=0.01"]["changed"] < result.rules["exact"]["changed"]
    assert result.to_pandas()["relative_delta"].isna().sum() == 0


def test_a_wrong_grouping_is_refused(store: ckdiff.MaskStore) -> None:
    for make in (store.records, store.to_pandas, store.to_polars):
        with pytest.raises(UsageError, match="cannot group by"):
            make("nonsense")  # type: ignore[arg-type]


def test_the_table_of_a_notebook(store: ckdiff.MaskStore, result: ckdiff.DiffResult) -> None:
    for shown, table in ((store._repr_html_(), store.table), (result._repr_html_(), result.table)):
        assert f"{table.total_elements:,} elements in {len(table)} tensors changed" in shown
        counts = store.summary("module")[0]
        assert "attn.q" in shown
        assert "<script" not in shown
        assert "<img" not in shown
        assert counts["group"] == "attn.q"
    assert f"{store.summary('module')[0]['rules']['exact']['changed']:,}" in store._repr_html_()
    assert "% (exact)" in result._repr_html_()
    assert "% (atol=0.01)" in result._repr_html_()


def test_what_was_not_compared_is_said(runs: Runs, tmp_path: Path) -> None:
    tuned = Path(runs.stores[0]).with_suffix(".checkpoints") / "tuned"
    renamed = "^model.embed_tokens.weight$=somewhere<b>"
    found = ckdiff.diff(runs.base, tuned, tmp_path / "s.zarr", rename=[renamed])
    for shown in (found._repr_html_(), ckdiff.open_store(tmp_path / "s.zarr")._repr_html_()):
        assert "2 tensors were not compared" in shown
    assert "not compared" not in ckdiff.diff(runs.base, tuned)._repr_html_()


def test_what_was_compared_in_part_is_said(tmp_path: Path) -> None:
    import numpy as np

    base = {"a": np.zeros((4, 2), np.float32), "b": np.zeros(3, np.float32), "c": np.ones(2)}
    tuned = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(3, np.float16), "c": np.ones(2)}
    out = tmp_path / "s.zarr"
    found = ckdiff.diff(base, tuned, out, common_rows=True, exclude=["c"])
    for shown in (found._repr_html_(), ckdiff.open_store(out)._repr_html_()):
        assert "1 tensor was of two dtypes, and compared by value." in shown
        assert "1 tensor was compared in the rows only that both sides have." in shown
    assert "excluded, as requested" in found._repr_html_()


def test_at_most_20_rows_and_the_rest_is_said(tmp_path: Path) -> None:
    import numpy as np
    from mask_stores import make_base

    names = {f"part{i}": ("BF16", (2,), np.zeros(2, np.uint16)) for i in range(50)}
    shown = ckdiff.diff(make_base(tmp_path / "a", names), make_base(tmp_path / "b", names))
    text = shown._repr_html_()
    assert "0 % (exact) of 100 elements in 50 tensors" in text
    assert len(re.findall("<tr>", text)) == 21
    assert "and 30 more" in text
    with pytest.raises(UsageError, match="no layers"):
        shown.plot.heatmap()


def test_a_derived_store(store: ckdiff.MaskStore, tmp_path: Path) -> None:
    made = ckdiff.random_mask(store, tmp_path / "r.zarr", seed=1)
    assert "Derived: random" in made._repr_html_()


def test_pictures(store: ckdiff.MaskStore, result: ckdiff.DiffResult) -> None:
    layers = store.summary("layer")
    for plot in (store.plot, result.plot):
        drawn = [plot.heatmap(), plot.depth(), plot.kinds()]
        assert [figure.name for figure in drawn] == ["heatmap", "depth", "kinds"]
        assert all(isinstance(figure, ckdiff.Figure) for figure in drawn)
    depth = [row for row in store.plot.depth().rows if row["stack"] == "model.layers"]
    expected = [
        row["rules"]["exact"]["changed"] for row in layers if "model.layers" in row["group"]
    ]
    assert [row["changed"] for row in depth] == expected
    lax = result.plot.heatmap("atol=1e-2").rows
    assert sum(row["changed"] for row in lax) < sum(
        row["changed"] for row in result.plot.heatmap().rows
    )
    assert result.plot.distances().rows


def test_stacks_are_chosen_by_name(store: ckdiff.MaskStore) -> None:
    other = HOSTILE.removesuffix(".0.x")
    assert {row["layer"] for row in store.plot.heatmap().rows} == {str(i) for i in range(12)}
    assert [row["elements"] for row in store.plot.heatmap(stack=other).rows] == [64]
    with pytest.raises(UsageError, match=r"no layers 'x' .*model\.layers"):
        store.plot.heatmap(stack="x")


@pytest.mark.parametrize("picture", ["heatmap", "depth", "kinds"])
def test_what_cannot_be_drawn_is_said(store: ckdiff.MaskStore, picture: str) -> None:
    with pytest.raises(UsageError, match=r"atol=1 was not counted.*exact"):
        getattr(store.plot, picture)("atol=1")
    with pytest.raises(CkdiffError):
        getattr(store.plot, picture)(7)
    with pytest.raises(UsageError, match="stats=True"):
        store.plot.distances()
