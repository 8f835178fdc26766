"""From the data of a report to what its page shows: sections of figures, tables and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckdiff.figures import agreement, course, density, histograms, shape, spectra
from ckdiff.figures.figure import Figure
from ckdiff.reports.numbers import counted, percent, share

Data = dict[str, Any]
_LISTED = 1000  #: rows of a table of words; what is longer says how much is left out


@dataclass(frozen=True, slots=True)
class Table:
    """A small table of texts; the first row are the heads."""

    name: str
    title: str
    heads: Sequence[str]
    rows: list[list[str]]
    more: int = 0  #: rows that are not shown


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it, in order."""

    name: str  #: of its anchor
    title: str
    words: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    #: figures of which one group is seen at a time, and what the group is called; they come first
    tabs: list[tuple[str, list[Figure]]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def every_figure(self) -> Iterator[Figure]:
        """All of them, in the order of the page."""
        for _, group in self.tabs:
            yield from group
        yield from self.figures


def sections(data: Data) -> list[Section]:
    """What there is to show, in the order of the page; a part without data is not there."""
    parts = (_over_time, _where, _inside, _how_far, _agreement, _spectra, _origins, _left_out)
    return [section for part in parts for section in part(data)]


def _labelled(data: Data, what: str) -> list[tuple[str, Any]]:
    return [(run["label"], run[what]) for run in data["runs"]]


def _where(data: Data) -> Iterator[Section]:
    if not data["runs"]:
        return
    rule = data["rule"]
    tabs = [
        (
            run["label"],
            [
                density.heat_map(stack, run=run["label"], rule=rule, name=f"heatmap-{i}-{k}")
                for k, stack in enumerate(run["stacks"], 1)
            ],
        )
        for i, run in enumerate(data["runs"], 1)
    ]
    depth = density.by_depth(_labelled(data, "layers"), rule=rule)
    kinds = density.by_kind(_labelled(data, "modules"), rule=rule)
    figures = [*([depth] if len(depth.rows) > 1 else []), kinds]
    words = ["Density is the share of elements that changed."]
    if not any(figures for _, figures in tabs):
        tabs = []
    yield Section("where", "Where it changed", words, figures, tabs)


def _over_time(data: Data) -> Iterator[Section]:
    tabs, tables = [], []
    for i, found in enumerate(data["timelines"], 1):
        steps, ends = found["steps"], {k: found[k] for k in ("never", "returned", "final")}
        figures = [
            course.densities(steps, found["elements"]),
            course.coverage(steps),
            course.fates(ends),
            course.lengths(steps),
            course.directions(steps),
            course.layers(found["layers"], found["checkpoints"][1:]),
        ]
        named = [replace(figure, name=f"{figure.name}-{i}") for figure in figures if figure.rows]
        tabs.append((found["label"], named))
        title = "Steps" if len(data["timelines"]) == 1 else f"{found['label']}: steps"
        tables.append(_table(f"steps-{i}", title, _STEP, list(_steps(found))))
    if tabs:
        words = [
            "Each checkpoint of the run is compared with the first one and with the one before it."
        ]
        yield Section("time", "Over time", words, tabs=tabs, tables=tables)


_STEP = (
    "step", "checkpoint", "changed since the first", "density", "changed since the one before",
    "of the final change", "that lasts",
)  # fmt: skip


def _steps(found: Data) -> Iterator[list[str]]:
    """The rows of a timeline's table, as the terminal has them; the first checkpoint is step 0."""
    yield ["0", found["checkpoints"][0], *[""] * (len(_STEP) - 2)]
    for number, step in enumerate(found["steps"], 1):
        first, kept = step["changed_since_first"], step["kept"]
        yield [
            str(number),
            step["checkpoint"],
            f"{first:,}",
            percent(first, found["elements"]),
            f"{step['changed_since_previous']:,}",
            percent(kept, found["final"]) if found["final"] else "",
            percent(kept, first) if first else "",
        ]


def _inside(data: Data) -> Iterator[Section]:
    found = data["structure"]
    if found is None:
        return
    labels = [run["label"] for run in data["runs"]]
    spread = shape.concentration(found["modules"], labels)
    tabs = []
    for store, label in enumerate(labels):
        rows = [row for row in found["stripes"] if row["store"] == store]
        if rows:
            tabs.append((label, [shape.stripes(rows, run=label, name=f"stripes-{store + 1}")]))
    words = []
    if (shared := found["shared"]) is not None:
        words.append(
            f"Of the busiest tenth of a matrix's rows, two runs share {share(shared['rows'])} on "
            f"average ({share(shared['rows_chance'])} by chance); of its columns "
            f"{share(shared['columns'])} ({share(shared['columns_chance'])})."
        )
    if spread.rows:
        yield Section("inside", "Where inside the matrices", words, [spread], tabs)


def _how_far(data: Data) -> Iterator[Section]:
    figures = []
    moved = [
        (run["label"], run["statistics"]["ulp_histogram"])
        for run in data["runs"]
        if run["statistics"] is not None and sum(run["statistics"]["ulp_histogram"])
    ]
    if moved:
        figures.append(histograms.distances(moved))
    if data["magnitudes"]:
        rows = [
            {
                "run": run["label"],
                "exponent": row["exponent"],
                "elements": row["elements"],
                "changed": row["changed"][i],
                "density": row["changed"][i] / row["elements"],
            }
            for i, run in enumerate(data["runs"])
            for row in data["magnitudes"]
            if row["exponent"] is not None
        ]
        figures.append(histograms.magnitudes(rows))
    if figures:
        yield Section("sizes", "How far, and of what size", [], figures)


def _agreement(data: Data) -> Iterator[Section]:
    overlap = data["overlap"]
    if overlap is None:
        return
    labels = [run["label"] for run in data["runs"]]
    model = overlap["rows"][0]
    null = overlap["nulls"][0]
    words = [
        "Chance is what unrelated masks of the same sizes would share. Lift is the number of "
        "shared elements / chance; 1 is chance."
    ]
    words += [_chance(name, overlap, model["pairs"]) for name in overlap["nulls"]]
    figures = [agreement.matrix(labels, model["pairs"], null=null)]
    if len(labels) > 2:
        figures.append(agreement.votes(model["votes"]))
    yield Section(
        "overlap", "How much the runs agree", words, figures, tables=[_pairs(labels, overlap)]
    )


def _chance(name: str, overlap: Data, pairs: list[Data]) -> str:
    said = overlap["words"][name]
    lifts = sorted(p["nulls"][name]["lift"] for p in pairs if p["nulls"][name]["lift"] is not None)
    text = f"{name}: {said['given']} "
    if not lifts:
        return text + "There is no lift: chance would give no shared elements."
    ends = dict.fromkeys(f"{lift:.3g}" for lift in (lifts[0], lifts[-1]))
    text += f"The runs share {' to '.join(ends)} times what chance would give. "
    return text + f"That cannot come from {said['rules_out']}; it can come from {said['leaves']}."


def _pairs(labels: list[str], overlap: Data) -> Table:
    heads = ["run", "run", "changed in both", "Jaccard", "of the first", "of the second"]
    heads += [f"lift ({name})" for name in overlap["nulls"]]
    rows = [
        [
            labels[pair["a"]],
            labels[pair["b"]],
            f"{pair['intersection']:,}",
            *(_ratio(pair[key]) for key in ("jaccard", "o1", "o2")),
            *(_ratio(pair["nulls"][name]["lift"]) for name in overlap["nulls"]),
        ]
        for pair in overlap["rows"][0]["pairs"]
    ]
    return _table("pairs", "Pairs of runs", heads, rows)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _spectra(data: Data) -> Iterator[Section]:
    spectrum = data["spectrum"]
    if not spectrum or not spectrum["rows"]:
        return
    rows = spectrum["rows"]
    sampled = sum(bool(row["sampled"]) for row in rows)
    words = [f"{counted(len(rows), 'matrix').replace('matrixs', 'matrices')} looked at."]
    if sampled:
        words.append("They are a sample of the model.")
    yield Section(
        "spectra", "Rank of the update", words, [spectra.ranks(rows), spectra.norms(rows)]
    )


def _origins(data: Data) -> Iterator[Section]:
    rows = []
    for run in data["runs"]:
        made_by = run.get("made_by")
        where = [run.get("base", ""), run.get("tuned", "")]
        if made_by:
            where = [f"derived: {made_by.get('operation', '?')}", ""]
        elements = run["elements"]
        for rule, counts in run["rules"].items():
            share = percent(counts["changed"], elements)
            rows.append(
                [run["label"], *where, rule, f"{elements:,}", f"{counts['changed']:,}", share]
            )
    heads = ["run", "base", "tuned", "rule", "elements", "changed", "density"]
    words = [f"Made by ckdiff {data['version']}."]
    if rows:
        table = _table("origins", "What was compared", heads, rows)
        yield Section("origins", "Where the numbers come from", words, tables=[table])


def _left_out(data: Data) -> Iterator[Section]:
    tables: list[Table] = []
    for run in data["runs"]:
        found = run["unpaired"]
        if found["tensors"]:
            rows = [
                [item["name"], item["reason"], _side(item, "base"), _side(item, "tuned")]
                for item in found["details"]
            ]
            more = found["tensors"] - len(rows)
            title = f"{run['label']}: {counted(found['tensors'], 'tensor')} not compared"
            heads = ("tensor", "why", "base", "tuned")
            tables.append(_table(f"unpaired-{len(tables) + 1}", title, heads, rows, more))
    for i, found in enumerate(data["timelines"], 1):
        if lacking := found["left_out"]:
            many = counted(len(lacking), "tensor")
            title = f"{found['label']}: {many} that not all checkpoints have with one shape"
            tables.append(_table(f"left-out-{i}", title, ("tensor",), [[name] for name in lacking]))
    words = [] if tables else ["All tensors of both sides were compared."]
    if any("made_by" not in run for run in data["runs"]):
        yield Section("uncompared", "What was not compared", words, tables=tables)


def _side(item: Data, which: str) -> str:
    if f"{which}_dtype" not in item:
        return ""
    return f"{item[f'{which}_dtype']} {'×'.join(map(str, item[f'{which}_shape']))}"


def _table(
    name: str, title: str, heads: Sequence[str], rows: list[list[str]], more: int = 0
) -> Table:
    return Table(name, title, heads, rows[:_LISTED], more + max(len(rows) - _LISTED, 0))
