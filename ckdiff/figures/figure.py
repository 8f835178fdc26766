"""One picture: its rows, a Vega-Lite description without data, and what it says in words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckdiff.errors import printable
from ckdiff.figures.style import themed

Row = dict[str, Any]
Spec = dict[str, Any]

DATA = "rows"  #: what descriptions call their data


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Figure:
    """A picture. Notebooks show it. ``svg`` and ``pdf`` need ``ckdiff[report]``."""

    name: str  #: of files and anchors: ``heatmap``
    title: str  #: a phrase
    says: str  #: how it is to be read, in a sentence or two
    rows: list[Row]  #: the numbers drawn, one dict for each mark
    spec: Spec  #: Vega-Lite, without its data

    def __repr__(self) -> str:
        return f"<Figure {printable(self.name)}: {printable(self.title)}>"

    def vega_lite(self, *, dark: bool = False) -> Spec:
        """The whole description with its data, for any tool that draws Vega-Lite."""
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "description": printable(self.title),
            **shown(self.spec),
            "datasets": {DATA: shown(self.rows)},
            "config": themed(dark=dark),
        }

    def svg(self, *, dark: bool = False) -> str:
        """The picture as SVG text. Raises UsageError if the drawing package is not installed."""
        from ckdiff.figures.drawing import svg

        return svg(self.vega_lite(dark=dark))

    def pdf(self) -> bytes:
        """The picture as a PDF of one page, for papers. Raises as ``svg`` does."""
        from ckdiff.figures.drawing import pdf

        return pdf(self.vega_lite())

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the picture to a file, complete or not at all, and return its path.

        The name ends with ``.svg``, ``.pdf``, or ``.json`` for the Vega-Lite description with its
        numbers. With ``overwrite`` a picture that was written before is replaced. Raises UsageError
        and OutputError.
        """
        from ckdiff.figures.saving import save

        return save(self, path, overwrite=overwrite)

    def _repr_mimebundle_(self, **asked: Any) -> dict[str, Any]:
        """What notebooks show: a live picture where they can, else a still one.

        JupyterLab draws no SVG of a notebook that it does not trust, such as one that was sent.
        """
        import base64

        from ckdiff.figures import drawing

        spec = self.vega_lite()
        spec["config"]["background"] = "white"  # a still picture cannot know how dark its page is
        bundle: dict[str, Any] = {
            "text/plain": f"{printable(self.title)}\n{self.says}",
            "application/vnd.vegalite.v6+json": spec,
        }
        if drawing.installed():
            bundle["image/svg+xml"] = drawing.svg(spec)
            bundle["image/png"] = base64.b64encode(drawing.png(spec)).decode()
        return bundle


def shown(value: Any) -> Any:
    """A copy of a description or of rows as they are drawn: what turns the direction of a text, or
    cannot be seen, is escaped, as it is on a terminal.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(each) for each in value]
    return value


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
