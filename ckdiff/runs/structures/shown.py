"""The shape of an update as notebooks show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure, numbered
from ckdiff.figures.htmltables import MOST, html_table
from ckdiff.figures.numbers import counted, percent, share
from ckdiff.stores.shortnames import short_names

Row = dict[str, Any]


class StructurePlots:
    """Pictures of where inside the matrices an update is; each is a ``Figure``.

    ``modules`` are the rows of ``Structure.by_module``.
    """

    def __init__(self, stores: Sequence[str], modules: Sequence[Row]) -> None:
        self._labels, self._modules = numbered(short_names(list(stores))), modules

    def concentration(self) -> Figure:
        """What the busiest tenth of rows and of columns holds, by kind of module."""
        from ckdiff.figures.shape import concentration

        return concentration(self._modules, self._labels)


def structure_html(head: Row, modules: Sequence[Row], elements: int) -> str:
    """A notebook's table: kinds of modules, those that changed most first.

    ``head`` is the JSON contract without its rows, ``elements`` those of the matrices.
    """
    labels = numbered(short_names(head["stores"]))
    matrices = "1 matrix" if head["matrices"] == 1 else f"{head['matrices']:,} matrices"
    shares = []
    for store, label in enumerate(labels):
        changed = sum(row["changed"] for row in modules if row["store"] == store)
        shares.append(f"{label} {percent(changed, elements)}")
    headline = f"{matrices} ({head['rule']}), changed: {' · '.join(shares)}"
    heads = ["run", "module", "matrices", "changed", "busiest tenth of rows", "of columns"]
    most = sorted(modules, key=lambda row: -row["changed"])[:MOST]
    cells = [
        [
            labels[row["store"]],
            row["module"],
            row["matrices"],
            row["changed"],
            share(row["top10_rows"]),
            share(row["top10_columns"]),
        ]
        for row in most
    ]
    words = ["The busiest tenth: how much of the changes it holds."]
    if head["not_matrices"]:
        words.append(f"{counted(head['not_matrices'], 'tensor')} of fewer than two dimensions.")
    if head["left_out"]:
        words.append(f"{counted(len(head['left_out']), 'tensor')} left out: not in all stores.")
    if head["unmeasured"]:
        words.append(f"{counted(len(head['unmeasured']), 'tensor')} could not be measured.")
    more = len(modules) - len(most)
    return html_table(headline, heads, cells, texts=2, words=words, more=more)
