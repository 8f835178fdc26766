"""A file of JSON lines, one for each look; what is there stays, whoever is killed when."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from ckdiff.errors import OutputError, UsageError, printable
from ckdiff.outputs.place import write_errors

_OURS = {"kind": "ckdiff update"}  #: what each line begins with
_MARK = json.dumps(_OURS)[:-1].encode()
_BACK = 1 << 16  # bytes that are looked through at a time for the end of the last whole line


def leads() -> bool:
    """Whether this process is the one of all that writes: the first, as far as torch says."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return True
    return bool(distributed.get_rank() == 0)


class UpdateLog:
    """Appends lines to a file. Each is written at once, so that others may read it meanwhile."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UsageError for what is no path, and OutputError where there is a file that is not
        such a log, or none can be made.

        A last line that a killed process has not finished is cut off.
        """
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise UsageError(f"a log is the path of a file, not {printable(repr(text))[:60]}")
        self._path = Path(text)
        with write_errors(self._path):
            fd = self._open()
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    self._prepare(fd)
            finally:
                os.close(fd)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. Raises OutputError."""
        data = (json.dumps(_OURS | line, allow_nan=False) + "\n").encode()
        with write_errors(self._path):
            fd = self._open()
            try:
                while data:  # in one piece, unless the disk is full
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._path, flags, 0o666)

    def _prepare(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, len(_MARK), 0) != _MARK:
            raise OutputError(
                f"{printable(str(self._path))} exists and is not a log of updates",
                hint="choose another name",
            )
        end = size
        while end:
            begin = max(0, end - _BACK)
            newline = os.pread(fd, end - begin, begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            os.ftruncate(fd, end)
