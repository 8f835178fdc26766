"""The pictures of a report as files for papers and slides: SVG and PDF, and what each one is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ckdiff.figures.figure import Figure
from ckdiff.options import checked_output
from ckdiff.outputs.place import Place, write_errors

LIST = "figures.json"
FORMAT = "ckdiff-figures"
_LONGEST = 1 << 20  #: bytes of a list that is read


def pictures_place(directory: str | os.PathLike[str]) -> Place:
    """Where they go: a directory that is not there, is empty, or holds what an earlier run wrote.

    Raises OutputError where something else is in the way.
    """
    place = Place(checked_output(directory), directory=True, overwrite=True, in_the_way=_in_the_way)
    place.check()
    return place


def write_pictures(figures: Iterable[Figure], place: Place) -> list[Path]:
    """Write NAME.svg and NAME.pdf of each, and the list. Raises OutputError, UsageError."""
    names = []
    listed = {}
    with place:
        for figure in figures:
            for suffix, data in ((".svg", figure.svg().encode()), (".pdf", figure.pdf())):
                names.append(figure.name + suffix)
                with write_errors(place.out):
                    (place.path / names[-1]).write_bytes(data)
            listed[figure.name] = {"title": figure.title, "says": figure.says}
        text = json.dumps({"format": FORMAT, "files": names, "figures": listed}, indent=2)
        with write_errors(place.out):
            (place.path / LIST).write_text(text + "\n", "utf-8")
        place.commit()
    return [place.out / name for name in names]


def _in_the_way(out: Path) -> str | None:
    problem = "holds more than the figures of a ckdiff report"
    try:
        with open(os.open(out / LIST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            said = json.loads(file.read(_LONGEST))
        names = set(said["files"]) if said["format"] == FORMAT else set()
        present = {entry.name for entry in os.scandir(out) if entry.is_file(follow_symlinks=False)}
        every = set(os.listdir(out))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return problem
    return None if every == present and present <= names | {LIST} else problem
