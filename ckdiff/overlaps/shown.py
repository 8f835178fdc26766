"""An overlap as notebooks show it, as data frames and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckdiff.errors import UsageError, printable
from ckdiff.figures.figure import Figure, numbered
from ckdiff.figures.frames import Record
from ckdiff.figures.htmltables import MOST, html_table
from ckdiff.figures.numbers import counted, percent, share
from ckdiff.stores.shortnames import short_names

Row = dict[str, Any]
_HEAD = ("group", "a", "b", "run_a", "run_b", "elements", "size_a", "size_b")
_PAIR = (
    "intersection", "union", "jaccard", "o1", "o2", "phi", "odds_ratio", "lift", "z",
    "expected_jaccard",
)  # fmt: skip
_NULL = ("expected", "lift", "z", "expected_jaccard")
COLUMNS = (*_HEAD, *_PAIR)  #: that every overlap has


def pair_records(rows: Iterable[Row], stores: Sequence[str]) -> Iterator[Record]:
    """A record for each row of the JSON contract and each pair of runs in it.

    ``a`` and ``b`` are positions, ``run_a`` and ``run_b`` the stores there; what a null says is in
    columns like ``lift:tensor``.
    """
    for row in rows:
        for pair in row["pairs"]:
            a, b = pair["a"], pair["b"]
            sizes = row["elements"], row["sizes"][a], row["sizes"][b]
            head = (row["group"], a, b, stores[a], stores[b], *sizes)
            record = dict(zip(_HEAD, head, strict=True)) | pair
            for name, said in record.pop("nulls").items():
                record |= {f"{key}:{name}": said[key] for key in _NULL}
            yield record


class OverlapPlots:
    """Pictures of how much runs agree; each is a ``Figure``."""

    def __init__(self, stores: Sequence[str], nulls: Sequence[str], model: Row) -> None:
        self._labels = numbered(short_names(list(stores)))
        self._nulls, self._model = nulls, model

    def overlap(self, null: str | None = None) -> Figure:
        """Jaccard and lift of each pair; ``null`` is one that was asked for, or the first.

        Raises UsageError for another.
        """
        from ckdiff.figures.agreement import matrix

        name = self._nulls[0] if null is None else null
        if name not in self._nulls:
            raise UsageError(
                f"the null {printable(str(name))} was not asked for",
                hint=f"one of {', '.join(self._nulls)}",
            )
        return matrix(self._labels, self._model["pairs"], null=name)

    def votes(self) -> Figure:
        """In how many runs an element changed."""
        from ckdiff.figures.agreement import votes

        return votes(self._model["votes"])


def overlap_html(head: Row, model: Row) -> str:
    """A notebook's table: the pairs of runs, over the whole model.

    ``head`` and ``model`` are the JSON contract without rows, and its first row.
    """
    labels = numbered(short_names(head["stores"]))
    elements, votes = model["elements"], model["votes"]
    every, some = percent(votes[-1], elements), percent(elements - votes[0], elements)
    headline = (
        f"{len(labels)} runs ({head['rule']}): {every} of {counted(elements, 'element')} changed "
        f"in all of them, {some} in at least one"
    )
    heads = ["run", "run", "changed in both", "Jaccard", "of the first", "of the second"]
    heads += [f"lift ({name})" for name in head["nulls"]]
    ways = "same_direction" in model["pairs"][0]
    cells = [_cells(labels, pair, head["nulls"], ways) for pair in model["pairs"][:MOST]]
    more = len(model["pairs"]) - len(cells)
    if ways:
        heads.append("moved the same way")
    return html_table(headline, heads, cells, texts=2, words=_words(head), more=more)


def _cells(
    labels: Sequence[str], pair: Row, nulls: Sequence[str], ways: bool
) -> list[str | int | float | None]:
    cells = [labels[pair["a"]], labels[pair["b"]], pair["intersection"], pair["jaccard"]]
    cells += [share(pair["o1"]), share(pair["o2"])]
    cells += [pair["nulls"][name]["lift"] for name in nulls]
    return [*cells, *([share(pair["same_direction"])] if ways else [])]


def _words(head: Row) -> list[str]:
    words = ["Lift: shared elements / those that chance gives; 1 is chance."]
    problems = (
        ("left_out", "left out: some runs lack them, or have another shape"),
        ("other_base", "began with different weights in the runs"),
        ("unknown_base", "may have begun with different weights in the runs: that is not known"),
    )
    for key, problem in problems:
        if head[key]:
            words.append(f"{counted(len(head[key]), 'tensor')} {problem}.")
    return words
