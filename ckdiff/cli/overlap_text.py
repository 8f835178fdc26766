"""What ``overlap`` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ckdiff.cli import csvs, formats
from ckdiff.cli.overlap_page import (
    FloatArray,
    Page,
    ends,
    lift,
    quotient,
    ratio,
    spread,
    z,
)
from ckdiff.cli.tables import Column, natural_width, table
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.overlaps.result import Overlap
from ckdiff.overlaps.shown import pair_records
from ckdiff.stores.shortnames import short_names

_LABEL = 20  #: longest label of a store
_EXPECTED = 10  #: shared elements that chance must give in every pair, for a group to be ranked
_TOO_SMALL = (
    f"chance gives fewer than {_EXPECTED} shared elements in some pair, or leaves nothing open"
)
_LISTED = 10  #: stores up to which every number of votes has its own line
_BAR = 24
_LEFT_OUT = 20  #: tensors that are named


def lines(result: Overlap, top: int) -> list[str]:
    """The tables: ``top`` groups of the highest lift, and as many of the lowest."""
    terminal = Terminal()
    labels = [
        f"{i} {formats.shorten(name, _LABEL, terminal.glyphs.ellipsis)}"
        for i, name in enumerate(short_names(result.stores), 1)
    ]
    page = Page(result, terminal, labels, top, result.counts, result.jaccard, result.nulls)
    extent = formats.counted(int(result.elements[0]), "element")
    title = f"{len(labels)} runs, {result.rule} masks of {extent}"
    out = [terminal.paint(title, "bold"), *page.wrapped(_headline(page))]
    for part in (_runs, _agreement, _ways, _votes, _chance, _sentences, _groups, _notes):
        if text := part(page):
            out += ["", *text]
    return out


def csv_lines(result: Overlap) -> Iterator[str]:
    """A header, and a line for each row and each pair of runs."""
    first = True
    for record in pair_records(result.each_row(), result.stores):
        if first:
            yield csvs.line(list(record))
            first = False
        yield csvs.line(list(record.values()))


def _headline(page: Page) -> str:
    """The lift, in one sentence."""
    where = NULLS.lines[page.headline].help
    lifts = page.defined(page.headline, "lift")
    if not len(lifts):
        return f"There is no lift: chance would give no shared elements {where}."
    if len(page.labels) == 2:
        shared = formats.counted(int(page.counts[0, 1]), "changed element")
        times = lift(float(lifts[0]))
        return f"They share {shared}: {times} times what chance would give {where}."
    least, median, most = map(lift, spread(lifts))
    return (
        f"Pairs of runs share {least} to {most} times what chance would give {where} "
        f"(median {median})."
    )


def _runs(page: Page) -> list[str]:
    """Which run has which number, and how much it changed."""
    elements = int(page.result.elements[0])
    heads = [
        Column("run", "left", "cyan", flexible=True),
        Column("changed"),
        Column("density", style="bold"),
        Column("store", "left", "dim", flexible=True),
    ]
    sizes = np.diag(page.counts).tolist()
    rows = [
        [label, f"{size:,}", formats.percent(size, elements), printable(path)]
        for label, size, path in zip(page.labels, sizes, page.result.stores, strict=True)
    ]
    return table(heads, rows, page.terminal)


# pairs of runs


def _agreement(page: Page) -> list[str]:
    """A pair, or the widest matrix of pairs that there is room for, or the ends of a list."""
    runs = len(page.labels)
    if runs == 2:
        return _pairs(page, [(0, 1)])
    numbers = [str(i) for i in range(1, runs + 1)]
    matrices = _beside(page, page.labels), _beside(page, numbers), _triangles(page, numbers)
    for title, heads, rows in matrices:
        if natural_width(heads, rows) <= page.width:
            return [f"{title} against the null {page.headline}", *table(heads, rows, page.terminal)]
    ranked = [(a, b) for a in range(runs) for b in range(a + 1, runs)]
    ranked = [pair for pair in ranked if not np.isnan(page.lift[pair])] or ranked
    ranked.sort(key=lambda pair: -page.lift[pair])
    title = f"Pairs by lift against the null {page.headline}; all of them are in --json"
    return [title, *_pairs(page, ranked)]


def _beside(page: Page, columns: Sequence[str]) -> tuple[str, list[Column], list[list[str]]]:
    """The upper triangle, each Jaccard index followed by its lift."""
    runs = len(page.labels)
    heads = [Column("run", "left", "cyan")]
    for b in range(1, runs):
        heads += [Column(f"{columns[b]}\nJaccard", style="bold"), Column("lift")]
    rows = []
    for a in range(runs - 1):
        row = [page.labels[a]]
        for b in range(1, runs):
            row += [ratio(page.jaccard[a, b]), lift(page.lift[a, b])] if a < b else ["", ""]
        rows.append(row)
    return "Jaccard of each pair, and lift", heads, rows


def _triangles(page: Page, columns: Sequence[str]) -> tuple[str, list[Column], list[list[str]]]:
    """Jaccard indices above the diagonal, lifts below it: half as wide."""

    def cell(a: int, b: int) -> str:
        if a == b:
            return page.terminal.glyphs.dash
        return ratio(page.jaccard[a, b]) if a < b else lift(page.lift[a, b])

    heads = [Column("run", "left", "cyan"), *map(Column, columns)]
    rows = [
        [label, *(cell(a, b) for b in range(len(columns)))] for a, label in enumerate(page.labels)
    ]
    return "Jaccard above the diagonal, and below it lift", heads, rows


def _pairs(page: Page, pairs: Sequence[tuple[int, int]]) -> list[str]:
    heads = [
        Column("runs", "left", "cyan", flexible=True),
        Column("shared"),
        Column("of the 1st"),
        Column("of the 2nd"),
        Column("Jaccard", style="bold"),
        Column("lift", style="bold"),
    ]

    def cells(pair: tuple[int, int]) -> list[str]:
        a, b = pair
        both, first, second = (int(page.counts[at]) for at in (pair, (a, a), (b, b)))
        return [
            f"{page.labels[a]}, {page.labels[b]}",
            f"{both:,}",
            *(formats.percent(both, size) if size else "-" for size in (first, second)),
            ratio(page.jaccard[pair]),
            lift(page.lift[pair]),
        ]

    rows = ends(page, pairs, cells, len(heads))
    if natural_width(heads, rows) > page.width:  # the numbers say which runs they are
        calls = {page.labels[i]: str(i + 1) for i in range(len(page.labels))}
        names = {f"{a}, {b}": f"{calls[a]}, {calls[b]}" for a in calls for b in calls}
        rows = [[names.get(row[0], row[0]), *row[1:]] for row in rows]
    return table(heads, rows, page.terminal)


# directions


def _ways(page: Page) -> list[str]:
    """Which way runs moved what they share, in a sentence."""
    counts = page.result.directions
    if counts is None:
        return []
    moved = counts[0, :, :2].sum(axis=1)
    shares = [float(same / all_) for same, all_ in zip(counts[0, :, 0], moved, strict=True) if all_]
    if not shares:
        return ["No shared element moved one way or the other."]
    least, most = map(formats.share, (min(shares), max(shares)))
    share = least if len(shares) == 1 else f"{least} to {most}"
    return page.wrapped(
        f"Of the shared elements that moved, {share} moved the same way; by chance it is one half."
    )


# votes


def _votes(page: Page) -> list[str]:
    """How many elements changed in how many runs."""
    votes = page.result.votes[0].tolist()
    elements, runs = int(page.result.elements[0]), len(votes) - 1
    terminal = page.terminal
    bins = [("no run", votes[0])]
    low = 1
    while low < runs:  # many runs: ranges that double
        high = low if runs <= _LISTED else min(2 * low - 1, runs - 1)
        many = f"exactly {low}" if low == high else f"{low}{terminal.glyphs.dash}{high}"
        bins.append((f"{many} run{'s' * (high > 1)}", sum(votes[low : high + 1])))
        low = high + 1
    bins.append(("both runs" if runs == 2 else f"all {runs} runs", votes[runs]))
    heads = [
        Column("changed in", "left"),
        Column("elements"),
        Column("share", style="bold"),
        Column("", "left", "green", optional=True),
    ]
    rows = [
        [
            text,
            f"{count:,}",
            formats.percent(count, elements),
            terminal.bar(count / elements if elements else 0.0, _BAR),
        ]
        for text, count in bins
    ]
    return table(heads, rows, terminal)


# chance


def _chance(page: Page) -> list[str]:
    """A line for each null: over the model, of the pair or of all pairs."""
    several = len(page.labels) > 2
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("lift", "lift", lift),
        ("expected\nJaccard", "expected_jaccard", ratio),
        ("z", "z", z),
    ]
    heads = [Column("null", "left", "cyan")]
    for title, key, _ in shown:
        style, spare = "bold" if key == "lift" else "", key == "z"
        middle = Column("median" if several else title, style=style, optional=spare)
        least = Column(f"{title}\nleast", optional=spare)
        heads += [least, middle, Column("most", optional=spare)] if several else [middle]
    rows = []
    for null in page.result.null_names:
        row = [null]
        for _, key, show in shown:
            values = spread(page.defined(null, key))
            row += map(show, values if several else values[:1])
        rows.append(row)
    return table(heads, rows, page.terminal)


def _sentences(page: Page) -> list[str]:
    """What each null rules out and what it does not."""
    out = []
    indent = max(map(len, page.result.null_names)) + 2
    for name in page.result.null_names:
        null = NULLS[name]
        text = f"{name:<{indent}}rules out {null.rules_out}; leaves {null.leaves}. {null.given}"
        first, *rest = page.wrapped(text, indent)
        out += [first.replace(name, page.terminal.paint(name, "cyan"), 1), *rest]
    return [*out, *page.wrapped("Read the lift: at the size of models every z is far from 0.")]


# groups


def _groups(page: Page) -> list[str]:
    """The groups that agree most and least, with counts added up over all pairs of runs."""
    result, runs = page.result, len(page.labels)
    groups = len(result.groups) - 1  # the first row is the model
    if result.by == "model" or not groups:
        return []
    first, second = np.triu_indices(runs)
    alone = first == second
    changed, shared = result.pairs[:, alone].sum(1), result.pairs[:, ~alone].sum(1)
    united = (runs - 1) * changed - shared
    expected = {null: result.moments[null].mean.sum(1) for null in result.null_names}
    ranked = _ranked(page, shared, expected[page.headline])
    if not len(ranked):
        return page.wrapped(f"No {result.by} is ranked: {_TOO_SMALL}.")

    def cells(row: int) -> list[str]:
        elements = int(result.elements[row])
        return [
            printable(result.groups[row]),
            f"{elements:,}",
            formats.percent(int(changed[row]), runs * elements),
            ratio(quotient(shared[row], united[row])),
            *(lift(quotient(shared[row], mean[row])) for mean in expected.values()),
        ]

    heads = [
        Column(result.by, "left", "cyan", flexible=True),
        Column("elements", optional=True),
        Column("density", optional=True),
        Column("Jaccard"),
        Column(f"lift\n{page.headline}", style="bold"),
        *map(Column, result.null_names[1:]),
    ]
    rows = ends(page, ranked, cells, len(heads))
    return [
        *table(heads, rows, page.terminal, footer=cells(0)),
        *_of_ranking(page, groups - len(ranked)),
    ]


def _of_ranking(page: Page, left_out: int) -> list[str]:
    """What is said below the groups that were ranked."""
    by = page.result.by
    said = f"The {by}s of the most and the least lift. No lift can be much above 1 / density."
    if len(page.labels) > 2:
        said += " Counts are added up over all pairs of runs."
    out = page.wrapped(said)
    if left_out:
        out += page.wrapped(f"Not ranked: {formats.counted(left_out, by)}; {_TOO_SMALL}.")
    return out


def _ranked(page: Page, shared: npt.NDArray[np.int64], expected: FloatArray) -> list[int]:
    """The groups about which a lift says something, the highest lift first."""
    moments = page.result.moments[page.headline]
    # in a group that changed whole in some run, chance and the masks say the same
    telling = (moments.mean.min(1) >= _EXPECTED) & (moments.variance.min(1) > 0)
    telling[0] = False  # the model
    rows = np.flatnonzero(telling)
    ranked: list[int] = rows[np.argsort(-shared[rows] / expected[rows], kind="stable")].tolist()
    return ranked


# notes


def _notes(page: Page) -> list[str]:
    """What was not compared, and runs that started from different weights."""
    result = page.result
    out = []
    if result.left_out:
        rows = []
        for entry in result.left_out[:_LEFT_OUT]:
            if entry["reason"] == "missing":
                runs = [page.labels[i] for i in entry["stores"]]
                why = f"not in {', '.join(runs)}"
            else:
                shapes = dict.fromkeys(map(formats.shape, entry["shapes"]))
                why = f"shapes {', '.join(shapes)}"
            rows.append([printable(entry["name"]), why])
        heads = [
            Column("left out", "left", "cyan", flexible=True),
            Column("why", "left", flexible=True),
        ]
        out += table(heads, rows, page.terminal)
        if len(result.left_out) > _LEFT_OUT:
            more = len(result.left_out) - _LEFT_OUT
            out.append(f"and {more:,} more ({len(result.left_out):,} in all)")
    for names, have, one, many in (
        (result.other_base, "have", "differs in content", "differ in content"),
        (result.unknown_base, "may have", "was not read by all", "were not read by all"),
    ):
        if names:
            some = ", ".join(map(formats.name, names[:3]))
            if len(names) > 3:
                some += f" and {len(names) - 3:,} more tensors"
            what = one if len(names) == 1 else many
            text = f"The runs {have} different bases: {some} {what}."
            out += [*([""] if out else []), *page.wrapped(text)]
    return out
