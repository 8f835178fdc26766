"""The notebooks of examples/ run as they are, and what is stored of them shows what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from notebooks import executed
from source import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LARGEST = 500_000  # bytes: each picture twice, as not all of Jupyter draws SVG


def outputs(notebook: Any) -> list[dict[str, Any]]:
    """The data of everything that cells show."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [output["data"] for cell in cells for output in cell["outputs"] if "data" in output]


def pictures(notebook: Any) -> list[str]:
    """The last line of each cell that shows a picture, in order."""
    return [
        "".join(cell["source"]).splitlines()[-1]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        and any("image/svg+xml" in output.get("data", {}) for output in cell["outputs"])
    ]


def test_there_is_one() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.encode()) < LARGEST
    found = json.loads(text)
    nbformat.validate(nbformat.from_dict(found))
    counts = [c["execution_count"] for c in found["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run all cells, in order"
    assert "/tmp/" not in text
    assert str(Path.home()) + os.sep not in text
    drawn = [line for line in pictures(found) if ".plot." in line]
    assert len(drawn) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the libraries that run it
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = nbformat.read(path, as_version=4)
    again = executed(path, tmp_path, tmp_path, monkeypatch)
    assert pictures(again) == pictures(stored) != []
    kinds = [sorted(data) for data in outputs(stored)]
    assert [sorted(data) for data in outputs(again)] == kinds
    said = [data["text/plain"] for data in outputs(again)]
    assert sum(text.startswith("done: ") for text in said) >= 4, "what runs says when it is done"
