"""Things that are known by name: each lives in a file of its own, imported when it is asked for.

The command line lists the names and what help says of them, and imports nothing else for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from ckdiff.errors import UsageError, printable

T = TypeVar("T")


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
