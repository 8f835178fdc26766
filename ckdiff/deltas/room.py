"""The memory that what is kept of deltas may take, asked for before anything is allocated.

What a delta declares is not believed, and neither is how large its file is: a file can be holes.
Whoever reads a part takes its size out of the room first, and what the objects made of it will
need. The costs are upper bounds, found by counting what no object can do without in the text.
"""

from __future__ import annotations

from ckdiff.budget import (
    MIB,
    cgroup_limit,
    default_memory,
    format_size,
    parse_size,
    resident_anonymous,
)
from ckdiff.deltas.blueprint import MOST_WINDOWS
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.errors import BudgetError
from ckdiff.running.memory import PROCESS

INCLUDED = 68 * MIB  #: tables that are part of ``PROCESS``
#: a worker's streams, windows and what the compressor needs, all of it in use at once
EACH = 56 * MIB
TENSOR, OWN_TENSOR = 330, 200  #: bytes that a rebuilt tensor takes, and one of the file's own

_WINDOW, _GROUP = 100, 180  # bytes that each takes: columns, turns
_DIM, _PAIR = 40, 260  # of a header, bytes that a dimension takes, and a pair of metadata
_NAMED = 160  # bytes that a name of an index takes
_ENTRY = 48  # bytes of a tensor's entry in a header besides its name, at least
_FIELDS = (b'"dtype"', b'"shape"', b'"data_offsets"')
_VALUE, _LIST, _OBJECT, _MEMBER, _ODD = 70, 80, 200, 60, 300  # bytes that JSON becomes
_MEMBERS = 8  # of an object of ours, at most; others are odd


class Room:
    """Bytes of memory that are left. Not for several threads."""

    def __init__(
        self,
        allowed: int | str | None = None,
        *,
        each: int = EACH,
        hint: str = "raise --memory",
    ) -> None:
        allowed = default_memory(1) if allowed is None else parse_size(allowed)
        self._hint = hint
        self._size = max(0, allowed - (PROCESS - INCLUDED) - each)
        self.taken = 0

    def take(self, size: int, shown: str) -> None:
        """Take ``size`` bytes for the delta called ``shown``. Raises BudgetError."""
        if self.taken + size > self._size:
            raise BudgetError(
                f"{shown} declares tables that need {format_size(self.taken + size)} of memory or "
                f"more, and {format_size(self._size)} are left for them",
                hint=self._hint,
            )
        self.taken += size

    def give(self, size: int) -> None:
        """Give back what is no longer needed."""
        self.taken -= size


def available_memory() -> int:
    """Bytes that this process could still have, as far as the system tells."""
    free = 1 << 62
    try:
        with open("/proc/meminfo") as info:
            lines = dict(line.split(":", 1) for line in info)
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, LookupError):
        pass  # not Linux: allocating says so
    limit = cgroup_limit()
    return free if limit is None else min(free, max(0, limit - resident_anonymous()))


def header_cost(raw: bytes, each: int) -> int:
    """What a parsed safetensors header takes, at most, with ``each`` bytes for a tensor.

    In a header that parses each tensor has its three fields, four colons and four commas, but for
    one; all other commas are before a dimension, and other colons in metadata or in fields that
    nobody knows. A tensor that is written otherwise, as a list or with escapes, has more of both.
    """
    tensors = raw.count(b'"data_offsets"')
    surely = _entries(raw)
    dims = max(0, raw.count(b",") - 3 * surely + 1)
    pairs = max(0, raw.count(b":") - 4 * surely)
    text = max(0, len(raw) - _ENTRY * surely) * _width(raw)
    return text + each * tensors + _DIM * dims + _PAIR * pairs


def _entries(raw: bytes) -> int:
    """How many entries with four colons there are at least, in a header that parses.

    What is only called so, a value or a part of a longer key, has a backslash or no colon there.
    """

    def count(text: bytes) -> int:
        return raw.count(text) - raw.count(b"\\" + text)

    objects = count(b'":{') + count(b'": {')
    named = [sum(count(field + end) for end in (b":{", b": {")) for field in _FIELDS]
    return max(0, min(objects - sum(named), *(count(field + b":") for field in _FIELDS)))


def windows_cost(windows: int, nbytes: int) -> int:
    """What so many windows of tensors of ``nbytes`` in all take, at most."""
    groups = min(windows, 2 * nbytes // FRAME_BYTES + windows // MOST_WINDOWS + 1)
    return _WINDOW * windows + _GROUP * groups


def index_cost(raw: bytes) -> int:
    """What the parsed map of an index takes, at most; it has few different values."""
    return len(raw) * _width(raw) + _NAMED * raw.count(b":")


def json_cost(raw: bytes) -> int:
    """What parsed JSON takes, at most, and the text that it is parsed from."""
    objects, lists = raw.count(b"{"), raw.count(b"[")
    values, members = raw.count(b","), raw.count(b":")
    unlike_ours = max(0, members - _MEMBERS * objects)
    return (
        2 * len(raw) * _width(raw)
        + _OBJECT * objects
        + _LIST * lists
        + _VALUE * values
        + _MEMBER * members
        + _ODD * unlike_ours
    )


def _width(raw: bytes) -> int:
    """Bytes that a character of a string may take: one that is not ASCII widens all of them."""
    return 1 if raw.isascii() and b"\\" not in raw else 4
