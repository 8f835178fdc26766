"""One picture: its rows, a Vega-Lite description without data, and what it says in words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckdiff.figures.style import themed

Row = dict[str, Any]
Spec = dict[str, Any]

DATA = "rows"  #: what descriptions call their data


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A picture; shown by notebooks as it is. ``svg`` and ``pdf`` need ``ckdiff[report]``."""

    name: str  #: of files and anchors: ``heatmap``
    title: str  #: a phrase
    says: str  #: how it is to be read, in a sentence or two
    rows: list[Row]  #: the numbers drawn, one dict for each mark
    spec: Spec  #: Vega-Lite, without its data

    def vega_lite(self, *, dark: bool = False) -> Spec:
        """The whole description, with data: what any tool that knows Vega-Lite draws."""
        spec = copy.deepcopy(self.spec)
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "description": self.title,
            **spec,
            "datasets": {DATA: self.rows},
            "config": themed(dark=dark),
        }

    def svg(self, *, dark: bool = False) -> str:
        """The picture as SVG text. Raises UsageError where what draws is not installed."""
        from ckdiff.figures.drawing import svg

        return svg(self.vega_lite(dark=dark))

    def pdf(self) -> bytes:
        """The picture as a PDF of one page, for papers. Raises as ``svg`` does."""
        from ckdiff.figures.drawing import pdf

        return pdf(self.vega_lite())

    def _repr_mimebundle_(self, **asked: Any) -> dict[str, Any]:
        """What notebooks show: a live picture where they can, else a still one."""
        from ckdiff.figures import drawing

        bundle: dict[str, Any] = {
            "text/plain": f"{self.title}\n{self.says}",
            "application/vnd.vegalite.v6+json": self.vega_lite(),
        }
        if drawing.installed():
            bundle["image/svg+xml"] = self.svg()
        return bundle


def of_rows(spec: Spec) -> Spec:
    """The description with its data named; a picture of several parts names them once."""
    return {"data": {"name": DATA}, **spec}


def tooltip(*fields: tuple[str, str, str]) -> list[Spec]:
    """What is said of the mark under the pointer: (field, title, format) of each line.

    A format that is empty leaves the value as it is.
    """
    return [
        {"field": field, "title": title}
        | ({"type": "quantitative", "format": form} if form else {"type": "nominal"})
        for field, title, form in fields
    ]


def numbered(labels: Sequence[str]) -> list[str]:
    """Labels that differ, whatever they are: a repeated one gets its number."""
    seen: dict[str, int] = {}
    out = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        out.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return out
