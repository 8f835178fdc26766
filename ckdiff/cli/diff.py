"""``ckdiff diff``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("diff")
@click.argument("base")
@click.argument("tuned")
@options.output("STORE", "Write the masks to this mask store.", required=False)
@options.rules
@click.option("--include", multiple=True, metavar="GLOB", help="Only tensors that match.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors that match; this wins.")
@click.option(
    "--rename", multiple=True, metavar="REGEX=REPL", help="Rename tuned tensors first (re.sub)."
)
@click.option("--stats", is_flag=True, help="Also measure how far elements moved, per tensor.")
@options.workers
@options.memory
@options.device
@options.device_memory
@options.scheduler
@click.option(
    "--stream", is_flag=True, help="Fetch only what is compared of hub checkpoints, piece by piece."
)
@click.option(
    "--disk",
    metavar="SIZE",
    default="1GiB",
    show_default=True,
    help="--stream: bound on the disk that is used meanwhile.",
)
@click.option("--dry-run", is_flag=True, help="Say what a run would read, write and need.")
@options.overwrite
@click.option("--verify", is_flag=True, help="Also read what is known to be equal.")
@click.option(
    "--fail-above",
    type=float,
    callback=options.fraction,
    metavar="FRACTION",
    help="Exit with 1 when the density under the first --rule is higher.",
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 when any element or tensor differs.")
@options.as_json
def command(
    base: str,
    tuned: str,
    out: str | None,
    dry_run: bool,
    fail_above: float | None,
    exit_code: bool,
    as_json: bool,
    **asked: Any,
) -> int:
    """Compare the checkpoints BASE and TUNED: safetensors files, directories of them, or
    hf://org/name[@revision] on the Hugging Face hub.

    Prints a summary; with -o also writes one bit for each element to a mask store. A run that was
    stopped is resumed by the same command.
    """
    from ckdiff.cli.output import say, write_json, write_lines
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.diffs.plan import plan
    from ckdiff.diffs.run import run
    from ckdiff.options import Options

    given = click.get_current_context().get_parameter_source("disk")
    if given == click.core.ParameterSource.COMMANDLINE and not asked["stream"]:
        raise click.UsageError("--disk bounds what --stream uses; without it there is no bound")
    if dry_run and (exit_code or fail_above is not None):
        raise click.UsageError("--dry-run compares nothing, so it cannot fail on a difference")
    with (
        Reporter("compared") as reporter,
        compilation_noted(reporter),
        plan(base, tuned, out, Options(**asked, dry_run=dry_run), reporter.observer()) as planned,
    ):
        if dry_run:
            estimate = planned.estimate()
            if estimate.refusal is not None:
                reporter.note(f"warning: a run would be refused: {estimate.refusal}")
        else:
            result = run(planned)
    if not as_json:  # what prints tables is imported when there is something to print
        from ckdiff.cli import diff_text
    if dry_run:
        if as_json:
            write_json(estimate.to_dict())
        else:
            write_lines(diff_text.estimate_lines(estimate, out))
        return 0
    if as_json:
        write_json(result.to_dict())
    else:
        write_lines(diff_text.lines(result, base, tuned, out))
        say(diff_text.next_step(out))
    rule, counts = next(iter(result.rules.items()))
    if fail_above is not None and counts["density"] > fail_above:
        say(f"the {rule} density {counts['density']:.6g} exceeds --fail-above {fail_above:g}")
        return 1
    return int(exit_code and result.differs)
