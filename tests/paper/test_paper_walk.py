"""The notebook that walks through one run: executed in its small form."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from notebooks import executed
from source import ROOT

WALK = ROOT / "examples" / "paper" / "walk.ipynb"


@pytest.mark.filterwarnings("ignore")  # of the libraries that run it
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAPER_WALK", "tiny")
    found = executed(WALK, WALK.parent, tmp_path, monkeypatch)
    shown = [
        output["data"]
        for cell in found.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
    ]
    assert sum("image/svg+xml" in data for data in shown) >= 5
    said = " ".join(data.get("text/plain", "") for data in shown)
    for name in ("every weight", "own", "random1", "the untrained base", "magnitude"):
        assert name in said


def test_what_is_stored_is_of_the_full_form_and_small() -> None:
    text = WALK.read_text("utf-8")
    assert len(text.encode()) < 500_000  # each picture twice, as not all of Jupyter draws SVG
    assert "/tmp/" not in text
    cells = [cell for cell in nbformat.read(WALK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    drawn = [output["data"] for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/svg+xml" in data for data in drawn) >= 5
    assert all("image/png" in data for data in drawn if "image/svg+xml" in data)
    assert any("807," in str(cell.outputs) for cell in cells), "of the model of all runs"
