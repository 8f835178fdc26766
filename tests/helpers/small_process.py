"""Processes that are copied for tests: whoever runs tests has imported so much that a copy of it
takes longer than what runs there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import IO, Any


def started(
    script: str, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[Any]:
    """A helper's file as a program that answers on its stdout what it is asked on its stdin; it
    finds what tests find, or what the ``environment`` says.
    """
    found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | (found if environment is None else environment), **how,
    )  # fmt: skip


def asked(file: int | IO[bytes]) -> None:
    """In place of fsync: what a killed process has written is there without waiting for the disk.
    That it is asked, and what happens where that fails, is tested elsewhere.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())  # it must be open
