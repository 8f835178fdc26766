"""``ckdiff clean``."""

from __future__ import annotations

from pathlib import Path

import click

from ckdiff.cli.output import write_lines


@click.command("clean")
@click.argument("directory", metavar="DIR")
def command(directory: str) -> None:
    """Remove the work directories that stopped runs left in DIR.

    After that, the stopped runs cannot be resumed any more. Directories that a running process
    still uses are left alone. So are directories that only have the name of a work directory, and
    those of version 0.1.0, which did not mark them.
    """
    from ckdiff.errors import printable
    from ckdiff.outputs.cleaning import clean

    cleaned = clean(Path(directory))
    lines = [f"removed {printable(str(path))}" for path in cleaned.removed]
    lines += [f"still in use: {printable(str(path))}" for path in cleaned.busy]
    lines += [f"left alone: {why}" for _, why in cleaned.foreign]
    write_lines(lines or [f"nothing to clean in {printable(directory)}"])
