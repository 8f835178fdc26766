"""``report``: one HTML file that people show each other, of mask stores and what they agree on."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ckdiff.checkpoints.opening import Given
from ckdiff.errors import UsageError, printable
from ckdiff.options import Observer, checked_observer, checked_output, checked_path
from ckdiff.reports import contents
from ckdiff.reports.files import our_file, write_file
from ckdiff.reports.page.document import BEGINS, document
from ckdiff.reports.pictures import pictures_place, write_pictures
from ckdiff.reports.sections import sections
from ckdiff.rules import Rule
from ckdiff.runs.timelines.file import is_timeline
from ckdiff.runs.timelines.result import Timeline, open_timeline
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import common_rule
from ckdiff.stores.shortnames import short_names

Source = str | os.PathLike[str] | MaskStore | Timeline

_LARGEST_SPECTRUM = 64 << 20  #: bytes of a file that --spectrum reads


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written."""

    path: Path
    figures: list[Path]  #: written beside it, with ``figures=``
    data: dict[str, Any] = field(repr=False)  #: every number of the page

    def to_dict(self) -> dict[str, Any]:
        """What ``ckdiff report --json`` prints."""
        return {
            "report": str(self.path),
            "figures": [str(path) for path in self.figures],
            **self.data,
        }


def report(
    sources: Sequence[Source],
    out: str | os.PathLike[str],
    *,
    rule: str | Rule | None = None,
    base: Given | None = None,
    key: str | None = None,
    spectrum: str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
    title: str | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> Report:
    """Write a report of ``sources`` (mask stores, timelines) to ``out``, an HTML file.

    ``base`` is the checkpoint that the runs started from. With it the page has the density by size
    of the weight, and chance takes magnitudes into account. ``spectrum`` is what ``ckdiff spectrum
    --json`` printed. ``figures`` is a directory for the same pictures as SVG and PDF. An existing
    report is replaced. Raises a CkdiffError: UsageError, StoreError, OutputError, BudgetError.
    """
    observer = checked_observer(observer)
    given = _Given.of(sources)
    place = our_file(checked_output(out), BEGINS)
    pictures = None if figures is None else pictures_place(figures)
    for output in (place, pictures):
        if output is not None:
            output.check()
            output.keep_away_from((), given.paths)
    stores, labels = given.stores, given.labels
    text = common_rule(stores, rule)
    alike = contents.side_by_side(stores, text)
    data = contents.head(title or _title(given)) | {
        "spectrum": None if spectrum is None else _spectrum(spectrum),  # before masks are read
        "rule": text,
        "runs": contents.runs(stores, labels, text),
        "timelines": given.said(),
        "structure": contents.shapes(alike, memory=memory, observer=observer),
        **contents.agreement(alike, base=base, key=key, memory=memory, observer=observer),
        "tensors": contents.tensors(stores, text),
    }
    parts = sections(data)
    write_file(place, document(data, parts, data["tensors"]))
    every = [figure for part in parts for figure in part.every_figure() if figure.rows]
    data["drawn"] = {figure.name: figure.rows for figure in every}
    written = [] if pictures is None else write_pictures(every, pictures)
    return Report(place.out, written, data)


class _Given(NamedTuple):
    """What a report is of: of a timeline also the masks of its last step."""

    stores: list[MaskStore]
    labels: list[str]
    timelines: list[tuple[str, Timeline]]
    paths: list[Path]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> _Given:
        """Open them. Raises UsageError for none, StoreError."""
        opened = [_opened(source) for source in sources]
        if not opened:
            raise UsageError("a report needs at least one store")
        names = short_names([str(found.path) for found in opened])
        pairs = list(zip(names, opened, strict=True))
        return cls(
            [f if isinstance(f, MaskStore) else f.store(len(f)) for f in opened],
            [n if isinstance(f, MaskStore) else f"{n}, at the end" for n, f in pairs],
            [(n, f) for n, f in pairs if isinstance(f, Timeline)],
            [found.path for found in opened],
        )

    def said(self) -> list[dict[str, Any]]:
        """The data of the timelines."""
        found = contents.timelines([timeline for _, timeline in self.timelines])
        return [{"label": n, **data} for (n, _), data in zip(self.timelines, found, strict=True)]


def _opened(source: Source) -> MaskStore | Timeline:
    if isinstance(source, (MaskStore, Timeline)):
        return source
    text = checked_path("the store", source)
    return open_timeline(text) if is_timeline(text) else open_store(text)


def _title(given: _Given) -> str:
    names = short_names([str(path) for path in given.paths])
    if len(names) == 1:
        return f"What changed in {names[0]}"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"What changed in {shown}"


def _spectrum(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``ckdiff spectrum --json`` printed. Raises UsageError for anything else."""
    text = checked_path("the spectrum", path)
    problem = f"{printable(text)} is not what ckdiff spectrum --json prints"
    try:
        with open(os.open(text, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            data = file.read(_LARGEST_SPECTRUM + 1)
        found = json.loads(data)
        rows = [_matrix(row) for row in found["rows"]]
    except OSError as error:
        raise UsageError(f"cannot read {printable(text)}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(problem, hint="run ckdiff spectrum BASE TUNED --json > FILE") from None
    return {"rows": rows}


def _matrix(row: dict[str, Any]) -> dict[str, Any]:
    """One row with what is drawn of it. Raises TypeError, ValueError or KeyError."""
    out: dict[str, Any] = {"name": str(row["name"]), "sampled": bool(row["sampled"])}
    out["shape"] = [operator.index(size) for size in row["shape"]]
    for key in ("rank", "stable_rank", "rank99", "norm2"):
        value = row[key]
        number = None if value is None else float(value)
        out[key] = number if number is None or math.isfinite(number) else None
    return out
