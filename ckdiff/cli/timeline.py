"""``ckdiff timeline``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckdiff.cli import options

if TYPE_CHECKING:
    from ckdiff.naming import By
    from ckdiff.runs.timelines.result import Timeline

_EPILOG = """\b
Examples:
  ckdiff timeline base/ run/step-100/ run/step-200/ -o run.timeline
  ckdiff timeline base/ --glob 'run/checkpoint-*' -o run.timeline --by module
  ckdiff timeline base/ stream/ -o run.timeline

What each number means: docs/timeline.md."""


@click.command("timeline", epilog=_EPILOG)
@click.argument("checkpoints", nargs=-1, metavar="CHECKPOINT CHECKPOINT...")
@options.output("DIR", "Write the masks of all steps, and the first moves, to this directory.")
@click.option(
    "--glob",
    metavar="PATTERN",
    multiple=True,
    help="Add the paths that match, in natural order, after those named on the command line. "
    "Repeatable.",
)
@click.option(
    "--rule",
    metavar="RULE",
    default="exact",
    show_default=True,
    help="When an element counts as changed: exact, atol=T, rtol=R or ulp=K, each with an optional "
    "@bf16, @f16 or @f32.",
)
@options.selection
@options.key
@click.option(
    "--no-first-moves",
    "first_moves",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not store when each element first moved (a byte for each element, before "
    "compression).",
)
@click.option(
    "--stats",
    is_flag=True,
    help="Also sum how far the weights moved, and count those that moved on and those that moved "
    "back.",
)
@options.by("layer")
@options.workers
@options.memory
@click.option("--dry-run", is_flag=True, help="Say what a run would read, write and need.")
@options.overwrite
@options.as_json_or_csv
def command(
    checkpoints: tuple[str, ...],
    out: str,
    glob: tuple[str, ...],
    *,
    rule: str,
    first_moves: bool,
    by: By,
    dry_run: bool,
    as_json: bool,
    as_csv: bool,
    **asked: Any,
) -> None:
    """Print when the weights of a run changed: each checkpoint against the first and the one
    before.

    Every checkpoint is read once. At each step: how much differs from the first checkpoint and from
    the one before, and how much of what differs in the end did so already. DIR has a mask store
    for each step. With more checkpoints than DIR has, it is continued: three are read, not all. A
    run that was stopped is resumed by the same command. BASE and a stream of weight versions are
    the base and each version.
    """
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.options import Options
    from ckdiff.runs.timelines.plan import in_order, plan
    from ckdiff.runs.timelines.result import Timeline
    from ckdiff.runs.timelines.run import run

    wanted, given = Options(rules=[rule], dry_run=dry_run, **asked), in_order(checkpoints, glob)
    with (
        Reporter("compared") as reporter,
        compilation_noted(reporter),
        plan(given, out, wanted, reporter.observer(), first_moves=first_moves) as planned,
    ):
        if dry_run:
            estimate = planned.estimate()
            if estimate["refusal"] is not None:
                reporter.note(f"warning: a run would be refused: {estimate['refusal']}")
            return _print_estimate(estimate, as_json=as_json)
        outcome = run(planned)
        result = Timeline(planned.out, asked=planned.asked, outcome=outcome)
    return print_timeline(result, by, as_json=as_json, as_csv=as_csv)


def _print_estimate(estimate: dict[str, Any], *, as_json: bool) -> None:
    from ckdiff.cli.output import write_json, write_lines

    if as_json:
        return write_json(estimate)
    from ckdiff.cli import timeline_text

    return write_lines(timeline_text.estimate_lines(estimate))


def print_timeline(
    result: Timeline, by: By, *, top: int | None = None, as_json: bool, as_csv: bool
) -> None:
    """Print it, with rows by ``by``: all, or the ``top`` ones of which most changed in the end."""
    from ckdiff.cli.output import write_json_rows, write_lines, write_rows

    rows = result.summary(by)
    if top is not None:
        rows = sorted(rows, key=lambda row: -row["final"] / max(row["elements"], 1))[:top]
    if as_json:
        return write_json_rows({**result.to_dict(), "by": by}, rows)
    from ckdiff.cli import timeline_text

    if as_csv:
        return write_rows(timeline_text.csv_lines(result, by, rows))
    return write_lines(timeline_text.lines(result, by, rows))
