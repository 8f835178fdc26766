"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckdiff.cli.shortening import shorten
from ckdiff.errors import printable
from ckdiff.reports.numbers import counted, extent, percent

__all__ = [
    "LONGEST", "at_commit", "brief_share", "cosine", "counted", "duration", "extent", "name",
    "number", "percent", "rate", "shape", "share", "shorten", "side",
]  # fmt: skip

#: longest name in a table that is not on a terminal: one huge name must not widen 90,000 rows
LONGEST = 200


def at_commit(label: object, commit: object) -> str:
    """A checkpoint, with the commit where it has one: ``hf://org/name (1a2b3c4)``."""
    return printable(str(label)) + (f" ({printable(str(commit)[:7])})" if commit else "")


def rate(count: float, seconds: float) -> str:
    """Bytes a second as disks and links count them: ``17.2 GB/s``. Sizes are in GiB."""
    speed = count / seconds if seconds > 0 else 0.0
    if speed < 1000:
        return f"{speed:.0f} B/s"
    units = ["kB", "MB", "GB", "TB"]
    while (speed := speed / 1000) >= 999.5 and len(units) > 1:
        del units[0]
    return f"{speed:.3g} {units[0]}/s"


def duration(seconds: float) -> str:
    """``0.42 s``, ``12 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float | None) -> str:
    """A measured number with three digits; an absent one is a dash."""
    return "-" if value is None else f"{value:.3g}"


def cosine(value: float | None) -> str:
    """A cosine; close to 1 what matters is how far from it, so ``1-4.2e-06``."""
    if value is None or value == 1:
        return "-" if value is None else "1"
    return f"1-{1 - value:.1e}" if 1 - value < 1e-3 else f"{value:.4f}"


def share(value: float) -> str:
    """A share that is known as a number, as :func:`percent` writes it: ``36.04 %``."""
    return percent(*value.as_integer_ratio())


def brief_share(value: float) -> str:
    """A share in three digits, for a legend: ``36 %``; nothing else than 1 is ``100 %``."""
    text = f"{100 * value:.3g}"
    return share(value) if float(text) == 100 or "e+" in text else f"{text} %"


def shape(dims: Any) -> str:
    """``[4096, 4096]``."""
    return f"[{', '.join(map(str, dims))}]"


def name(text: str) -> str:
    """A tensor's name for a terminal: nothing in it can act on the terminal."""
    if len(text) > 4 * LONGEST:  # of a huge one only the ends are looked at
        text = text[: 2 * LONGEST] + text[-2 * LONGEST :]
    return shorten(printable(text), LONGEST)


def side(detail: Mapping[str, Any], which: str) -> str | None:
    """``BF16 [32000, 64]`` of one side of an unpaired tensor, or None where it has none."""
    if f"{which}_dtype" not in detail:
        return None
    return f"{detail[f'{which}_dtype']} {shape(detail[f'{which}_shape'])}"
