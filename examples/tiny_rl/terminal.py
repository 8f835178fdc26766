"""Makes the picture of a terminal in the README: python examples/tiny_rl/terminal.py.

Runs a command on the checkpoints beside this file and draws what it prints, with its colours, as an
SVG that needs no font and no other file. The window has a background of its own, so that it can be
read on a light page and on a dark one.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
PICTURE = CHECKPOINTS.parents[2] / "docs/images/terminal.svg"
COMMAND = "show", "run1.zarr", "--by", "module"
COLUMNS = 74
#: rich's own, without the fonts that it fetches from elsewhere
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>ckdiff show run1.zarr --by module: a table of modules and a map of layers</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def printed() -> str:
    """The command and what it prints, with the codes of colours."""
    program = [sys.executable, "-m", "ckdiff"]
    colours = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    surroundings = os.environ | colours | {"COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"}
    surroundings.pop("NO_COLOR", None)
    with tempfile.TemporaryDirectory() as folder:
        pair = [str(CHECKPOINTS / "base"), str(CHECKPOINTS / "rl_seed1")]
        made = [*program, "diff", *pair, "-o", "run1.zarr", "-q"]
        subprocess.run(made, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        shown = subprocess.run(
            [*program, *COMMAND],
            check=True,
            cwd=folder,
            env=surroundings,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
    return f"$ ckdiff {' '.join(COMMAND)}\n{shown.stdout.rstrip()}"


def drawn(text: str) -> str:
    """An SVG of a terminal that shows a text."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        no_color=False,
    )
    console.print(Text.from_ansi(text), soft_wrap=True)
    return console.export_svg(
        title="ckdiff", theme=SVG_EXPORT_THEME, code_format=FORMAT, unique_id="terminal"
    )


if __name__ == "__main__":
    PICTURE.write_text(drawn(printed()), "utf-8")
