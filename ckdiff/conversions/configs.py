"""A config that says in which dtype a model is to be loaded, told of another one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from ckdiff.outputs.companionfiles import Companion
from ckdiff.outputs.companions import Companions

_LARGEST = 1 << 20  # bytes of a config that is looked into
_KEYS = ("dtype", "torch_dtype")
#: of transformers and torch; a prefix, "torch.", may stand before it
_CALLED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_FLOATS = {*_CALLED.values(), "float64"}


def with_dtype(companions: Companions, dtype: str | None) -> Companions:
    """The same files, but for the values of ``dtype`` and ``torch_dtype`` in ``config.json``.

    Loaders believe the config and not the weights. Nothing else in it is changed, though it is
    written anew; one without such a value is copied as it is. Raises what reading it raises.
    """
    if dtype is None:
        return companions
    files, notes = [], list(companions.notes)
    for file in companions.files:
        changed = _changed(file, _CALLED[dtype]) if _is_config(file.name) else None
        if changed is not None:
            notes.append(f"{file.name} says {_CALLED[dtype]} now")
        files.append(changed or file)
    return replace(companions, files=tuple(files), notes=tuple(notes))


def _is_config(name: str) -> bool:
    return name.rpartition("/")[2] == "config.json"


def _changed(file: Companion, called: str) -> Companion | None:
    """The file with another dtype; None where it says none, that one, or is not understood."""
    raw = file.read(_LARGEST)
    try:
        said = json.loads(raw or b"")
        if not isinstance(said, dict) or not _set(said, called):
            return None
        data = (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()
    except (ValueError, RecursionError):
        return None
    return Companion(file.name, len(data), lambda: iter([data]))


def _set(said: dict[str, Any], called: str) -> bool:
    """Change the values in a config, and in those of its parts; whether any was another."""
    changed = False
    for key, value in said.items():
        if key in _KEYS and isinstance(value, str):
            prefix = "torch." if value.startswith("torch.") else ""
            if value.removeprefix(prefix) in _FLOATS - {called}:
                said[key], changed = prefix + called, True
        elif isinstance(value, dict) and key.endswith("_config") and "quant" not in key:
            changed = _set(value, called) or changed
    return changed
