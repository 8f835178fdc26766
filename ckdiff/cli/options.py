"""Options that more than one command has, or will have: each is defined once, here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

#: what a table can be grouped by; the same as ckdiff.summaries.By, which is not imported here
#: because ``--help`` must answer at once
BY = ("tensor", "layer", "module", "dtype", "model")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Fraction(click.ParamType):
    """A number from 0 to 1."""

    name = "fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Read it; ``nan`` is not a number from 0 to 1."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            self.fail(f"{value!r} is not a number from 0 to 1", param, ctx)
        return number


as_json: Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

output: Decorator = click.option(
    "-o", "out", metavar="STORE", help="Write the masks to this mask store."
)

overwrite: Decorator = click.option(
    "--overwrite", is_flag=True, help="Replace the output if it exists, once the new one is whole."
)

rules: Decorator = click.option(
    "--rule",
    "rules",
    metavar="RULE",
    multiple=True,
    help="When an element counts as changed: exact (the default), atol=T, rtol=R or ulp=K, each "
    "with an optional @bf16, @f16 or @f32. Repeatable: one pass evaluates all.",
)

workers: Decorator = click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Threads; the usable cores by default."
)

memory: Decorator = click.option(
    "--memory",
    metavar="SIZE",
    help="Bound on anonymous memory, such as 512MiB; refused before any work if it is too little.",
)


def by(default: str) -> Decorator:
    """``--by``: what one row of a table stands for."""
    return click.option(
        "--by", type=click.Choice(BY), default=default, show_default=True, help="One row for each."
    )
