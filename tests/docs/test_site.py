"""The site is built without a warning, and its quickstart does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.md"
#: as ``python -m sphinx``; looking for garbage in all pages again and again is a quarter of it
SPHINX = """
import gc, sys
from sphinx.cmd.build import main
gc.disable()
sys.exit(main(sys.argv[1:]))
"""


def test_it_is_built(tmp_path: Path) -> None:
    out = tmp_path / "site"
    command = [sys.executable, "-c", SPHINX, "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        made = out / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert made.is_file(), page
    assert "ckdiff.diff" in (out / "reference.html").read_text("utf-8")
    assert "found.js" in (out / "how-do-i.html").read_text("utf-8")


def test_the_quickstart_runs(tmp_path: Path) -> None:
    """Its commands and its Python, in order, in a place of their own."""
    text = QUICKSTART.read_text("utf-8")
    blocks = re.findall(r"^```(console|python)\n(.*?)^```", text, re.S | re.M)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    ckdiff = tmp_path / "bin" / "ckdiff"
    ckdiff.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckdiff "$@"\n')
    ckdiff.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    said = ""
    for kind, code in blocks:
        if "pip install" in code:
            continue
        command = ["bash", "-e", "-c", code] if kind == "console" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True
        )
        assert done.returncode == 0, (code, done.stderr)
        said += done.stdout
    shown = re.search(r"^```\n(445.*?)^```", text, re.S | re.M)
    assert shown is not None
    for line in filter(None, map(str.strip, shown[1].splitlines())):
        assert line in {printed.strip() for printed in said.splitlines()}, line
    assert (tmp_path / "report.html").is_file()
