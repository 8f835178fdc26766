"""Figures: what they draw is what they were given, and any numbers can be drawn."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckdiff.figures import agreement, course, density, histograms, shape, spectra
from ckdiff.figures.figure import Figure
from ckdiff.figures.style import marks, span, step

COUNTS = st.integers(0, 10**9)


def stack(elements: list[list[int]], changed: list[list[int]]) -> dict[str, Any]:
    return {
        "name": "model.layers",
        "layers": [str(i) for i in range(len(elements[0]))],
        "modules": [f"m{i}" for i in range(len(elements))],
        "elements": elements,
        "changed": changed,
    }


def groups(count: int) -> list[dict[str, Any]]:
    return [
        {
            "group": f"model.layers.{i}",
            "elements": 100,
            "rules": {"exact": {"changed": i % 100, "density": i % 100 / 100}},
        }
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    nulls = {"tensor": {"lift": 1.5, "expected_jaccard": 0.1}}
    return [
        {"a": a, "b": b, "jaccard": 0.2, "intersection": 7, "nulls": nulls}
        for a in range(count)
        for b in range(a + 1, count)
    ]


STEPS = [
    {
        "checkpoint": f"c{i}",
        "changed_since_first": i,
        "changed_since_previous": 1,
        "coverage": i / 4,
        "step_length": 1.5,
        "distance": i / 2,
        "path_length": 1.5 * i,
        "onward": 3 * i - 3,
        "back": i - 1,
        "sign_agreement": 0.75 if i > 1 else None,
    }
    for i in range(1, 5)
]
LAYERS = [
    {"group": f"l{i}", "elements": 9, "steps": [{"density": i / 9, "changed_since_first": i}] * 4}
    for i in range(3)
]
MATRICES = [
    {"name": "a", "shape": [4, 2, 3], "rank": 3, "rank99": 2, "stable_rank": 1.5, "norm2": 0.1},
    {
        "name": "b",
        "shape": [0, 4],
        "rank": None,
        "rank99": None,
        "stable_rank": None,
        "norm2": None,
    },
]
KINDS = [
    {"store": 0, "module": "q", "changed": 5, "top10_rows": 0.5, "top10_columns": None},
    {"store": 1, "module": "k", "changed": 0, "top10_rows": None, "top10_columns": None},
]
STRIPES = [{"name": "a", "rows": [0.0, 0.5], "columns": [0.1, 0.2, 0.3]}]
SIZES = [
    {"run": "r", "exponent": k, "elements": 10, "changed": k + 9, "density": (k + 9) / 10}
    for k in range(-9, 1)
]
EVERY = [
    density.heat_map(stack([[10, 0], [5, 5]], [[1, 0], [0, 5]]), run="r", rule="exact"),
    density.heat_map(stack([[1] * 900] * 90, [[0] * 900] * 90), run="r", rule="exact"),
    density.by_depth([("a", groups(3)), ("b", groups(4))], rule="exact"),
    density.by_kind([("a", groups(3))], rule="exact"),
    histograms.distances([("a", [0, 5, 2]), ("b", [1, 2, 3, 4])]),
    histograms.magnitudes(SIZES),
    agreement.matrix(["a", "b", "c"], pairs(3), null="tensor"),
    agreement.matrix([f"r{i}" for i in range(64)], pairs(64), null="tensor"),
    agreement.votes([5, 3, 0]),
    spectra.ranks(MATRICES),
    spectra.norms(MATRICES),
    course.densities(STEPS, 10),
    course.coverage(STEPS),
    course.fates({"never": 5, "returned": 1, "final": 4}),
    course.lengths(STEPS),
    course.directions(STEPS),
    course.layers(LAYERS, ["a", "b", "c", "d"]),
    shape.concentration(KINDS, ["a", "b"]),
    shape.stripes(STRIPES, run="r"),
]


@pytest.mark.parametrize("figure", EVERY, ids=lambda figure: figure.name)
def test_it_is_drawn(figure: Figure) -> None:
    for dark in (False, True):
        root = ElementTree.fromstring(figure.svg(dark=dark))
        assert root.tag.endswith("svg")
        assert float(root.attrib["width"].removesuffix("px")) < 1600
    json.dumps(figure.vega_lite(), allow_nan=False)
    bundle = figure._repr_mimebundle_()
    assert bundle["image/svg+xml"].startswith("<svg")
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert len(figure.rows) < 20_000


def test_a_figure_keeps_its_description() -> None:
    figure = EVERY[0]
    before = json.dumps(figure.spec)
    figure.vega_lite()["encoding"]["x"] = None
    assert json.dumps(figure.spec) == before


@given(st.integers(1, 5), st.integers(1, 300), st.data())
def test_a_map_adds_counts(modules: int, layers: int, data: st.DataObject) -> None:
    """However many layers share a column, no element is lost."""
    changed = [[data.draw(COUNTS)] * layers for _ in range(modules)]
    elements = [[count + 1 for count in line] for line in changed]
    figure = density.heat_map(stack(elements, changed), run="r", rule="exact")
    assert sum(row["changed"] for row in figure.rows) == sum(map(sum, changed))
    assert sum(row["elements"] for row in figure.rows) == sum(map(sum, elements))


@given(st.lists(st.floats(0, 1), max_size=20))
@example([5e-324])
def test_scales_hold_their_values(values: list[float]) -> None:
    low, high, kind = span(values)
    assert low < high
    some = [value for value in values if value > 0]
    assert all(low <= value <= high for value in some)
    assert (kind == "log") == (bool(some) and max(some) > 12 * min(some))
    if kind == "log":
        assert all(low <= mark <= high for mark in marks(low, high, kind) or ())


def test_a_third_and_a_trace_are_told_apart() -> None:
    """0.3 % and 36 % are far apart on the scale."""
    low, high, kind = span([0.003, 0.36])
    assert (low, high, kind) == (0.003, 0.36, "log")
    assert marks(low, high, kind) == pytest.approx([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])


@given(st.integers(0, 10**6))
def test_cells_are_as_wide_as_allowed(count: int) -> None:
    assert 5 <= step(count, 760, 5, 30) <= 30


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_no_step_is_halved(count: int) -> None:
    """Each number of a step below the axis is one that there is, and stands there once."""
    steps = [STEPS[1] | {"checkpoint": f"c{i}"} for i in range(count)]
    texts = ["".join(e.itertext()) for e in drawn(course.coverage(steps)) if e.tag.endswith("text")]
    numbers = [int(text) for text in texts if text.isdigit()]
    assert numbers == sorted(set(numbers)) != []
    assert set(numbers) <= set(range(1, count + 1))


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (240, 240), (241, 121), (1000, 200)])
def test_a_long_run_keeps_its_last_checkpoint(count: int, columns: int) -> None:
    steps = [{"density": 0.5, "changed_since_first": k} for k in range(1, count + 1)]
    figure = course.layers([{"group": "a", "elements": 9, "steps": steps}], ["c"] * count)
    drawn = [row["step"] for row in figure.rows]
    assert (len(drawn), drawn[-1]) == (columns, count)
    assert [row["changed"] for row in figure.rows] == drawn == sorted(set(drawn))
    assert ("is drawn" in figure.says) == (columns < count)


def test_more_runs_than_colours_have_other_dashes() -> None:
    figure = density.by_depth([(f"run{i}", groups(3)) for i in range(20)], rule="exact")
    looks = {
        (line.get("stroke"), line.get("stroke-dasharray"))
        for line in drawn(figure)
        if line.get("stroke") and line.get("stroke-width") == "2"
    }
    assert len(looks) == 20


def test_layers_stand_in_the_order_of_the_model() -> None:
    """Also where the first module is in a later layer only."""
    figure = density.heat_map(stack([[0, 4, 0], [4, 4, 4]], [[0, 1, 0], [1, 2, 3]]), run="r",
                              rule="exact")  # fmt: skip
    texts = ["".join(e.itertext()) for e in drawn(figure) if e.tag.endswith("text")]
    assert [text for text in texts if text.isdigit()] == ["0", "1", "2"]


def test_names_do_not_turn_the_page() -> None:
    rows = groups(1)
    rows[0]["group"] = "a\u202eb\nc"
    spec = density.by_kind([("run", rows)], rule="exact").vega_lite()
    assert spec["datasets"]["rows"][0]["module"] == r"a\u202eb\nc"


def drawn(figure: Figure) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(figure.svg()).iter())
