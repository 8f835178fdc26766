"""Tables as comma-separated values, which people open in spreadsheets."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from ckdiff.errors import printable

#: what a spreadsheet takes for the beginning of a formula, also in their full width
_FORMULA = tuple("=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}"
                 "\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def line(values: Sequence[Any]) -> str:
    """One line of CSV. What has no value is an empty field, and lists are written ``12x96``.

    Control characters in texts are escaped, so that a row is always one line; and a text that a
    spreadsheet would take for a formula, such as a tensor's name from a hostile file, gets an
    apostrophe before it, which says that it is text.
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(map(_field, values))
    return out.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        value = "x".join(map(str, value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
