"""``ckdiff combine``."""

from __future__ import annotations

import click

from ckdiff.cli import options
from ckdiff.cli.made import one_rule, output


@click.command("combine")
@click.argument("operation")
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE...")
@one_rule
@output
@options.overwrite
@options.workers
@options.as_json
def command(
    operation: str,
    stores: tuple[str, ...],
    rule: str | None,
    out: str,
    overwrite: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Combine the masks of 2 to 64 stores into a new store.

    OPERATION is intersection, union, difference (the first without all others),
    symmetric-difference (changed in an odd number of stores) or at-least=K. Tensors are matched by
    name and shape.
    """
    from ckdiff.cli.made import report
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.masks.combine import combine

    with Reporter("combined") as reporter, compilation_noted(reporter):
        made = combine(
            operation,
            stores,
            out,
            rule=rule,
            overwrite=overwrite,
            workers=workers,
            observer=reporter.observer(),
        )
    report(made, as_json=as_json)
