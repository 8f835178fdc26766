"""A table of tensors as notebooks show it, as data frames and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.errors import UsageError, printable
from ckdiff.figures.frames import Record, pandas_frame, polars_frame
from ckdiff.figures.numbers import counted, extent, percent
from ckdiff.options import checked_text
from ckdiff.rules import Rule
from ckdiff.stores.summaries import By, Stack, columns, stacks, summarise
from ckdiff.stores.table import MaskTable

if TYPE_CHECKING:
    from ckdiff.figures.figure import Figure

_RULES = 4  # whose counts are beside each other in a notebook


class TableShown:
    """What notebooks can do with a result that has a table of tensors."""

    __slots__ = ()

    def _to_show(self) -> tuple[MaskTable, str]:
        """The table, and what pictures call it."""
        raise NotImplementedError

    def records(self, by: By = "tensor") -> list[Record]:
        """A dict for each tensor, layer, module, dtype, or for the model.

        The keys are the columns of ``ckdiff show --csv``, such as ``changed:exact`` and
        ``density:exact``; a shape is a list. Raises UsageError for an unknown ``by``.
        """
        table, _ = self._to_show()
        rows = summarise(table, by)
        known = columns(table, by)
        return [
            {c.name: row["shape"] if c.name == "shape" else c.value(row) for c in known}
            for row in rows
        ]

    def to_pandas(self, by: By = "tensor") -> Any:
        """``records(by)`` as a pandas DataFrame. Raises UsageError where pandas is missing."""
        return pandas_frame(self.records(by), self._columns(by))

    def to_polars(self, by: By = "tensor") -> Any:
        """``records(by)`` as a polars DataFrame. Raises UsageError where polars is missing."""
        return polars_frame(self.records(by), self._columns(by))

    @property
    def plot(self) -> TablePlots:
        """Pictures: ``plot.heatmap()``, ``.depth()``, ``.kinds()``, ``.distances()``."""
        return TablePlots(*self._to_show())

    def _columns(self, by: By) -> list[str]:
        return [column.name for column in columns(self._to_show()[0], by)]


class TablePlots:
    """Pictures of where a model changed; each is a ``Figure``.

    ``rule`` is one of those that were counted, in any spelling; without it the first.
    """

    def __init__(self, table: MaskTable, called: str) -> None:
        self._table, self._called = table, called

    def heatmap(self, rule: str | Rule | None = None, *, stack: str | None = None) -> Figure:
        """Density by layer and module. Of a model with several stacks of layers the largest, or the
        one whose layers are called ``stack``: ``"model.layers"``. Raises UsageError for a rule or
        stack that is not there, and where no layers are numbered.
        """
        from ckdiff.figures.density import heat_map

        text = self._rule(rule)
        found = self._stack(stacks(self._table, text), stack)
        drawn = {
            "name": found.name,
            "layers": found.layers,
            "modules": found.modules,
            "elements": found.elements.tolist(),
            "changed": found.changed.tolist(),
        }
        return heat_map(drawn, run=self._called, rule=text)

    def depth(self, rule: str | Rule | None = None) -> Figure:
        """Density from the first layer to the last. Raises UsageError for a rule not counted."""
        from ckdiff.figures.density import by_depth

        text = self._rule(rule)
        return by_depth([(self._called, summarise(self._table, "layer"))], rule=text)

    def kinds(self, rule: str | Rule | None = None) -> Figure:
        """Density by kind of module. Raises UsageError for a rule that was not counted."""
        from ckdiff.figures.density import by_kind

        text = self._rule(rule)
        return by_kind([(self._called, summarise(self._table, "module"))], rule=text)

    def distances(self) -> Figure:
        """How many representable values the changed elements moved by.

        Raises UsageError where there are no statistics.
        """
        from ckdiff.figures.histograms import distances

        model = summarise(self._table, "model")
        found = model[0].get("statistics") if model else None
        if found is None:
            raise UsageError(
                f"{self._called} has no statistics", hint="ask for them: diff(..., stats=True)"
            )
        return distances([(self._called, found["ulp_histogram"])])

    def _rule(self, rule: str | Rule | None) -> str:
        known = list(self._table.changed)
        text = known[0] if rule is None else str(Rule.parse(rule))
        if text not in known:
            raise UsageError(f"{text} was not counted", hint=f"one of {', '.join(known)}")
        return text

    def _stack(self, found: Sequence[Stack], asked: str | None) -> Stack:
        if not found:
            raise UsageError(
                f"no layers of {self._called} are numbered", hint="plot.kinds() has all tensors"
            )
        if asked is None:
            return max(found, key=lambda stack: int(stack.elements.sum()))
        named = {stack.name: stack for stack in found}
        if checked_text("stack", asked) not in named:
            names = ", ".join(map(printable, named))
            raise UsageError(f"there are no layers {printable(asked)!r}", hint=f"one of {names}")
        return named[asked]


def table_html(table: MaskTable, what: str, words: Iterable[str]) -> str:
    """A notebook's table: how much changed, and the kinds of modules that did most.

    ``words`` are sentences below it.
    """
    from ckdiff.figures.htmltables import MOST, html_table

    rules = list(table.changed)
    elements = table.total_elements
    totals = {rule: int(counts.sum()) for rule, counts in table.changed.items()}
    shares = [f"{percent(totals[rule], elements)} ({rule})" for rule in rules]
    touched = int(np.count_nonzero(table.changed[rules[0]]))
    headline = f"{what}: {' · '.join(shares)} of {extent(elements, len(table))} changed"
    rows = summarise(table, "module")
    shown = sorted(rows, key=lambda row: -row["rules"][rules[0]]["density"])[:MOST]
    heads = ["module", "elements"]
    for rule in rules[:_RULES]:
        heads += [f"changed {rule}", f"density {rule}"]
    cells = [[row["group"], row["elements"], *_cells(row, rules[:_RULES])] for row in shown]
    some = f"{counted(touched, 'tensor')} of {len(table):,} changed ({rules[0]})."
    return html_table(headline, heads, cells, words=[some, *words], more=len(rows) - len(shown))


def not_whole(table: MaskTable, unpaired: int) -> list[str]:
    """Sentences on what was compared in part, by value, or not at all."""
    retyped = len(table.retyped_tensors())
    problems = (
        (unpaired, "not compared"),
        (retyped, "of two dtypes, and compared by value"),
        (len(table.resized), "compared in the rows only that both sides have"),
    )
    return [
        f"{counted(tensors, 'tensor')} {'was' if tensors == 1 else 'were'} {problem}."
        for tensors, problem in problems
        if tensors
    ]


def _cells(row: dict[str, Any], rules: Sequence[str]) -> Iterable[int | str]:
    for rule in rules:
        changed = row["rules"][rule]["changed"]
        yield changed
        yield percent(changed, row["elements"])
