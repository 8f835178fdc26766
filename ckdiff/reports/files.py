"""Reports of a diff as files: there whole or not at all, and made anew by every run.

What stands in the way is replaced only if an earlier run wrote it, or if nothing is in it: a report
begins with words that nothing else begins with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.result import DiffResult
from ckdiff.errors import OutputError, UsageError, printable
from ckdiff.options import checked_output
from ckdiff.outputs.checks import ELSEWHERE
from ckdiff.outputs.place import Place, Policy, write_errors
from ckdiff.outputs.writing import write_all
from ckdiff.reports import junit, markdown

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
#: the option that asks for each kind of report; how it is made, and how its files begin
_KINDS: dict[str, tuple[Callable[[DiffResult], bytes], bytes]] = {
    "--junit": (junit.junit, junit.BEGINS),
    "--markdown": (markdown.markdown, markdown.BEGINS),
}


class Reports:
    """The reports that were asked for; ``paths`` by option, None where one was not.

    Raises UsageError for two in one place, OutputError where something is in the way.
    """

    def __init__(self, paths: dict[str, str | os.PathLike[str] | None]) -> None:
        self._places: dict[str, Place] = {}
        for option, path in paths.items():
            if path is not None:
                self._add(option, checked_output(path))

    def _add(self, option: str, out: Path) -> None:
        if any(out == place.out for place in self._places.values()):
            raise UsageError(f"two reports cannot both be {printable(str(out))}")
        place = our_file(out, _KINDS[option][1])
        with _hint(option):
            place.check()
        self._places[option] = place

    def keep_away_from(self, sides: Sequence[Checkpoint], store: Path | None) -> None:
        """Raise OutputError where a report would damage a checkpoint, or the store."""
        for option, place in self._places.items():
            with _hint(option):
                place.keep_away_from(sides, [] if store is None else [store])

    def write(self, result: DiffResult) -> None:
        """Write all of them. Raises OutputError."""
        for option, place in self._places.items():
            data = _KINDS[option][0](result)
            with _hint(option):
                write_file(place, data)


def our_file(out: Path, begins: bytes) -> Place:
    """A place for a file that begins so; what is replaced is empty, or begins so too."""
    return Place(out, directory=False, overwrite=True, in_the_way=_policy(begins))


def write_file(place: Place, data: bytes) -> None:
    """Write it whole, or not at all. Raises OutputError."""
    with place:
        with write_errors(place.out):
            fd = os.open(place.path, _NEW, 0o666)
            try:
                write_all(fd, data)
            finally:
                os.close(fd)
        place.commit()


@contextmanager
def _hint(option: str) -> Iterator[None]:
    """What is wrong with a report is mended by its own option."""
    try:
        yield
    except OutputError as error:
        hint = f"choose another place with {option}" if error.hint == ELSEWHERE else error.hint
        raise OutputError(error.message, hint=hint) from None


def _policy(begins: bytes) -> Policy:
    def in_the_way(out: Path) -> str | None:
        try:
            with open(os.open(out, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                head = file.read(len(begins))
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if head in (b"", begins) else "is not a report of ckdiff"

    return in_the_way
