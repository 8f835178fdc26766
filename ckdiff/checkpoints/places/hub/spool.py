"""Room on the local disk for what is fetched, and which ranges of files are fetched into it."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.errors import BudgetError

_JOINED = 1 << 16  # bytes between two ranges that are rather fetched than asked for twice
_WASTE = 8  # and all of them together are no more than this part of what is wanted
ALIGNED = 64  #: bytes; where each range begins in a spool
PAGE = mmap.PAGESIZE


@dataclass(slots=True)
class Range:
    """Bytes [begin, stop) of a file, and the spans in them: (position, first byte in the file)."""

    file: int
    begin: int
    stop: int
    spans: list[tuple[int, int]] = field(default_factory=list)


def ranges(
    files: IntArray, begins: IntArray, nbytes: IntArray, *, between: bool = True
) -> list[Range]:
    """What to fetch for some spans: neighbours in a file together, each column one value a span.

    Where ``between`` is set, small gaps are fetched as well, the smallest first, as long as all of
    them are few bytes; ``spool_for`` counts them.
    """
    found: list[Range] = []
    for i in np.lexsort((begins, files)).tolist():
        file, begin, size = int(files[i]), int(begins[i]), int(nbytes[i])
        last = found[-1] if found else None
        if last is None or last.file != file or begin > last.stop:
            last = Range(file, begin, begin)
            found.append(last)
        last.stop = max(last.stop, begin + size)
        last.spans.append((i, begin))
    return _with_gaps(found, _gaps_at_most(int(nbytes.sum()))) if between else found


def _with_gaps(apart: list[Range], most: int) -> list[Range]:
    """Ranges with the smallest gaps between them closed, which are ``most`` bytes together."""
    gaps = [
        (later.begin - earlier.stop, i)
        for i, (earlier, later) in enumerate(pairwise(apart), 1)
        if earlier.file == later.file and later.begin - earlier.stop <= _JOINED
    ]
    closed = set[int]()
    for gap, i in sorted(gaps):
        most -= gap
        if most < 0:
            break
        closed.add(i)
    found: list[Range] = []
    for i, one in enumerate(apart):
        if i in closed:
            found[-1].stop = one.stop
            found[-1].spans += one.spans
        else:
            found.append(one)
    return found


def _gaps_at_most(wanted: int) -> int:
    return max(_JOINED, wanted // _WASTE)


def room_for(nbytes: int, spans: int) -> int:
    """Bytes of a spool that a window takes at most: ``nbytes`` of it, in so many spans."""
    return nbytes + _gaps_at_most(nbytes) + ALIGNED * spans if nbytes else 0


def temporary_folder() -> Path:
    """Where spools are. Raises BudgetError where no such place can be written to."""
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        raise BudgetError(
            "there is no directory for temporary files that can be written to", hint="set TMPDIR"
        ) from None


def unnamed_file(size: int) -> mmap.mmap:
    """A file of ``size`` bytes without a name, mapped: its pages are the system's to write out.

    Raises BudgetError.
    """
    folder = temporary_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.ftruncate(file.fileno(), size)
            # now, and not as a SIGBUS when the first byte is written
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise BudgetError(
            f"no room for {format_size(size)} in {folder}: {error.strerror}",
            hint="lower --disk, or set TMPDIR to a disk with more room",
        ) from None
