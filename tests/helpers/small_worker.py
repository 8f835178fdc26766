"""Every command as ckdiff-core has it, in a process: ckdiff imports only what that package needs.

Kernels are compiled where they are not kept yet, as machine code comes along with packages only.
Prints, as JSON, what is wrong with which command; its argument is a prepared folder.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "package"))  # last: it has a build.py

import trial
from cli_support import run

from ckdiff import errors
from ckdiff.kernels import compiled, kinds

#: what may be imported, by the names of modules
NEEDED = {"ckdiff", "click", "google_crc32c", "numpy", "rich", "xxhash", "zstandard"}
COMPILER = "ckdiff.kernels.codegen", "ckdiff.kernels.numbaview"
FOUND, IMPORT, LISTED = compiled._find, builtins.__import__, frozenset(kinds.every())


def imported(
    name: str, of: Mapping[str, object] | None = None, /, *more: Any, **named: Any
) -> object:
    """What an import statement calls: those of ckdiff find nothing else."""
    importer = str((of or {}).get("__name__"))
    level = named.get("level", more[2] if len(more) > 2 else 0)
    top = name.partition(".")[0]
    ours = importer.startswith("ckdiff.") and not importer.startswith(COMPILER)
    if ours and level == 0 and top not in NEEDED | sys.stdlib_module_names:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return IMPORT(name, of, *more, **named)


def found(name: str, kind: str) -> compiled.Function:
    """A kernel, which packages must have."""
    if (name, kind) not in LISTED:
        raise AssertionError(f"ckdiff/kernels/kinds.py does not list {name!r} {kind!r}")
    return FOUND(name, kind)


def said(words: list[str]) -> trial.Said:
    done = run(*words)
    return trial.Said(done.exit_code, done.stderr)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    builtins.__import__ = imported  # type: ignore[assignment]
    compiled._find = found
    errors._is_core = lambda: True
    print(json.dumps(trial.tried(said)))
