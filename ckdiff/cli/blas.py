"""How many threads BLAS may start: one where ours share the cores, all where it does the work."""

from __future__ import annotations

import os

_NAME = "OPENBLAS_NUM_THREADS"
_asked = os.environ.get(_NAME)  # by whoever called us


def one_thread() -> None:
    """What most commands want; to be called before numpy is imported."""
    os.environ.setdefault(_NAME, "1")


def all_cores() -> None:
    """What commands want that decompose one matrix at a time; before numpy is imported."""
    if _asked is None:
        os.environ.pop(_NAME, None)
