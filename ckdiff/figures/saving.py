"""A picture as a file of its own: SVG, PDF, or its Vega-Lite description with its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ckdiff.errors import UsageError, printable
from ckdiff.options import checked_output
from ckdiff.outputs.place import Place, write_errors
from ckdiff.outputs.writing import write_all


class Drawn(Protocol):
    """What a figure can be made into."""

    def svg(self) -> str: ...
    def pdf(self) -> bytes: ...
    def vega_lite(self) -> dict[str, Any]: ...


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
#: how it is made, and how such files begin: another's drawing is not replaced
KINDS: dict[str, tuple[Callable[[Drawn], bytes], bytes]] = {
    ".svg": (lambda figure: figure.svg().encode(), b'<svg class="marks"'),
    ".pdf": (lambda figure: figure.pdf(), b"%PDF-"),
    ".json": (lambda figure: _description(figure), b'{\n "$schema": "https://vega.github.io/'),
}


def save(figure: Drawn, path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Write it whole, or not at all, in the format that the name ends with.

    Raises UsageError for another ending, OutputError for what is in the way.
    """
    out = checked_output(path)
    found = KINDS.get(out.suffix.lower())
    if found is None:
        raise UsageError(
            f"cannot tell a format from the name {printable(out.name)}",
            hint=f"end it with {', '.join(KINDS)}",
        )
    make, begins = found
    place = Place(out, directory=False, overwrite=overwrite, in_the_way=_policy(begins))
    place.check()
    data = make(figure)
    with place:
        with write_errors(out):
            fd = os.open(place.path, _NEW, 0o666)
            try:
                write_all(fd, data)
            finally:
                os.close(fd)
        place.commit()
    return out


def _description(figure: Drawn) -> bytes:
    return (json.dumps(figure.vega_lite(), indent=1) + "\n").encode()


def _policy(begins: bytes) -> Callable[[Path], str | None]:
    def in_the_way(out: Path) -> str | None:
        try:
            with open(os.open(out, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                head = file.read(len(begins))
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if head in (b"", begins) else "is no picture of ckdiff"

    return in_the_way
