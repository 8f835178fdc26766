"""What a pickle speaks of, as values that do nothing: no class is looked up, nothing is called.

Texts, numbers, lists, tuples and dicts are Python's own; sets are lists or tuples. Everything else
is one of the classes here. They are equal only to themselves and their ``repr`` is short, as values
of a hostile file are shared a thousand times over, nested a million deep, or contain themselves:
nothing here compares, copies, hashes or prints what is inside of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckdiff.errors import printable


@dataclass(slots=True, eq=False, repr=False)
class Word:
    """A class or function that the pickle names. One object for each name of a pickle."""

    module: str
    qualname: str

    @property
    def name(self) -> str:
        """With its module."""
        return f"{self.module}.{self.qualname}"

    def __repr__(self) -> str:
        return f"<{shown(self.name)}>"


@dataclass(slots=True, eq=False, repr=False)
class Storage:
    """Bytes of the archive: the member ``data/KEY``."""

    key: str
    dtype: str | None  #: torch's name of a dtype; None where the tensors say it
    size: int  #: in elements, of bytes where there is no dtype

    def __repr__(self) -> str:
        return f"<storage {shown(self.key)}>"


@dataclass(slots=True, eq=False, repr=False)
class Tensor:
    """A view of a storage; the numbers are whole, and otherwise as the file has them."""

    storage: Storage
    dtype: str  #: torch's name
    offset: int  #: in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements; as many as dimensions
    marks: tuple[str, ...] = ()  #: ``conj``, ``neg``: what is to be done to the elements yet

    def __repr__(self) -> str:
        return f"<tensor of storage {shown(self.storage.key)}>"


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What some class or function would have made: its name, and what it was to be given."""

    what: Word
    args: tuple[Any, ...] = ()
    kwargs: dict[Any, Any] | None = None
    state: Any = None  #: usually a dict of attributes; with slots a pair of dicts
    items: list[Any] | None = None  #: what was appended, if it is a list of some kind
    pairs: dict[Any, Any] | None = None  #: what was put in, if it is a mapping of some kind
    tensor: bool = False  #: whether it stands for a tensor that is no plain view of a storage

    @property
    def name(self) -> str:
        """Of the class or function, with its module."""
        return self.what.name

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that the state sets, by name."""
        parts = self.state if type(self.state) is tuple else (self.state,)
        found: dict[str, Any] = {}
        for part in parts[:2]:
            if type(part) is dict:
                found |= {name: value for name, value in part.items() if type(name) is str}
        return found

    def field(self, name: str, default: Any = None) -> Any:
        """One attribute that the state sets."""
        parts = self.state if type(self.state) is tuple else (self.state,)
        for part in parts[:2]:
            if type(part) is dict and name in part:
                return part[name]
        return default

    def __repr__(self) -> str:
        return f"<{shown(self.name)} record>"


_SLOTS = ("one", "two", "three", "four")


@dataclass(slots=True, eq=False, repr=False)
class Row:
    """A record of which there are very many: of its attributes those that are looked at, four at
    most, which take no tuple of their own.
    """

    names: tuple[str, ...]
    is_set: bool = False  #: whether the pickle said what they are
    one: Any = None
    two: Any = None
    three: Any = None
    four: Any = None

    def set(self, state: dict[Any, Any]) -> None:
        """Take what the attributes are."""
        for slot, name in zip(_SLOTS, self.names, strict=False):
            setattr(self, slot, state.get(name))
        self.is_set = True

    def field(self, name: str) -> Any:
        """One of the attributes; None where it is not known."""
        return getattr(self, _SLOTS[self.names.index(name)])


@dataclass(slots=True, eq=False, repr=False)
class Odd:
    """A key of a dict that is no text, truth or small number: hashed by identity, never deeply."""

    value: Any

    def __repr__(self) -> str:
        return "<a key>"


def shown(text: str, limit: int = 120) -> str:
    """A text of a file for a message: escaped, and cut after ``limit`` characters."""
    return printable(text if len(text) <= limit else text[:limit] + "...")


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """What is directly inside of a value, each with a word for where.

    Keys of dicts, attributes of records by their names; positions of lists, tuples and arguments.
    What an :class:`Odd` key holds comes under the word of its value.
    """
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is Odd:
                yield "a key", key.value
            yield (key if type(key) is str else _word(key)), inner
    elif type(value) in (list, tuple):
        for place, inner in enumerate(value):
            yield str(place), inner
    elif type(value) is Record:
        yield from children(value.args)
        yield from children(value.kwargs)
        slotted = type(value.state) is tuple and len(value.state) == 2
        for part in value.state if slotted else (value.state,):
            yield from children(part) if type(part) is dict else (("state", part),)
        yield from children(value.items)
        yield from children(value.pairs)


def _word(key: Any) -> str:
    return str(key) if type(key) in (int, bool) else "a key"


def walk(value: Any) -> Iterator[Any]:
    """The value and all that is inside, each object once, however often it is shared.

    Takes no more time and memory than there are objects; what contains itself ends as well.
    """
    seen, waiting = {id(value)}, [value]
    while waiting:
        found = waiting.pop()
        yield found
        for _, inner in children(found):
            if id(inner) not in seen and inner is not None:
                seen.add(id(inner))
                waiting.append(inner)


def as_bytes(value: Any) -> bytes | None:
    """The bytes that a value stands for, as pickles of old protocols write bytes; else None."""
    match value:
        case bytes():
            return value
        case Record(name="_codecs.encode", args=(str(text), "latin1" | "latin-1")):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                return None
        case Record(name="builtins.bytes" | "__builtin__.bytes", args=()):
            return b""
        case Record(name="builtins.bytearray" | "__builtin__.bytearray", args=(inner,)):
            # one step: what hides in others is for nobody
            return inner if type(inner) is bytes else None
    return None
