"""The names of the tensors of what was chosen in a torch file.

What is listed was made from a hostile file: it may be shared, deep, or contain itself. So there are
bounds of how much is looked at, and of names.
"""

from __future__ import annotations

from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, children
from ckdiff.checkpoints.formats.statevalues import (
    CONTAINERS,
    DEPTH,
    Leaves,
    is_state,
    is_tensor,
    label_of,
    leads,
    mapping_of,
    module_of,
)
from ckdiff.checkpoints.formats.statewords import LONGEST_NAME, is_extra, is_known, is_setting

_MOST_NAMES = 1 << 18  # three times as many as any model has
_MOST_LETTERS = 1 << 25  # of all names together


def named_tensors(value: Any, path: tuple[str, ...] | None = None) -> list[tuple[str, Any]]:
    """The tensors of a candidate by name, in order; ValueError where there is no end of them.

    A list of tensors has ``0``, ``1``, ...; a tensor by itself is ``0``. ``path`` is of a candidate
    that was found: what leads to other candidates is then no part of it. None takes all.
    """
    if is_tensor(value):
        return [("0", value)]
    listing = Listing()
    listing.add(value, "", 0, apart=_apart(path))
    return listing.names


def unnamed_tensors(
    chosen: Any, named: list[tuple[str, Any]], path: tuple[str, ...] | None = None
) -> tuple[int, str]:
    """How many tensors are in a candidate besides those that were named, and where one of them is:
    under keys that are no names, or between other things. Settings, and what leads to other
    candidates, are no part of it.
    """
    return loose_tensors(chosen, {id(tensor) for _, tensor in named}, apart=_apart(path))


def loose_tensors(value: Any, seen: set[int], *, apart: bool = False) -> tuple[int, str]:
    """The same of all that is in a value but in what was ``seen``, by identity."""
    if is_tensor(value) or module_of(value) is not None or id(value) in seen:
        return 0, ""
    count, where = 0, ""
    waiting = [(value, "")]
    while waiting:
        inside, above = waiting.pop()  # of the path only the last word: it may be long
        for label, inner in children(inside):
            if is_tensor(inner):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    count, where = count + 1, where or f"{above}.{label}".lstrip(".")
            elif type(inner) not in CONTAINERS or id(inner) in seen or _passed(label, inner):
                continue
            elif not (apart and inside is value and leads(label, inner)):
                seen.add(id(inner))
                waiting.append((inner, label))
    return count, where


def _apart(path: tuple[str, ...] | None) -> bool:
    return path is not None and not any(map(is_known, path))


def _passed(label: str, inner: Any) -> bool:
    """Whether what lies under a key is none of the weights, and nobody takes it for such."""
    if is_extra(label) or is_setting(label) or module_of(inner) is not None:
        return True
    mapping = mapping_of(inner)
    return mapping is not None and is_state(mapping)


class Listing:
    """Names tensors."""

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self.names: list[tuple[str, Any]] = []
        self._most = most
        self._letters = self._visits = 0
        self._leaves = Leaves()

    def add(self, value: Any, prefix: str, depth: int, *, apart: bool = False) -> None:
        """Take the tensors of a mapping, a list or a module; ``apart``: not what leads to others.

        Raises ValueError where they are too many.
        """
        attributes = module_of(value)
        if attributes is not None:
            self._add_module(attributes, prefix, depth)
            return
        if type(value) in (list, tuple):
            self._add_list(value, prefix, depth)
            return
        mapping = mapping_of(value)
        if mapping is None and type(value) is Record:
            mapping = value.fields
        self._visit(len(mapping or {}), depth)
        for key, inner in (mapping or {}).items():
            label = label_of(key)
            if label is None:
                continue
            if is_tensor(inner):
                self._take(prefix + label, inner)
            elif is_extra(label) or is_setting(label) or (apart and leads(key, inner)):
                continue
            elif self._leaves.of(inner, depth) > 0:
                self.add(inner, self._joined(prefix, label), depth + 1)

    def _add_list(self, items: list[Any] | tuple[Any, ...], prefix: str, depth: int) -> None:
        self._visit(len(items), depth)
        for place, inner in enumerate(items):
            if is_tensor(inner):
                self._take(f"{prefix}{place}", inner)

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
            if type(key) is str and module_of(value) is not None:
                self.add(value, self._joined(prefix, key), depth + 1)

    def _visit(self, size: int, depth: int) -> None:
        self._visits += 1 + size
        if self._visits > 4 * _MOST_NAMES or depth > DEPTH:
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
