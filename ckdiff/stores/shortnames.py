"""What to call stores that are shown side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckdiff.errors import printable


def short_names(paths: Sequence[str]) -> list[str]:
    """As many of the last parts of each path as tell different stores apart, without ``.zarr``."""
    parts = [Path(path).absolute().parts for path in paths]
    different = len(set(parts))
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*one[-depth:])) for one in parts]
        if len(set(names)) == different:
            break
    cut = [name.removesuffix(".zarr") for name in names]
    return [printable(name) for name in (cut if len(set(cut)) == different else names)]
