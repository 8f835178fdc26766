"""Which of the things in a torch file are the weights.

A candidate is a mapping of names to tensors, or a list of tensors, of which the places are names;
where there are candidates with names, others are none. What else lies beside the tensors is let
pass. A mapping of which all leaves are tensors, ``{"encoder": {"w": ...}, "decoder": {...}}``, is
one candidate, its names joined by dots, unless one of its keys is a word that is known to lead to
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

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, children
from ckdiff.checkpoints.formats.statelisting import Listing
from ckdiff.checkpoints.formats.statevalues import (
    CONTAINERS,
    DEPTH,
    Leaves,
    is_listed,
    is_state,
    is_tensor,
    label_of,
    leads,
    mapping_of,
    module_of,
    tensors_in,
)
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

_MOST_CANDIDATES = 1 << 10
_ENOUGH = 1 << 10  # names that say whether they are those of weights
_MOST_LOOKED_AT = 32  # mappings whose names are looked at for whether they are those of weights


@dataclass(slots=True)
class Found:
    """What a file has: candidates by the path that leads to them, and what was passed over."""

    candidates: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)  #: paths of optimizers and the like; a few
    #: if no candidate looks like weights: what does, under keys that are passed over
    aside: list[tuple[tuple[str, ...], Any]] = field(default_factory=list)


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
    listing = Listing(_ENOUGH)
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


class _Groups:
    """Of mappings whether they lead to weights, or hold several models. Each is looked through once
    only, however many others have it inside.
    """

    def __init__(self, *, trees: bool) -> None:
        self._trees = trees
        self._leading: dict[int, bool] = {}
        self._several: dict[int, bool] = {}
        self._models: dict[int, bool] = {}

    def leading(self, mapping: dict[Any, Any], depth: int = 0) -> bool:
        """Whether a key of a mapping leads to weights, or its only key to one that has such."""
        known = self._leading.get(id(mapping))
        if known is None:
            self._leading[id(mapping)] = False  # of what contains itself
            known = any(leads(key, inner) for key, inner in mapping.items())
            if not known and len(mapping) == 1 and depth < DEPTH:
                (only,) = map(mapping_of, mapping.values())
                known = only is not None and self.leading(only, depth + 1)
            self._leading[id(mapping)] = known
        return known

    def several(self, mapping: dict[Any, Any], depth: int = 0) -> bool:
        """Whether a mapping of which all leaves are tensors, or its only entry, has nothing but
        state dicts, two or more: mappings of names with dots, or of names to tensors, or with a key
        that leads to weights. Numbers are layers, and no models; lists of tensors are neither. In
        ``trees``, as JAX has them, names without dots are those of parts.
        """
        known = self._several.get(id(mapping))
        if known is None:
            self._several[id(mapping)] = False
            parts = _parts(mapping)
            if len(parts) == 1 and depth < DEPTH:
                (only,) = parts.values()
                known = bool(only) and self.several(only or {}, depth + 1)
            else:
                known = len(parts) > 1 and not all(map(str.isdecimal, parts))
                known = known and all(part and self._model(part) for part in parts.values())
            self._several[id(mapping)] = known
        return known

    def _model(self, part: dict[Any, Any]) -> bool:
        """Whether one of several mappings beside each other is a model of its own."""
        known = self._models.get(id(part))
        if known is None:
            known = any(type(key) is str and "." in key for key in part)
            if not known and not self._trees:
                known = self.leading(part) or not any(map(mapping_of, part.values()))
            self._models[id(part)] = known
        return known


def _parts(mapping: dict[Any, Any]) -> dict[str, dict[Any, Any] | None]:
    """The mappings in a mapping of which all leaves are tensors, None for a tensor, by name."""
    return {
        label: mapping_of(inner)
        for key, inner in mapping.items()
        if (label := label_of(key)) is not None
        and not (is_extra(label) or type(inner) in (list, tuple))
    }


class _Finder:
    """Looks for candidates; ``everywhere``: also under the keys that are passed over."""

    def __init__(self, *, everywhere: bool = False, trees: bool = False) -> None:
        self.found = Found()
        self._everywhere, self._groups = everywhere, _Groups(trees=trees)
        self._seen: dict[int, int] = {}  # object -> the least depth at which it was looked at
        self._taken: set[int] = set()  # objects that are candidates
        self._leaves = Leaves()

    def look(self, value: Any, path: tuple[str, ...]) -> None:
        """Look at a value and at what is inside."""
        if type(value) not in CONTAINERS or is_tensor(value):
            return
        if self._seen.get(id(value), DEPTH) <= len(path):
            if id(value) in self._taken:  # of two names of one thing the better one counts
                self._take(value, path)
            return
        self._seen[id(value)] = len(path)
        joined = False
        if (mapping := mapping_of(value)) is not None or module_of(value) is not None:
            if mapping is not None and is_state(mapping):
                self._pass(path)
                return
            if self._whole(value, mapping, path):
                return
            joined = id(value) in self._taken
        elif path and is_listed(value):
            self._take(value, path)
            return
        for label, inner in children(value):
            # tensors are looked for elsewhere
            if type(inner) not in CONTAINERS or is_extra(label):
                continue
            setting = is_setting(label)
            if setting and not (self._everywhere and len(label) <= LONGEST_NAME):
                if type(inner) is Record or inner:
                    self._pass((*path, label))
            elif setting or not (
                joined and not leads(label, inner) and self._leaves.of(inner, len(path)) >= 0
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
        if mapping is None or module_of(value) is not None:
            self._take(value, path)
            return True
        leading = self._groups.leading(mapping)
        inside = any(map(is_known, path)) and len(mapping) > 1
        leaves = self._leaves.of(value, len(path))
        if leaves >= 0 and (inside or not (leading or self._groups.several(mapping))):
            if leaves:
                self._take(value, path)
            return True
        if any(True for _ in tensors_in(mapping)):
            self._take(value, path)
        return False
