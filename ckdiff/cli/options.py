"""Options that more than one command has, or will have: each is defined once, here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ckdiff.errors import nearest
from ckdiff.naming import BY, DEVICES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Choice(click.Choice[str]):
    """Some words; of another one it says which was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word; raises BadParameter."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = nearest(str(value), map(str, self.choices))
            meant = "" if near is None else f"; did you mean {near}?"
            self.fail(f"{error.message.rstrip('.')}{meant}", param, ctx)


def fraction(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A callback that takes numbers from 0 to 1; ``nan`` is none."""
    if value is not None and not 0 <= value <= 1:
        percent = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise click.BadParameter(f"{value:g} is not a number from 0 to 1{percent}", ctx, param)
    return value


def block(*options: Decorator) -> Decorator:
    """Options that go together, in the order in which ``--help`` lists them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _one_format(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """A callback of what says how to print: only one can be asked for."""
    asked = ctx.meta.setdefault(__name__, set())
    asked |= {param.name} if value else set()
    if len(asked) > 1:
        raise click.UsageError("--json and --csv cannot be used together", ctx)
    return value


as_json: Decorator = click.option(
    "--json", "as_json", is_flag=True, callback=_one_format, help="Print one JSON document."
)

#: of what prints tables
as_json_or_csv: Decorator = block(
    as_json,
    click.option(
        "--csv",
        "as_csv",
        is_flag=True,
        callback=_one_format,
        help="Print comma-separated values with a header.",
    ),
)


def output(metavar: str, help: str, *, required: bool = True) -> Decorator:
    """``-o``: where the result goes."""
    return click.option("-o", "out", required=required, metavar=metavar, help=help)


overwrite: Decorator = click.option(
    "--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete."
)

rules: Decorator = click.option(
    "--rule",
    "rules",
    metavar="RULE",
    multiple=True,
    help="When an element counts as changed: exact (the default), atol=T, rtol=R or ulp=K, each "
    "with an optional @bf16, @f16 or @f32. Repeatable: one pass evaluates all.",
)

rule: Decorator = click.option(
    "--rule",
    metavar="RULE",
    help="Which rule's masks to read. Not needed if every store has exact, or has only one mask.",
)

one_rule: Decorator = click.option(
    "--rule",
    metavar="RULE",
    help="Which rule's masks to read. Default: exact, or the only one.",
)

workers: Decorator = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of threads. Default: all usable cores.",
)

memory: Decorator = click.option(
    "--memory",
    metavar="SIZE",
    help="Limit on memory, such as 512MiB. If it is too small, the command stops before any work.",
)

#: of what writes files the size of a model
files: Decorator = block(overwrite, workers, memory, as_json)

as_version: Decorator = click.option(
    "--as-version",
    is_flag=True,
    help="With packed: write the next version of a stream. It is the smallest, but no engine "
    "reads it.",
)

#: of what writes weight versions
versions: Decorator = block(
    click.option(
        "--checksum",
        type=Choice(["xxh3-128", "blake3", "adler32"]),
        help="Digest of the tensors of a weight version. Default: xxh3-128.",
    ),
    click.option(
        "--version",
        type=click.IntRange(min=1),
        metavar="N",
        help="Number of the weight version to write. Default: the next one.",
    ),
)

#: which weight version of a stream
to: Decorator = click.option(
    "--to",
    "target",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop at this weight version. Default: the newest.",
)

#: at which weight version a base is
base_version: Decorator = click.option(
    "--base-version",
    type=click.IntRange(min=0),
    metavar="N",
    help="The weight version of BASE. Default: what its marker says, or 0.",
)

#: who has to have signed what is used
signed: Decorator = block(
    click.option(
        "--verify-signature",
        metavar="KEYS",
        help="Accept only what one of the public keys in this file has signed. OpenSSH .pub, "
        "allowed_signers, or PEM.",
    ),
    click.option(
        "--signature",
        metavar="FILE",
        help="The signature of a single delta. Default: DELTA.manifest.sig, or "
        "ckdiff.manifest.sig in a weight version.",
    ),
)

#: of what writes checkpoints: the files beside the weights
config: Decorator = block(
    click.option(
        "--config-from",
        metavar="DIR",
        help="Copy config and tokenizer files from DIR instead of from the checkpoint's directory.",
    ),
    click.option(
        "--no-config",
        "config",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Do not copy config and tokenizer files.",
    ),
)

new_store: Decorator = output("STORE", "Write the mask to this mask store.")

#: of what makes a mask store from others
from_stores: Decorator = block(one_rule, new_store, overwrite, workers, as_json)

device: Decorator = click.option(
    "--device",
    type=Choice(DEVICES),
    default="cpu",
    show_default=True,
    help="Where to compare. auto makes a short measurement, and uses a GPU if it is faster.",
)

device_memory: Decorator = click.option(
    "--device-memory",
    metavar="SIZE",
    default="1GiB",
    show_default=True,
    help="Limit on the memory used on a GPU.",
)

scheduler: Decorator = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Run on this Dask cluster, such as tcp://host:8786. All its workers must see the files.",
)


#: what a diff is held against: the names of ckdiff.diffs.gates.Gates
gates: Decorator = block(
    click.option(
        "--fail-above",
        type=float,
        callback=fraction,
        metavar="FRACTION",
        help="Fail if the density under the first --rule is higher, or if tensors are unpaired.",
    ),
    click.option(
        "--fail-below",
        type=float,
        callback=fraction,
        metavar="FRACTION",
        help="Fail if the density under the first --rule is lower, or if tensors are unpaired.",
    ),
    click.option(
        "--allow-unpaired",
        is_flag=True,
        help="Let --fail-above and --fail-below ignore unpaired tensors.",
    ),
    click.option(
        "--exit-code",
        is_flag=True,
        help="Fail if an element differs (under the first --rule, if there is one), or if a "
        "tensor is unpaired.",
    ),
    click.option(
        "--expect-changed",
        multiple=True,
        metavar="GLOB",
        help="Fail if a tensor that matches has no changed element. Repeatable.",
    ),
    click.option(
        "--expect-unchanged",
        multiple=True,
        metavar="GLOB",
        help="Fail if a tensor that matches is not bit-identical. Repeatable.",
    ),
)

#: files that say how a diff ended
reports: Decorator = block(
    click.option(
        "--junit", metavar="FILE", help="Also write the results of the gates to FILE, as JUnit XML."
    ),
    click.option(
        "--markdown", metavar="FILE", help="Also write a summary to FILE, for a pull request."
    ),
)


#: which tensors are compared
selection: Decorator = block(
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Compare only tensors whose names match. Repeatable.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        help="Leave out tensors whose names match, even if --include matches them. Repeatable.",
    ),
)


def by(default: str) -> Decorator:
    """``--by``: what one row of a table stands for."""
    return click.option(
        "--by", type=Choice(BY), default=default, show_default=True, help="One row for each."
    )


#: ``--by`` and ``--top`` of what else prints a short table that it chooses
rows: Decorator = block(
    click.option("--by", type=Choice(BY), help="Print a table with one row for each."),
    click.option(
        "--top",
        type=click.IntRange(min=1),
        metavar="N",
        help="Print only the N rows with the highest density.",
    ),
)


key = click.option(
    "--key",
    metavar="PATH",
    help="Where the weights are in a torch file that holds more, such as trainer.model.",
)
