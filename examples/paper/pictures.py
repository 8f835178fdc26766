"""The figures of the page: rows of stored numbers, drawn by ckdiff's own figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ckdiff.figures.figure import Figure, Row, Spec, of_rows, tooltip
from ckdiff.figures.style import CATEGORIES
from paper.claims import lifts
from paper.claims_masked import shares
from paper.measure import NULLS
from paper.results import Result, Results, course, density, density_f32, gain
from paper.retrain import FULL, MASKS
from paper.tables import in_order

DASHES = {"domain": ["mixed", "f32", "bf16"], "range": [[1, 0], [6, 3], [1, 2]]}
#: ten algorithms want two colours more than there usually are
TEN = {"range": [*CATEGORIES, "#AA3377", "#228833"]}

LOG = {"type": "log", "nice": False, "padding": 8}


def axis(field: str, title: str, form: str = "", **more: Any) -> Spec:
    """A quantitative axis."""
    out = {"field": field, "type": "quantitative", "title": title, **more}
    return out | ({"axis": {"format": form}} if form else {})


def named(field: str, title: str | None = None, **more: Any) -> Spec:
    """Categories, in the order of the rows."""
    return {"field": field, "type": "nominal", "title": title, "sort": None, **more}


def _arm(result: Result) -> str:
    run = result["run"]
    return f"{run['optimizer']} {run['precision']}"


def _courses(runs: Iterable[Result]) -> list[Row]:
    return [
        {
            "algorithm": result["run"]["algorithm"],
            "arm": _arm(result),
            **{key: result["run"][key] for key in ("optimizer", "precision")},
            "run": result["run"]["name"],
            **point,
        }
        for result in runs
        for point in [{"step": 0, "gained": 0.0, "density": 0.0, "coverage": 0.0}, *course(result)]
    ]


def density_by_gain(results: Results) -> Figure:
    """The main figure: a line for each run, through its checkpoints."""
    full = [each for each in results.of(task="sort", seed=1) if each["run"]["group"] != "ablation"]
    fields = (("run", "run", ""), ("step", "step", ""), ("density", "density", ".3f"))
    encoding = {
        "x": axis("gained", "mean reward gained, stored model"),
        "y": axis("density", "changed weights of the stored model", "%"),
        "color": named("algorithm", scale=TEN),
        "strokeDash": named("precision", scale=DASHES),
        "detail": {"field": "run"},
        "order": {"field": "step"},
        "tooltip": tooltip(*fields),
    }
    line = {"type": "line", "strokeWidth": 1.4, "aria": False, "point": {"size": 12, "aria": False}}
    part = {"mark": line, "width": 330, "height": 360, "encoding": encoding}
    return Figure(
        "density-by-gain",
        "Density against reward gained",
        "Each line is a run of seed 1, each point a checkpoint. Where lines lie apart at the same "
        "gain, runs changed different numbers of weights to learn as much.",
        _courses(full),
        beside("optimizer", ("adamw", "sgd"), part),
    )


def beside(field: str, values: Sequence[str], part: Spec) -> Spec:
    """A part for each value, side by side."""
    facet = {"field": field, "type": "nominal", "title": None, "sort": values}
    return of_rows({"facet": facet, "spec": part})


def dynamics(results: Results) -> Figure:
    """Density and coverage of the final mask along the steps."""
    runs = results.of(algorithm="grpo", task="sort")
    runs = [each for each in runs if each["run"]["group"] in ("main", "sgd", "precision")]
    what = ("density", "coverage")
    rows = [
        {"what": each, "value": point[each], **{k: point[k] for k in ("arm", "run", "step")}}
        for point in _courses(sorted(runs, key=_arm))
        for each in what
    ]
    encoding = {
        "x": axis("step", "step"),
        "y": axis("value", "", "%"),
        "color": named("arm"),
        "detail": {"field": "run"},
    }
    return Figure(
        "dynamics",
        "GRPO over its steps",
        "Density of the update, and which share of the final mask is there already.",
        rows,
        beside("what", what, {"mark": "line", "width": 300, "height": 220, "encoding": encoding}),
    )


def precisions(results: Results) -> Figure:
    """Stored and float32 density of GRPO by arm."""
    runs = results.of(algorithm="grpo", task="sort")
    rows = [
        {
            "arm": f"{_arm(each)}, {each['run']['lr']:g}",
            "weights": kind,
            "density": value,
            "gained": gain(each),
        }
        for each in sorted(runs, key=lambda each: (_arm(each), each["run"]["lr"]))
        if each["run"]["group"] in ("main", "sgd", "precision", "sweep")
        for kind, value in (("stored, bfloat16", density(each)), ("float32", density_f32(each)))
        if kind == "stored, bfloat16" or each["run"]["precision"] != "bf16"
    ]
    encoding = {
        "x": axis("density", "changed weights", "%"),
        "y": named("arm"),
        "color": named("weights"),
        "shape": named("weights"),
        "tooltip": tooltip(("arm", "arm", ""), ("gained", "reward gained", ".3f")),
    }
    spec = {"mark": {"type": "point", "size": 50}, "width": 420, "encoding": encoding}
    return Figure(
        "precisions",
        "One algorithm, many densities",
        "GRPO on one task: the share of changed weights follows what is stored, how it is trained, "
        "the optimizer and the learning rate. A point for each run.",
        rows,
        of_rows({**spec, "height": {"step": 22}}),
    )


def agreements(results: Results) -> Figure:
    """Mean lifts of each question, by null."""
    rows = [
        {"question": name, "null": null, "lift": lifts(each, null).mean}
        for name, each in sorted(results.agreement["questions"].items(), key=in_order)
        for null in NULLS
        if lifts(each, null).values
    ]
    encoding = {
        "x": axis("lift", "shared weights over those by chance", scale=LOG),
        "y": named("question", axis={"labelLimit": 300}),
        "color": named("null", "what chance knows"),
        "shape": named("null", "what chance knows"),
    }
    points = {"mark": {"type": "point", "size": 50}, "encoding": encoding}
    chance = {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"x": {"datum": 1}}}
    return Figure(
        "agreement",
        "How far beyond chance masks agree",
        "1 is chance. What is left given magnitudes is not due to small weights flipping easily.",
        rows,
        of_rows({"layer": [chance, points], "width": 380, "height": {"step": 18}}),
    )


def retraining(results: Results) -> Figure:
    """Share of the gain, by mask and full run."""
    rows = [
        {"full": full, "mask": kind, "share": share}
        for full in FULL
        for kind in MASKS
        for share in shares(results, full, (kind,)).values
    ]
    encoding = {
        "x": axis("share", "share of the full run's gain", "%"),
        "y": named("mask"),
        "color": named("full", "full run"),
        "shape": named("full", "full run"),
    }
    spec = {"mark": {"type": "point", "size": 60}, "width": 380, "encoding": encoding}
    return Figure(
        "retraining",
        "Training with a mask",
        "How much of the full run's reward comes back when only a mask's weights are trained. "
        "The untrained base is 0 %.",
        rows,
        of_rows({**spec, "height": {"step": 22}}),
    )


def figures(results: Results) -> list[Figure]:
    """All of them that have something to show."""
    made = (
        each(results) for each in (density_by_gain, precisions, dynamics, agreements, retraining)
    )
    return [figure for figure in made if figure.rows]
