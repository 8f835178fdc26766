"""Whether a directory is a mask store and nothing else, so that it may be replaced as a whole."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ckdiff.errors import RuleError, StoreCorrupt, printable
from ckdiff.outputs.placing import MANIFEST
from ckdiff.rules import Rule
from ckdiff.stores.objects import GROUP, array_path
from ckdiff.stores.schema import FORMAT
from ckdiff.stores.sealed import own_files

_LARGEST = 1 << 16  # bytes of Zarr metadata that are read
_NAMES = re.compile(rf"(manifest|zarr|tensors)\.json|{GROUP}/zarr\.json", re.ASCII)
_MASK = re.compile(rf"{array_path('([^/]+)')}/(zarr\.json|c/[0-9]+)", re.ASCII)


def is_store(path: Path) -> bool:
    """Whether a directory is a mask store, perhaps a damaged one, and not somebody else's data."""
    try:
        own_files(path)
    except StoreCorrupt:
        return _is_damaged_store(path)
    return True


def foreign(path: Path) -> str | None:
    """What a directory is, or holds, that no mask store is or holds; None for a store.

    A sound manifest names every file of its store. Where the manifest itself is damaged, the names
    that every store has do, if the Zarr metadata at the top is a store's.
    """
    try:
        names: frozenset[str] | None = own_files(path)
    except StoreCorrupt:
        if not _is_damaged_store(path):
            return "is not a mask store"
        names = None
    known: set[str] = set()
    if names is not None:
        known = {parent for name in names for parent in _parents(name)}
    for folder, folders, files, fd in os.fwalk(path, follow_symlinks=False):
        for name in (*folders, *files):
            relative = os.path.relpath(os.path.join(folder, name), path)
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                ours = relative in known if names is not None else _may_be_folder(relative)
            else:
                ours = relative in names if names is not None else _may_be_file(relative)
                ours = ours and stat.S_ISREG(mode)
            if not ours:
                return f"holds {printable(relative)}, which is not part of a mask store"
    return None


def _parents(name: str) -> list[str]:
    """``masks/exact/c/0``: masks, masks/exact, masks/exact/c."""
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _may_be_file(name: str) -> bool:
    if _NAMES.fullmatch(name):
        return True
    found = _MASK.fullmatch(name)
    return found is not None and _is_rule(found[1])


def _may_be_folder(name: str) -> bool:
    return name == GROUP or _may_be_file(f"{name}/zarr.json") or _may_be_file(f"{name}/0")


def _is_rule(text: str) -> bool:
    try:
        return str(Rule.parse(text)) == text
    except RuleError:
        return False


def _is_damaged_store(path: Path) -> bool:
    """Whether everything but the manifest says that this is a store."""
    try:
        here = stat.S_ISREG(os.lstat(path / MANIFEST).st_mode)
    except OSError:
        return False
    top, masks = _metadata(path / "zarr.json"), _metadata(path / GROUP / "zarr.json")
    group = {"zarr_format": 3, "node_type": "group"}
    if not (here and masks == group | {"attributes": {}}):
        return False
    attributes = top.pop("attributes", None) if isinstance(top, dict) else None
    if top != group or not isinstance(attributes, dict) or set(attributes) != {"ckdiff"}:
        return False
    said = attributes["ckdiff"]
    return isinstance(said, dict) and said.get("format") == FORMAT


def _metadata(path: Path) -> Any:
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
