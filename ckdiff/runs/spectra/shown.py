"""Spectra as notebooks show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckdiff.figures.figure import Figure
from ckdiff.figures.htmltables import html_table, spread
from ckdiff.figures.numbers import share

Row = dict[str, Any]


class SpectrumPlots:
    """Pictures of ranks and norms; each is a ``Figure``."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def ranks(self) -> Figure:
        """How much of its full rank each update has."""
        from ckdiff.figures.spectra import ranks

        return ranks(self._rows)

    def norms(self) -> Figure:
        """The largest singular value of each update."""
        from ckdiff.figures.spectra import norms

        return norms(self._rows)


def spectrum_html(said: Row) -> str:
    """A notebook's table: some of the matrices. ``said`` is the JSON contract."""
    rows = said["rows"]
    looked = f"{len(rows):,} of {said['matrices']:,} matrices looked at"
    heads = ["matrix", "shape", "rank", "of full rank", "99 % of the energy", "stable rank", "norm"]
    at = spread(len(rows))
    cells = [
        [
            rows[i]["name"],
            "×".join(map(str, rows[i]["shape"])),
            rows[i]["rank"],
            share(rows[i]["rank_share"]),
            rows[i]["rank99"],
            rows[i]["stable_rank"],
            rows[i]["norm2"],
        ]
        for i in at
    ]
    words = []
    if any(row["sampled"] for row in rows):
        words.append("They are a sample of the model.")
    if said["without"]:
        words.append(f"{len(said['without']):,} matrices have no numbers to look at.")
    if endless := sum(not row["finite"] for row in rows):
        words.append(f"Of {endless:,} the differences are not all finite: they have no rank.")
    headline = f"{said['tuned']} against {said['base']}: {looked}"
    return html_table(headline, heads, cells, texts=2, words=words, more=len(rows) - len(at))
