"""A timeline as notebooks show it, as data frames and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ckdiff.figures.figure import Figure
from ckdiff.figures.frames import Record, pandas_frame, polars_frame
from ckdiff.figures.htmltables import html_table, spread
from ckdiff.figures.numbers import counted, percent, share
from ckdiff.naming import By
from ckdiff.stores.shortnames import short_names

Row = dict[str, Any]
_FATES = {
    "never": "never touched",
    "returned": "touched and returned",
    "final": "changed at the end",
}


class TimelineShown:
    """What notebooks can do with a timeline."""

    path: Path
    checkpoints: list[str]

    def to_dict(self) -> Row:
        """The JSON contract."""
        raise NotImplementedError

    def summary(self, by: By = "layer") -> list[Row]:
        """Rows with their steps."""
        raise NotImplementedError

    def records(self, by: By | None = None) -> list[Record]:
        """A dict for each step: ``step``, from 1 on, and what ``steps`` says of it.

        With ``by`` one for each row of ``summary(by)`` and each step, with ``group`` and
        ``elements``. Raises UsageError for an unknown ``by``.
        """
        if by is None:
            return [{"step": i, **step} for i, step in enumerate(self.to_dict()["steps"], 1)]
        return list(_grouped(self.summary(by), self.checkpoints[1:]))

    def to_pandas(self, by: By | None = None) -> Any:
        """``records(by)`` as a pandas DataFrame. Raises UsageError where pandas is missing."""
        return pandas_frame(self.records(by))

    def to_polars(self, by: By | None = None) -> Any:
        """``records(by)`` as a polars DataFrame. Raises UsageError where polars is missing."""
        return polars_frame(self.records(by))

    @property
    def plot(self) -> TimelinePlots:
        """Pictures: ``plot.timeline()``, ``.coverage()``, ``.fates()``, ``.layers()``; with
        statistics also ``.lengths()`` and ``.directions()``.
        """
        return TimelinePlots(self.to_dict(), self.summary)

    def _repr_html_(self) -> str:
        return timeline_html(self.to_dict(), self.path.name)


def _grouped(rows: Sequence[Row], checkpoints: Sequence[str]) -> Iterator[Record]:
    for row in rows:
        for i, step in enumerate(row["steps"], 1):
            head = {"group": row["group"], "step": i, "checkpoint": checkpoints[i - 1]}
            yield {**head, "elements": row["elements"], **step}


class TimelinePlots:
    """Pictures of a run; each is a ``Figure``.

    ``said`` is the JSON contract, ``layers`` gives the summary by layer.
    """

    def __init__(self, said: Row, layers: Callable[[], list[Row]]) -> None:
        self._said, self._layers = said, layers

    def timeline(self) -> Figure:
        """Density of each step, against the first checkpoint and against the one before."""
        from ckdiff.figures.course import densities

        return densities(self._said["steps"], self._said["elements"])

    def coverage(self) -> Figure:
        """How much of the final mask each step had already."""
        from ckdiff.figures.course import coverage

        return coverage(self._said["steps"])

    def fates(self) -> Figure:
        """Elements never touched, touched and returned, and changed at the end."""
        from ckdiff.figures.course import fates

        return fates({key: self._said[key] for key in _FATES})

    def lengths(self) -> Figure:
        """How far the weights went at each step, and how far away they are."""
        from ckdiff.figures.course import lengths

        return lengths(self._said["steps"])

    def directions(self) -> Figure:
        """Of what moved again at each step, the share that went onward."""
        from ckdiff.figures.course import directions

        return directions(self._said["steps"])

    def layers(self) -> Figure:
        """Density of each layer at each step."""
        from ckdiff.figures.course import layers

        return layers(self._layers(), self._said["checkpoints"][1:])


def timeline_html(said: Row, called: str) -> str:
    """A notebook's table: the steps. ``said`` is the JSON contract."""
    steps, elements = said["steps"], said["elements"]
    fates = " · ".join(f"{percent(said[key], elements)} {text}" for key, text in _FATES.items())
    size = f"{counted(len(steps), 'step')} of {counted(elements, 'element')} ({said['rule']})"
    heads = ["step", "checkpoint", "changed since the first", "density", "since the one before"]
    heads += ["of the final mask"]
    names = short_names([step["checkpoint"] for step in steps])
    at = spread(len(steps))
    cells = [
        [
            str(i + 1),
            names[i],
            steps[i]["changed_since_first"],
            percent(steps[i]["changed_since_first"], elements),
            percent(steps[i]["changed_since_previous"], elements),
            share(steps[i]["coverage"]),
        ]
        for i in at
    ]
    more = len(steps) - len(at)
    return html_table(f"{called}: {size}: {fates}", heads, cells, texts=2, more=more)
