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
_XML = b"<!-- ckdiff figure -->\n"
_PDF = b"\n% ckdiff figure\n"  # at the end: what is before must stay where it is
_JSON = b'{\n "usermeta": {\n  "made by": "ckdiff"\n },'
#: how it is made
KINDS: dict[str, Callable[[Drawn], bytes]] = {
    ".svg": lambda figure: _XML + figure.svg().encode(),
    ".pdf": lambda figure: figure.pdf() + _PDF,
    ".json": lambda figure: _description(figure),
}


def save(figure: Drawn, path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Write it whole, or not at all, in the format that the name ends with.

    Raises UsageError for another ending, OutputError for what is in the way.
    """
    out = checked_output(path)
    make = KINDS.get(out.suffix.lower())
    if make is None:
        raise UsageError(
            f"cannot tell a format from the name {printable(out.name)}",
            hint=f"end it with {', '.join(KINDS)}",
        )
    place = Place(out, directory=False, overwrite=overwrite, in_the_way=_in_the_way)
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
    marked = {"usermeta": {"made by": "ckdiff"}} | figure.vega_lite()
    return (json.dumps(marked, indent=1) + "\n").encode()


def _in_the_way(out: Path) -> str | None:
    """Another's drawing is not replaced: ours have a mark at one of their ends."""
    try:
        with open(os.open(out, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            head = file.read(len(_JSON))
            file.seek(-min(len(_PDF), os.fstat(file.fileno()).st_size), os.SEEK_END)
            tail = file.read(len(_PDF))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if head.startswith((_XML, _JSON)) or (head.startswith(b"%PDF-") and tail == _PDF):
        return None
    return "is not a picture that ckdiff saved" if head else None
