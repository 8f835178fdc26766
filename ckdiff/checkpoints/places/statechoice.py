"""Which of the things in a mapping in memory are the weights, by the rules for torch files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Record, Word
from ckdiff.checkpoints.formats.torchzip import chosen_weights, key_text, named_weights
from ckdiff.checkpoints.places.held import is_array
from ckdiff.checkpoints.places.heldtorch import is_module, torch_of
from ckdiff.checkpoints.places.wrapped import plain_names
from ckdiff.errors import printable

_TENSOR = Word("memory", "tensor")
_DEPTH = 64  # of mappings and lists inside of each other


def state_tensors(state: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """The tensors of a module's state dict by name; what modules keep besides is passed over."""
    return [(k, v) for k, v in state.items() if isinstance(k, str) and _is_tensor(v)]


def chosen_tensors(
    content: Mapping[Any, Any], where: str, key: str | None
) -> tuple[list[tuple[str, Any]], str, list[str]]:
    """The tensors of the weights by name, the path that leads to them, and notes of the choice.

    ``where`` is how messages name the mapping. Raises CheckpointError.
    """
    standing = _Standing()
    path, chosen, notes = chosen_weights(where, standing.of(content, 0), key, trees=True)
    notes += standing.notes
    text = key_text(path, key)
    named = named_weights(chosen, path, where, text, notes)
    return [(name, standing.tensors[id(record)]) for name, record in named], text, notes


def _is_tensor(value: Any) -> bool:
    return torch_of(value) is not None or is_array(value)


class _Standing:
    """The same mappings and lists, with something that stands for each tensor, as the finder of
    weights in files takes them.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, Any] = {}  #: by the identity of what stands for it
        self.notes: list[str] = []  #: of modules whose names are not as they are stored
        self._made: dict[int, tuple[Any, Any]] = {}  # keeps what was made, and what of

    def of(self, value: Any, depth: int) -> Any:
        """What stands for a value; of what contains itself as well."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if depth > _DEPTH:
            return None
        if _is_tensor(value):
            record = Record(_TENSOR, tensor=True)
            self.tensors[id(record)] = value
            self._made[id(value)] = value, record
            return record
        if is_module(value):
            value = self._state(value)
        if isinstance(value, Mapping):
            mapping: dict[Any, Any] = {}
            self._made[id(value)] = value, mapping
            for name, inner in value.items():
                mapping[name] = self.of(inner, depth + 1)
            return mapping
        if isinstance(value, (list, tuple)):
            items: list[Any] = []
            self._made[id(value)] = value, items
            items += [self.of(inner, depth + 1) for inner in value]
            return items
        return value if isinstance(value, (str, int, float, bool, bytes)) else None

    def _state(self, module: Any) -> Mapping[str, Any]:
        """The state dict of a module, without what wrappers put into its names."""
        state: Mapping[str, Any] = module.state_dict()
        names, notes = plain_names(module, list(state), printable(type(module).__name__))
        self.notes += notes
        return dict(zip(names, state.values(), strict=True))
