"""Starting is cheap: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source import ROOT

#: what ``import ckdiff`` and ``ckdiff --help`` must not import
HEAVY = {"numpy", "numba", "llvmlite", "zarr", "dask", "torch", "rich", "huggingface_hub"}


@pytest.mark.parametrize(
    "code",
    [
        "import ckdiff, ckdiff.cli",
        "from ckdiff.cli import main; main(['--help'])",
        "from ckdiff.cli import main; main(['diff', '--help'])",
        "from ckdiff.cli import main; main(['overlap', '--help'])",
    ],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    script = (
        "import sys, atexit\n"
        "loaded = lambda: print(*sorted({name.split('.')[0] for name in sys.modules}),"
        " file=sys.stderr)\n"
        f"atexit.register(loaded)\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    modules = set(done.stderr.split())
    assert "ckdiff" in modules
    assert modules & HEAVY == set()
