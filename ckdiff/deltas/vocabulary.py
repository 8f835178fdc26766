"""A config with another vocabulary than the rebuilt weights have: loaders believe the config."""

from __future__ import annotations

import json
from typing import Any

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.errors import CheckpointError, printable
from ckdiff.outputs.companions import Companions

_LARGEST = 1 << 20  # bytes of a config that is looked into
_KEY, _CONFIG = "vocab_size", "config.json"


def vocabulary_note(beside: Companions, base: TensorTable, rebuilt: Blueprint) -> str | None:
    """What to say where the config that is copied from ``base`` has the vocabulary of a tensor of
    which ``rebuilt`` has other rows; None where it has not.
    """
    config = next((file for file in beside.files if file.name == _CONFIG), None)
    resized = _resized(base, rebuilt)
    if config is None or not resized:
        return None
    try:
        said = json.loads(config.read(_LARGEST) or b"")
    except (ValueError, RecursionError, CheckpointError):
        return None  # whoever copies it says what is wrong
    for size in _sizes(said):
        for name, before, now in resized:
            if size == before:
                return (
                    f"{_CONFIG} says {_KEY} {size:,}, and {printable(name)} has {now:,} rows now: "
                    "copy the tuned model's config with --config-from"
                )
    return None


def _resized(base: TensorTable, rebuilt: Blueprint) -> list[tuple[str, int, int]]:
    """Tensors with other rows: their names, the rows before, and the rows now."""
    held = dict(zip(base.names, base.shapes, strict=True))
    found = []
    for name, shape in zip(rebuilt.names, rebuilt.shapes, strict=True):
        before = held.get(name, shape)
        if before and shape and before != shape and before[1:] == shape[1:]:
            found.append((name, before[0], shape[0]))
    return found


def _sizes(said: Any) -> list[int]:
    """The vocabularies that a config says, of the model and of its parts."""
    if not isinstance(said, dict):
        return []
    parts = [said, *(part for key, part in said.items() if key.endswith("_config"))]
    sizes = [part.get(_KEY) for part in parts if isinstance(part, dict)]
    return [size for size in sizes if type(size) is int]
