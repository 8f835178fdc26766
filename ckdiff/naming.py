"""Names: the order in which people expect them, and things that are known by name.

A registry says of each thing where it is and what help says of it. The thing itself lives in a file
of its own and is imported when it is asked for: the command line lists names and imports nothing.
So it does with names of what is no thing of its own.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, TypeVar, get_args

from ckdiff.errors import UsageError, printable

By = Literal["tensor", "layer", "module", "dtype", "model"]  #: what a table can be grouped by
BY: tuple[By, ...] = get_args(By)
DEVICES = ("cpu", "cuda", "auto")  #: where windows can be compared
_DIGITS = re.compile(r"([0-9]+)")
T = TypeVar("T")


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


class Line(NamedTuple):
    """What is known of a thing before it is imported."""

    place: str  #: ``module:name``
    help: str  #: a phrase for ``--help``


class Registry(Mapping[str, T]):
    """Name -> thing, in the order in which people are told of them."""

    def __init__(self, kind: str, lines: dict[str, Line]) -> None:
        self.kind = kind  #: what each of them is, for messages
        self.lines = lines

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self.lines[name].place.partition(":")
        thing: T = getattr(importlib.import_module(module), attribute)
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self.lines  # Mapping's own would import it

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def check(self, name: str) -> None:
        """Raise UsageError for a name that is not here."""
        if name not in self.lines:
            raise UsageError(
                f"there is no {self.kind} {printable(name)!r}", hint=f"one of {', '.join(self)}"
            )
