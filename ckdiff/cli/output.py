"""Writing to stdout and stderr, when their readers may be gone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from ckdiff.errors import printable

_WARNING = "warning: "  #: what a note begins with that is more than a note
_quiet = [False]
_TOGETHER = 1000  #: lines that are written at once


def write(text: str) -> None:
    """Data, to stdout. A reader that went away (``| head -1``) is no error; a full disk is."""
    with _whole_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def write_lines(lines: Iterable[str]) -> None:
    """Lines of text, to stdout; on a terminal none breaks inside a word or a number."""
    if sys.stdout.isatty() or os.environ.get("FORCE_COLOR"):
        from ckdiff.cli.terminal import Terminal

        lines = Terminal().wrapped(lines)
    write_rows(lines)


def write_rows(lines: Iterable[str]) -> None:
    """Lines that programs read, such as CSV, to stdout: as they are. There may be many."""
    some: list[str] = []
    for line in lines:
        some.append(f"{line}\n")
        if len(some) == _TOGETHER:
            write("".join(some))
            some.clear()
    write("".join(some))


def write_json(data: Any) -> None:
    """One JSON document, to stdout; numbers that JSON has no word for become null.

    Everything outside ASCII is escaped, so that names are exact and no terminal acts on them.
    """
    indent = 2 if sys.stdout.isatty() else None
    write(_json(data, indent) + "\n")


def write_json_rows(head: dict[str, Any], rows: Iterable[Any]) -> None:
    """``head`` with one more key, ``rows``, written one by one: there may be many large ones."""
    indent = 2 if sys.stdout.isatty() else None
    gap = "\n" if indent else ""
    text = _json(head, indent).rstrip().removesuffix("}").rstrip()
    write(f'{text}, {gap}"rows": [')
    for i, row in enumerate(rows):
        write(f"{', ' if i else ''}{gap}{_json(row, indent)}")
    write(f"{gap}]{gap}}}\n")


def _json(data: Any, indent: int | None) -> str:
    import json

    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def say(message: str, *, prefix: str = "ckdiff: ", escape: bool = True) -> None:
    """One line on stderr; whether anyone reads it must not decide how a run ends."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{prefix}{printable(message) if escape else message}\n")
        sys.stderr.flush()


def set_quiet(quiet: bool) -> None:
    """Whether remarks are left out from now on."""
    _quiet[:] = [quiet]


def remark(message: str) -> None:
    """A note or a hint, on stderr: nothing of it where quiet was asked for but warnings."""
    if not _quiet[0] or message.startswith(_WARNING):
        say(message)


def flush() -> None:
    """Flush stdout now, where a failure can still be reported, and not at interpreter exit."""
    with _whole_stdout():
        sys.stdout.flush()


@contextlib.contextmanager
def _whole_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # let whatever is still buffered, and all that follows, go nowhere
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


class _ClosedStdout(io.TextIOBase):
    """A stdout that the caller closed: nothing was printed, and the exit status must say so."""

    def __init__(self, placeholder: TextIO) -> None:
        self._placeholder = placeholder  # holds the descriptor

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed, nothing can be printed", "standard output")


def reopen_missing_streams() -> None:
    """Make the standard streams safe to write to.

    A descriptor that the caller closed (``>&-``) would be given to the next file that is opened;
    and a locale without our characters must not end a run. Printing to a closed stdout is an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w" if number else "r")  # noqa: SIM115
            setattr(sys, name, _ClosedStdout(stream) if number == 1 else stream)
        elif number == 1 and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None  # false for nan too
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
