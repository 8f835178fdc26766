"""Every command as ckdiff-core has it, in a process: ckdiff imports only what that package needs.

Kernels are compiled where they are not kept yet, as machine code comes along with packages only.
Prints, as JSON, what is wrong with which command; its argument is a prepared folder.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "package"))  # last: it has a build.py

import trial
from cli_support import run

from ckdiff import errors
from ckdiff.kernels import compiled, kinds

#: what may be imported, by the names of modules
NEEDED = {"ckdiff", "click", "google_crc32c", "numpy", "rich", "xxhash", "zstandard"}
COMPILER = "ckdiff.kernels.codegen", "ckdiff.kernels.numbaview"
FOUND, LISTED = compiled._find, frozenset(kinds.every())
IMPORT, BY_NAME = builtins.__import__, importlib.import_module


def hide(name: str, importer: str) -> None:
    """Raise what Python does for a module that is not there, where ckdiff imports another."""
    ours = importer.startswith("ckdiff.") and not importer.startswith(COMPILER)
    if ours and name.partition(".")[0] not in NEEDED | sys.stdlib_module_names:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def imported(
    name: str, of: Mapping[str, object] | None = None, /, *more: Any, **named: Any
) -> object:
    """What an import statement calls."""
    if named.get("level", more[2] if len(more) > 2 else 0) == 0:
        hide(name, str((of or {}).get("__name__")))
    return IMPORT(name, of, *more, **named)


def import_module(name: str, package: str | None = None) -> ModuleType:
    """What asks for a module by its name."""
    hide(name, str(sys._getframe(1).f_globals.get("__name__")))
    return BY_NAME(name, package)


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
    importlib.import_module = import_module
    compiled._find = found
    errors._is_core = lambda: True
    print(json.dumps(trial.tried(said)))
