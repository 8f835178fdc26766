"""``ckdiff combine``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("combine")
@click.argument("operation")
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE...")
@options.from_stores
def command(operation: str, stores: tuple[str, ...], out: str, as_json: bool, **asked: Any) -> None:
    """Combine the masks of 2 to 64 stores into a new store.

    OPERATION is intersection, union, difference (the first without all others),
    symmetric-difference (changed in an odd number of stores) or at-least=K. Tensors are matched by
    name and shape.
    """
    from ckdiff.cli.made import report
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.masks.combine import combine

    with Reporter("combined") as reporter, compilation_noted(reporter):
        store = combine(operation, stores, out, observer=reporter.observer(), **asked)
    report(store, as_json=as_json)
