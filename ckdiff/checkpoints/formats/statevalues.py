"""What the values of a torch file are, for whoever looks for its weights: mappings, modules, lists
of tensors, what an optimizer keeps.

Keys that are small numbers are names, as the positions of a list are: ``{0: tensor}`` is ``0``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, Tensor, children
from ckdiff.checkpoints.formats.statewords import (
    OPTIMIZER_VALUES,
    is_averaged,
    is_extra,
    is_known,
    is_second,
    is_setting,
)

DEPTH = 32  #: mappings, lists and modules inside of each other that are looked through
CONTAINERS = (dict, list, tuple, Record)
#: what makes an array in a pickle, in numpy 1 and 2
_NUMPY = {
    f"numpy.{core}.{made}"
    for core in ("core", "_core")
    for made in ("multiarray._reconstruct", "numeric._frombuffer")
}


def is_tensor(value: Any) -> bool:
    """Whether a value stands for a tensor, of whatever kind."""
    return type(value) is Tensor or (type(value) is Record and value.tensor)


def is_listed(value: Any) -> bool:
    """Whether a value is a list of tensors; plain values may lie between them."""
    if type(value) not in (list, tuple) or not any(map(is_tensor, value)):
        return False
    return all(type(inner) not in CONTAINERS or is_tensor(inner) for inner in value)


def label_of(key: Any) -> str | None:
    """The name that a key of a mapping is; None where it is none."""
    if type(key) is str:
        return key
    return str(key) if type(key) is int else None


def has_names(value: Any) -> bool:
    """Whether a value has names: a module has, and a mapping with a text among its keys."""
    if module_of(value) is not None:
        return True
    mapping = mapping_of(value)
    return mapping is not None and any(type(key) is str for key in mapping)


def mapping_of(value: Any) -> dict[Any, Any] | None:
    """What a value has by its keys; None where it is no mapping."""
    if type(value) is dict:
        return value
    return value.pairs if type(value) is Record else None


def module_of(value: Any) -> dict[Any, Any] | None:
    """The attributes of a pickled module; None where it is none."""
    state = value.state if type(value) is Record else value
    if type(state) is not dict:
        return None
    if type(state.get("_parameters")) is dict and type(state.get("_modules")) is dict:
        return state
    script = type(value) is Record and value.what.module.startswith("__torch__")
    return state if script else None


def is_state(mapping: dict[Any, Any]) -> bool:
    """Whether a mapping is the state of an optimizer, or of random numbers."""
    if "param_groups" in mapping and "state" in mapping:
        return True
    if "python" in mapping and "numpy" in mapping and "cpu" in mapping:
        return True
    return any(name in mapping for name in OPTIMIZER_VALUES)


def leads(key: Any, inner: Any) -> bool:
    """Whether a key is known to lead to weights, and something is there."""
    if type(key) is not str or not mapping_of(inner):
        return False
    return is_known(key) or is_averaged(key) or is_second(key)


def tensors_in(mapping: dict[Any, Any]) -> Iterator[Any]:
    """The tensors that are right in a mapping, under names."""
    return (inner for key, inner in mapping.items() if is_tensor(inner) and label_of(key))


def numpy_arrays(value: Any) -> list[str]:
    """The names under which a mapping has arrays of numpy, which are no tensors of torch."""
    mapping = mapping_of(value) or {}
    return [
        key
        for key, inner in mapping.items()
        if type(key) is str and type(inner) is Record and inner.name in _NUMPY
    ]


class Leaves:
    """Of which mappings all leaves are tensors; remembers what was asked."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def of(self, value: Any, depth: int) -> int:
        """1 for a mapping by names of which all leaves are tensors, or lists of them, and for such
        a list; 0 for a mapping that has none, else -1.
        """
        known = self._known.get(id(value)) if type(value) in CONTAINERS and depth <= DEPTH else -1
        if known is None:
            self._known[id(value)] = -1  # of what contains itself
            known = self._known[id(value)] = self._look(value, depth)
        return known

    def _look(self, value: Any, depth: int) -> int:
        if type(value) in (list, tuple):
            return 1 if is_listed(value) else -1
        mapping = mapping_of(value)
        if mapping is None or is_state(mapping) or module_of(value) is not None:
            return -1
        return self._inside(mapping, depth)

    def _inside(self, mapping: dict[Any, Any], depth: int) -> int:
        found = 0
        for key, inner in mapping.items():
            label = label_of(key)
            if label is None:
                return -1
            if is_extra(label) and not is_tensor(inner):
                continue
            if not is_tensor(inner):
                kind = -1 if is_setting(label) else self.of(inner, depth + 1)
                if kind < 1:
                    if kind < 0:
                        return -1
                    continue
            found = 1
        return found


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
