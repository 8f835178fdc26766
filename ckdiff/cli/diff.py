"""``ckdiff diff``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckdiff.cli import options

if TYPE_CHECKING:
    from ckdiff.diffs.allotment import Allotment
    from ckdiff.diffs.result import DiffResult
    from ckdiff.naming import By
    from ckdiff.options import Estimate
    from ckdiff.reports.files import Reports

_GATES = (
    "fail_above", "fail_below", "allow_unpaired", "exit_code", "expect_changed", "expect_unchanged",
)  # fmt: skip


_log = logging.getLogger(__name__)


class _Shown(NamedTuple):
    """How the result is printed, and which rows of it."""

    by: By | None
    top: int | None
    as_json: bool
    as_csv: bool

    @property
    def group(self) -> By | None:
        """What a row stands for; None where no rows are asked for."""
        return self.by or ("layer" if self.top or self.as_csv else None)


_EPILOG = """\b
Examples:
  ckdiff diff base/ tuned/ -o run1.zarr
  ckdiff diff base/ epoch3.ckpt --key state_dict --rule atol=1e-5
  ckdiff diff base/ merged/ --base-adapter lora/ --fail-above 0.30

Which files are read and what is compared: docs/checkpoints.md. All options: docs/cli.md. Gates:
docs/ci.md."""


@click.command("diff", epilog=_EPILOG)
@click.argument("base")
@click.argument("tuned")
@options.output("STORE", "Write the masks to this mask store.", required=False)
@options.rules
@options.selection
@click.option(
    "--rename", multiple=True, metavar="REGEX=REPL", help="Rename tuned tensors first (re.sub)."
)
@options.key
@click.option(
    "--base-adapter",
    metavar="DIR",
    help="Merge this LoRA adapter (PEFT) into BASE before comparing.",
)
@click.option("--tuned-adapter", metavar="DIR", help="The same for TUNED.")
@click.option(
    "--common-rows",
    is_flag=True,
    help="If one side has more rows (a larger vocabulary), compare the rows that both have.",
)
@click.option(
    "--no-unfuse",
    "unfuse",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Compare fused tensors as they are stored, not part by part.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Compare the values that quantised tensors stand for, not their bits.",
)
@click.option(
    "--stats", is_flag=True, help="Also measure how far the elements of each tensor moved."
)
@options.workers
@options.memory
@options.device
@options.device_memory
@options.scheduler
@click.option(
    "--stream",
    is_flag=True,
    help="Do not download hub checkpoints; fetch only what is compared, piece by piece.",
)
@click.option(
    "--disk",
    metavar="SIZE",
    default="1GiB",
    show_default=True,
    help="With --stream: limit on the disk space used meanwhile.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what a run would read, write and need, and stop."
)
@options.overwrite
@click.option("--verify", is_flag=True, help="Also read tensors that are known to be equal.")
@options.gates
@options.reports
@options.rows
@options.as_json_or_csv
def command(base: str, tuned: str, out: str | None, dry_run: bool, **asked: Any) -> int:
    """Compare two checkpoints. BASE and TUNED may be safetensors or torch files, directories of
    them, or hf://org/name[@revision] on the Hugging Face hub.

    Prints a summary; --by chooses its table. With -o it also writes one bit for each element to a
    mask store. If the run is stopped, the same command resumes it. The exit code is 1 if a gate
    fails: --fail-above, --fail-below, --exit-code, --expect-changed, --expect-unchanged.
    """
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.diffs.gates import Gates, judge
    from ckdiff.diffs.plan import plan
    from ckdiff.diffs.run import run
    from ckdiff.options import Options

    given = click.get_current_context().get_parameter_source("disk")
    if given == click.core.ParameterSource.COMMANDLINE and not asked["stream"]:
        raise click.UsageError("--disk limits what --stream uses: give --stream too")
    shown = _Shown(**{name: asked.pop(name) for name in _Shown._fields})
    if dry_run and (shown.by or shown.top or shown.as_csv):
        raise click.UsageError("--dry-run compares nothing, so there are no rows to print")
    paths = {f"--{kind}": asked.pop(kind) for kind in ("junit", "markdown")}
    gates = Gates(**{name: asked.pop(name) for name in _GATES}, by_rule=bool(asked["rules"]))
    if dry_run and (gates.asked or any(paths.values())):
        raise click.UsageError("--dry-run compares nothing, so it cannot fail on a difference")
    reports = _reports(paths)
    wanted = Options(**asked, dry_run=dry_run, gated=gates.asked, expected=gates.expected)
    with (
        Reporter("compared") as reporter,
        compilation_noted(reporter),
        plan(base, tuned, out, wanted, reporter.observer()) as planned,
    ):
        if reports is not None:
            reports.keep_away_from(planned.sides, planned.out)
        _say_allotment(planned.allotment)
        if dry_run:
            estimate = planned.estimate()
            if estimate.refusal is not None:
                reporter.note(f"warning: a run would be refused: {estimate.refusal}")
        else:
            result = run(planned)
            result.gates = judge(result, gates)
            if reports is not None:
                reports.write(result)
    if dry_run:
        return _print_estimate(estimate, out, as_json=shown.as_json)
    return _print_result(result, (base, tuned, out), shown)


def _say_allotment(found: Allotment) -> None:
    """Log what a diff may use, and how."""
    from ckdiff.budget import format_size

    memory = f"{format_size(found.needed)} of {format_size(found.memory)}"
    _log.debug(
        "workers: %d, windows: %s elements, memory: %s", found.workers, f"{found.window:,}", memory
    )


def _reports(paths: dict[str, str | None]) -> Reports | None:
    """The reports that are asked for; what writes them is imported only then."""
    if not any(path is not None for path in paths.values()):
        return None
    from ckdiff.reports.files import Reports

    return Reports({**paths})


def _print_estimate(estimate: Estimate, out: str | None, *, as_json: bool) -> int:
    from ckdiff.cli.output import write_json, write_lines

    if as_json:  # what prints tables is imported when there is something to print
        write_json(estimate.to_dict())
    else:
        from ckdiff.cli import diff_text

        write_lines(diff_text.estimate_lines(estimate, out))
    return 0


def _print_result(result: DiffResult, asked: tuple[str, str, str | None], shown: _Shown) -> int:
    """Print what was found, and a line for each gate that failed; gives the exit code."""
    from ckdiff.cli.output import remark, say, write_json, write_lines, write_rows
    from ckdiff.stores.summaries import summarise

    group = shown.group
    rows = [] if group is None else summarise(result.table, group, top=shown.top)
    if shown.as_json:
        table = {} if group is None else {"by": group, "rows": rows}
        write_json(result.to_dict() | table)
    elif group is not None and shown.as_csv:
        from ckdiff.cli import show_text

        write_rows(show_text.csv_lines(result.table, group, rows))
    else:
        from ckdiff.cli import diff_text

        write_lines(diff_text.lines(result, *asked, None if group is None else (group, rows)))
        remark(diff_text.next_step(asked[2]))
    for verdict in result.gates:
        if not verdict.ok:
            say(f"gate {verdict.gate} failed: {verdict.reason}")
    return int(not result.ok)
