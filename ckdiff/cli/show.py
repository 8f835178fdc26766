"""``ckdiff show``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckdiff.cli import options

if TYPE_CHECKING:
    from ckdiff.stores.summaries import By


@click.command("show")
@click.argument("store")
@options.by("layer")
@click.option("--sort", metavar="COLUMN", help="Sort by a column, such as density, largest first.")
@click.option(
    "--top", type=click.IntRange(min=1), metavar="N", help="Only the first N rows after sorting."
)
@options.as_json_or_csv
def command(
    store: str, by: By, sort: str | None, top: int | None, as_json: bool, as_csv: bool
) -> None:
    """Print how much of each tensor, layer, module or dtype changed, according to STORE.

    --top without --sort keeps the rows with the highest density. On a terminal, a map of layers and
    modules follows the table. Tensors that were not compared are listed at the end. STORE may also
    be a timeline: then this prints what ckdiff timeline printed.
    """
    if _is_timeline(store):
        return _timeline(store, by, sort, top, as_json=as_json, as_csv=as_csv)
    return _store(store, by, sort, top, as_json=as_json, as_csv=as_csv)


def _store(
    path: str, by: By, sort: str | None, top: int | None, *, as_json: bool, as_csv: bool
) -> None:
    from ckdiff.cli import show_text
    from ckdiff.cli.output import write_json, write_lines, write_rows
    from ckdiff.stores.maskstore import open_store

    opened = open_store(path)
    rows = opened.summary(by, sort=sort, top=top)
    if as_json:
        from ckdiff.reports.provenance import provenance

        write_json({"rows": rows, **provenance(opened)})
    elif as_csv:
        write_rows(show_text.csv_lines(opened.table, by, rows))
    else:
        write_lines(show_text.lines(opened, by, rows))


def _is_timeline(path: str) -> bool:
    from ckdiff.runs.timelines.file import is_timeline

    return is_timeline(path)


def _timeline(
    path: str, by: By, sort: str | None, top: int | None, *, as_json: bool, as_csv: bool
) -> None:
    from ckdiff.cli.timeline import print_timeline
    from ckdiff.errors import UsageError
    from ckdiff.runs.timelines.result import open_timeline

    if sort is not None:
        raise UsageError("a timeline is not sorted", hint="--csv has a column for each number")
    print_timeline(open_timeline(path), by, top=top, as_json=as_json, as_csv=as_csv)
