"""``ckdiff clean``."""

from __future__ import annotations

from pathlib import Path

import click

from ckdiff.cli.output import write_lines


@click.command("clean")
@click.argument("directory", metavar="DIR")
def command(directory: str) -> None:
    """Remove the work directories that stopped runs left in DIR.

    A stopped run is resumed by the command that started it; clean gives up on that. What a running
    process still writes is left alone.
    """
    from ckdiff.errors import printable
    from ckdiff.writing.workdir import clean

    removed, busy = clean(Path(directory))
    lines = [f"removed {printable(str(path))}" for path in removed]
    lines += [f"still in use: {printable(str(path))}" for path in busy]
    write_lines(lines or [f"nothing to clean in {printable(directory)}"])
