"""The order of tensor names that people expect: ``layers.2`` before ``layers.10``."""

from __future__ import annotations

import re
import sys

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[str, str]:
    """A sort key that compares runs of ASCII digits as whole numbers, and the rest as text.

    It is a total order: names that differ only in leading zeros are ordered as text. The key is
    text itself, because 100,000 strings sort several times faster than lists of parts.
    """
    parts = _DIGITS.split(name)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        # More digits make a larger number, so their count goes first, as one character. The NUL
        # puts a number before any text, as if names were compared part by part.
        parts[i] = f"\0{chr(min(len(digits), sys.maxunicode))}{digits}"
    return "".join(parts), name
