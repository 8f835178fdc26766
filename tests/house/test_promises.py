"""What the docs promise to check is checked under ``python -O`` too, which takes asserts out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BROKEN = """
from pathlib import Path
import numpy as np
from ckdiff.deltas.container import DeltaWriter
from ckdiff.errors import CkdiffError
from ckdiff.layout import Layout
from ckdiff.masks.random import Population, RandomMask
from ckdiff.overlaps import overlap

def votes():
    rows = overlap._Rows(None, ["model"], *map(np.array, ([100], [[10, 4, 12]], [[81, 14, 4]])))
    overlap._self_test(rows)

def drawn():
    layout = Layout(np.array([100], np.int64))
    maker = RandomMask(layout, [Population(0, "tensor a", 100, 10)], by_tensor=True)
    maker.verify(np.array([11], np.int64))

def lost():
    Path("short").write_bytes(b"12345")
    with open("short", "rb") as file:
        DeltaWriter(Path("delta")).append_file(file.fileno(), 2, 10)

assert False, "asserts are not taken out"
for broken in votes, drawn, lost:
    try:
        broken()
    except CkdiffError as error:
        print(type(error).__name__, error.one_line())
"""


def test_promises_hold_without_asserts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-c", _BROKEN], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    votes, drawn, lost = done.stdout.splitlines()
    assert "the pairs and the votes of model contradict each other" in votes
    assert "exactly 10 changed elements, and 11 were drawn" in drawn
    assert lost.startswith("OutputError 7 bytes of a delta were lost")
