"""Names of a module's tensors without what wrappers such as ``torch.compile`` put into them."""

from __future__ import annotations

from typing import Any

#: what wrappers put into names, wherever they are: no module of a model is called so
_INSERTED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
#: classes that hold a whole model as ``module``; in any other module that is a part by that name
_HOLDERS = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
_DEPTH = 8  # wrappers around each other


def plain_names(module: Any, names: list[str], label: str) -> tuple[list[str], list[str]]:
    """The names of a module's state dict as the model alone would have them, and a note if that
    makes a difference.

    Two names never become one: then all stay as they are. ``label`` is how messages name it.
    """
    held = _holders(module)
    plain = [_plain(name, held) for name in names]
    if plain == names or len(set(plain)) < len(plain):
        return names, []
    parts = [f"{part}." for part in _INSERTED if any(part in name.split(".") for name in names)]
    if held:
        parts.insert(0, "module.")
    return plain, [f"{label}: names are compared without {', '.join(parts)}, as it is a wrapper"]


def _holders(module: Any) -> int:
    """How many of the wrappers around a model have it as ``module``."""
    held = 0
    for _ in range(_DEPTH):
        inner = getattr(module, "_modules", {})
        if "_orig_mod" in inner:
            module = inner["_orig_mod"]
        elif "module" in inner and _HOLDERS & {one.__name__ for one in type(module).__mro__}:
            module, held = inner["module"], held + 1
        else:
            break
    return held


def _plain(name: str, held: int) -> str:
    parts = [part for part in name.split(".") if part not in _INSERTED]
    while held and len(parts) > 1 and parts[0] == "module":
        parts, held = parts[1:], held - 1
    return ".".join(parts)
