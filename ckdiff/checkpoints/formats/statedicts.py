"""Which of the things in a torch file are the weights.

A candidate is a mapping of texts to tensors; what else lies beside the tensors is let pass. A
mapping of which all leaves are tensors, ``{"encoder": {"w": ...}, "decoder": {...}}``, is one
candidate, its names joined by dots, unless one of its keys is a word that is known to lead to
weights, such as ``state_dict``, or it only holds state dicts beside each other: ``{"generator":
{"w": ...}, "discriminator": {"w": ...}}`` is two models. A module that was pickled whole is a
candidate too, with the names that its ``state_dict()`` would have. Nothing under the keys of
optimizers, schedulers or settings is one, and nothing that looks like the state of an optimizer or
of random numbers. Where no candidate looks like weights, what does under such keys is found too, so
that it can be named.

What is looked through was made from a hostile file: it may be shared, deep, or contain itself. So
each object is looked at once for each depth, up to a depth, and names have bounds of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, Tensor, children
from ckdiff.checkpoints.formats.statewords import (
    KNOWN,
    LONGEST_NAME,
    OPTIMIZER_VALUES,
    is_averaged,
    is_extra,
    is_known,
    is_second,
    is_setting,
    is_stepping,
)

_DEPTH = 32  # mappings, lists and modules inside of each other that are looked through
_MOST_NAMES = 1 << 18  # three times as many as any model has
_MOST_LETTERS = 1 << 25  # of all names together
_MOST_CANDIDATES = 1 << 10
_ENOUGH = 1 << 10  # names that say whether they are those of weights
_MOST_LOOKED_AT = 32  # mappings whose names are looked at for whether they are those of weights
#: what makes an array in a pickle, in numpy 1 and 2
_NUMPY = {
    f"numpy.{core}.{made}"
    for core in ("core", "_core")
    for made in ("multiarray._reconstruct", "numeric._frombuffer")
}
_CONTAINERS = (dict, list, tuple, Record)


@dataclass(slots=True)
class Found:
    """What a file has: candidates by the path that leads to them, and what was passed over."""

    candidates: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)  #: paths of optimizers and the like; a few
    #: if no candidate looks like weights: what does, under keys that are passed over
    aside: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)


def is_tensor(value: Any) -> bool:
    """Whether a value stands for a tensor, of whatever kind."""
    return type(value) is Tensor or (type(value) is Record and value.tensor)


def find(content: Any, *, trees: bool = False) -> Found:
    """All candidates of a file, in the order of the file.

    ``trees``: mappings inside of each other may be one model, as in JAX.
    """
    finder = _Finder(trees=trees)
    finder.look(content, ())
    found = finder.found
    first = found.candidates[:_MOST_LOOKED_AT]
    if found.passed and not any(_looks_like_weights(*one) for one in first):
        everywhere = _Finder(everywhere=True)
        everywhere.look(content, ())
        known = {path for path, _ in found.candidates}
        more = [one for one in everywhere.found.candidates if one[0] not in known]
        found.aside = [one for one in more[:_MOST_LOOKED_AT] if _looks_like_weights(*one)]
    return found


def _looks_like_weights(path: tuple[str, ...], value: Any) -> bool:
    """Whether what lies under a key that is passed over has the names of a model's tensors."""
    if any(map(is_stepping, path)) and not any(map(is_known, path)):
        return False
    listing = _Listing(_ENOUGH)
    with suppress(ValueError):  # the first names say enough, also of those without an end
        listing.add(value, "", 0)
    names = [name.split(".") for name, _ in listing.names]
    if any(not OPTIMIZER_VALUES.isdisjoint(parts) for parts in names):
        return False
    return sum(len(parts) > 1 for parts in names) > 1


def rank(path: tuple[str, ...]) -> tuple[int, int, int]:
    """Which candidates go first: the lowest. Equal ones cannot be told apart by their keys.

    Known words in their order, then all others, then what a trainer keeps, and averages of weights
    last.
    """
    known = [KNOWN.index(part.lower()) for part in path if is_known(part)]
    if any(map(is_averaged, path)):
        return 3, min(known, default=0), len(path)
    if any(map(is_second, path)):
        return 2, min(known, default=len(KNOWN)), len(path)
    return (0, known[0], len(path)) if known else (1, 0, 0)


def named_tensors(value: Any, path: tuple[str, ...] | None = None) -> list[tuple[str, Any]]:
    """The tensors of a candidate by name, in order; ValueError where there is no end of them.

    A list of tensors has ``0``, ``1``, ...; a tensor by itself is ``0``. ``path`` is of a candidate
    that was found: what leads to other candidates is then no part of it. None takes all.
    """
    if is_tensor(value):
        return [("0", value)]
    if type(value) in (list, tuple):
        value = {str(i): inner for i, inner in enumerate(value) if is_tensor(inner)}
    listing = _Listing()
    apart = path is not None and not any(map(is_known, path))
    listing.add(value, "", 0, apart=apart)
    return listing.names


def numpy_arrays(value: Any) -> list[str]:
    """The names under which a mapping has arrays of numpy, which are no tensors of torch."""
    mapping = _mapping(value) or {}
    return [
        key
        for key, inner in mapping.items()
        if type(key) is str and type(inner) is Record and inner.name in _NUMPY
    ]


def at_key(content: Any, key: str) -> list[Any]:
    """What lies at a path of keys, positions and attributes, joined by dots; keys may have dots.

    ``.`` is the whole. Usually one value or none, more where keys with dots make it ambiguous.
    """
    if key == ".":
        return [content]
    found: list[Any] = []
    waiting, seen = [(content, 0)], set[tuple[int, int]]()
    while waiting:
        value, at = waiting.pop()
        if (id(value), at) in seen or len(seen) > 1 << 8:
            continue
        seen.add((id(value), at))
        for label, inner in children(value):
            if key.startswith(label, at) and label:
                end = at + len(label)
                if end == len(key):
                    if not any(inner is other for other in found):
                        found.append(inner)
                elif key[end] == ".":
                    waiting.append((inner, end + 1))
    return found


def _mapping(value: Any) -> dict[Any, Any] | None:
    if type(value) is dict:
        return value
    return value.pairs if type(value) is Record else None


def _module(value: Any) -> dict[Any, Any] | None:
    """The attributes of a pickled module; None where it is none."""
    state = value.state if type(value) is Record else value
    if type(state) is not dict:
        return None
    if type(state.get("_parameters")) is dict and type(state.get("_modules")) is dict:
        return state
    script = type(value) is Record and value.what.module.startswith("__torch__")
    return state if script else None


def _is_state(mapping: dict[Any, Any]) -> bool:
    """Whether a mapping is the state of an optimizer, or of random numbers."""
    if "param_groups" in mapping and "state" in mapping:
        return True
    if "python" in mapping and "numpy" in mapping and "cpu" in mapping:
        return True
    return any(name in mapping for name in OPTIMIZER_VALUES)


def _leads(key: Any, inner: Any) -> bool:
    """Whether a key is known to lead to weights, and something is there."""
    if type(key) is not str or not _mapping(inner):
        return False
    return is_known(key) or is_averaged(key) or is_second(key)


def _leading(mapping: dict[Any, Any]) -> bool:
    """Whether a key of a mapping leads to weights, or its only key to a mapping that has such."""
    for _ in range(_DEPTH):
        if any(_leads(key, inner) for key, inner in mapping.items()):
            return True
        inner = _mapping(next(iter(mapping.values()))) if len(mapping) == 1 else None
        if inner is None:
            return False
        mapping = inner
    return False


def _several(mapping: dict[Any, Any], *, trees: bool) -> bool:
    """Whether a mapping of which all leaves are tensors, or its only entry, has nothing but state
    dicts, two or more: mappings of names with dots, or of names to tensors. Numbers are layers,
    and no models. In ``trees``, as JAX has them, names without dots are those of parts.
    """
    for _ in range(_DEPTH):
        parts = {key: _mapping(inner) for key, inner in mapping.items() if not is_extra(key)}
        if len(parts) != 1:
            break
        (only,) = parts.values()
        mapping = only or {}
    return len(parts) > 1 and not all(map(str.isdecimal, parts)) and all(
        part
        and (any("." in key for key in part) or not (trees or any(map(_mapping, part.values()))))
        for part in parts.values()
    )  # fmt: skip


class _Finder:
    """Looks for candidates; ``everywhere``: also under the keys that are passed over."""

    def __init__(self, *, everywhere: bool = False, trees: bool = False) -> None:
        self.found = Found()
        self._everywhere, self._trees = everywhere, trees
        self._seen: dict[int, int] = {}  # object -> the least depth at which it was looked at
        self._taken: set[int] = set()  # objects that are candidates
        self._leaves: dict[int, int] = {}

    def look(self, value: Any, path: tuple[str, ...]) -> None:
        """Look at a value and at what is inside."""
        if type(value) not in _CONTAINERS or is_tensor(value):
            return
        if self._seen.get(id(value), _DEPTH) <= len(path):
            if id(value) in self._taken:  # of two names of one thing the better one counts
                self._take(value, path)
            return
        self._seen[id(value)] = len(path)
        joined = False
        if (mapping := _mapping(value)) is not None or _module(value) is not None:
            if mapping is not None and _is_state(mapping):
                self._pass(path)
                return
            if self._whole(value, mapping, path):
                return
            joined = id(value) in self._taken
        for label, inner in children(value):
            if type(inner) not in _CONTAINERS or is_extra(
                label
            ):  # tensors are looked for elsewhere
                continue
            setting = is_setting(label)
            if setting and not (self._everywhere and len(label) <= LONGEST_NAME):
                if type(inner) is Record or inner:
                    self._pass((*path, label))
            elif setting or not (
                joined and not _leads(label, inner) and self.leaves(inner, len(path)) >= 0
            ):
                self.look(inner, (*path, label))

    def _pass(self, path: tuple[str, ...]) -> None:
        if len(self.found.passed) < 8:
            self.found.passed.append(".".join(path))

    def _take(self, value: Any, path: tuple[str, ...]) -> None:
        self._taken.add(id(value))
        if len(self.found.candidates) < _MOST_CANDIDATES:
            self.found.candidates.append((path, value))

    def _whole(self, value: Any, mapping: dict[Any, Any] | None, path: tuple[str, ...]) -> bool:
        """Take what is a candidate; whether nothing more is to be looked for inside of it."""
        if mapping is None or _module(value) is not None:
            self._take(value, path)
            return True
        leads = _leading(mapping)
        inside = any(map(is_known, path)) and len(mapping) > 1
        leaves = self.leaves(value, len(path))
        if leaves >= 0 and (inside or not (leads or _several(mapping, trees=self._trees))):
            if leaves:
                self._take(value, path)
            return True
        if any(True for _ in _tensors_in(mapping)):
            self._take(value, path)
        return False

    def leaves(self, value: Any, depth: int) -> int:
        """1 for a mapping of texts of which all leaves are tensors, 0 if it has none, else -1."""
        mapping = _mapping(value)
        if mapping is None or depth > _DEPTH or _is_state(mapping) or _module(value) is not None:
            return -1
        known = self._leaves.get(id(value))
        if known is not None:
            return known
        self._leaves[id(value)] = -1  # of what contains itself
        found = 0
        for key, inner in mapping.items():
            if type(key) is not str:
                return -1
            if is_extra(key) and not is_tensor(inner):
                continue
            kind = (
                1 if is_tensor(inner) else -1 if is_setting(key) else self.leaves(inner, depth + 1)
            )
            if kind < 0:
                return -1
            found |= kind
        self._leaves[id(value)] = found
        return found


def _tensors_in(mapping: dict[Any, Any]) -> Iterator[Any]:
    return (inner for key, inner in mapping.items() if type(key) is str and is_tensor(inner))


class _Listing:
    """Names tensors."""

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self.names: list[tuple[str, Any]] = []
        self._most = most
        self._letters = self._visits = 0
        self._finder = _Finder()

    def add(self, value: Any, prefix: str, depth: int, *, apart: bool = False) -> None:
        """Take the tensors of a mapping or a module; ``apart``: not what leads to others."""
        attributes = _module(value)
        if attributes is not None:
            self._add_module(attributes, prefix, depth)
            return
        mapping = _mapping(value)
        if mapping is None and type(value) is Record:
            mapping = value.fields
        self._visit(len(mapping or {}), depth)
        for key, inner in (mapping or {}).items():
            if type(key) is not str:
                continue
            if is_tensor(inner):
                self._take(prefix + key, inner)
            elif is_extra(key) or is_setting(key) or (apart and _leads(key, inner)):
                continue
            elif self._finder.leaves(inner, depth) > 0:
                self.add(inner, self._joined(prefix, key), depth + 1)

    def _add_module(self, attributes: dict[Any, Any], prefix: str, depth: int) -> None:
        passing = set[str]()
        parts: list[dict[Any, Any]] = [attributes]
        inner: dict[Any, Any] = attributes
        if "_parameters" in attributes:  # else TorchScript: attributes are what they are
            parts = [attributes["_parameters"]]
            inner = attributes["_modules"]
            if type(buffers := attributes.get("_buffers")) is dict:
                parts.append(buffers)
            names = attributes.get("_non_persistent_buffers_set")
            if isinstance(names, list | tuple):
                self._visit(len(names), depth)
                passing = {name for name in names if type(name) is str}
        self._visit(len(inner) + sum(map(len, parts)), depth)
        for part in parts:
            for key, value in part.items():
                if (
                    type(key) is str
                    and is_tensor(value)
                    and not (key in passing and part is not parts[0])
                ):
                    self._take(prefix + key, value)
        for key, value in inner.items():
            if type(key) is str and _module(value) is not None:
                self.add(value, self._joined(prefix, key), depth + 1)

    def _visit(self, size: int, depth: int) -> None:
        self._visits += 1 + size
        if self._visits > 4 * _MOST_NAMES or depth > _DEPTH:
            raise ValueError("they are nested endlessly")

    def _joined(self, prefix: str, key: str) -> str:
        if len(prefix) + len(key) > LONGEST_NAME:
            raise ValueError("their names are too long")
        return f"{prefix}{key}."

    def _take(self, name: str, tensor: Any) -> None:
        self._letters += len(name)
        if len(name) > LONGEST_NAME or self._letters > _MOST_LETTERS:
            raise ValueError("their names are too long")
        if len(self.names) >= self._most:
            raise ValueError(f"there are more than {self._most:,}")
        self.names.append((name, tensor))
