"""Which files a delta may write: safetensors files, and an index that their headers imply.

A delta comes from anywhere, and what it names is made on somebody's disk. So the rules are the
same where one is made and where one is opened, and nothing else is asked.
"""

from __future__ import annotations

import os
import re
import unicodedata

from ckdiff.checkpoints.indexes import (
    INDEX_LIMIT,
    file_name_fault,
    index_of,
    shard_name_fault,
)
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.errors import CheckpointError

#: NAME.safetensors.index.json, also with a variant before or behind "index"
_INDEX = re.compile(r"[^./][^/]*\.safetensors\.index(\.[A-Za-z0-9_-]+)?\.json", re.ASCII)
_LONGEST_PART, _LONGEST = 255, 1024  # bytes of a name: what file systems take
#: of an index: bytes of everything besides the names, and of each entry besides its two names
_INDEX_REST, _INDEX_ENTRY = 1 << 20, 64
_ESCAPED = 6  # bytes of JSON that a byte of a name may become


def index_name_fault(name: str) -> str | None:
    """Why a delta may not write an index of this name, or None."""
    fault = _path_fault(name)
    if fault is None and not _INDEX.fullmatch(name):
        return "does not have the name of an index of safetensors files"
    return fault


def names_fault(names: list[str], index: str | None, *, directory: bool) -> str | None:
    """Why the files and the index of a checkpoint may not have these names, or None.

    A checkpoint that is one file is written where the user says, so its name matters to nobody.
    """
    if not directory:
        if len(names) != 1 or index is not None:
            return "more than one file would be one file"
        bad = "/" in names[0] or not _is_text(names[0])
        return "the name of its file is not a file's" if bad or not names[0] else None
    if len(set(names)) != len(names):
        return "two of its files have the same name"
    for name in names:
        if (fault := _path_fault(name) or shard_name_fault(name)) is not None:
            return f"its file {_shown(name)} {fault}"
    taken = {*names, *([] if index is None else [index])}
    for name in names:
        folders = [name[:at] for at, c in enumerate(name) if c == "/"]
        if not taken.isdisjoint(folders):
            return f"its file {_shown(name)} lies in another file"
    if index is not None and (fault := index_name_fault(index)) is not None:
        return f"its index {_shown(index)} {fault}"
    return None


def index_fault(blueprint: Blueprint, *, partial: bool = False) -> str | None:
    """Why the bytes of a blueprint's index are not what its files' headers imply, or None.

    It must be JSON whose ``weight_map`` has every tensor, or with ``partial`` some, with the file
    that it is in, and no other. What else is in it may be anything that is JSON, and not much.
    """
    if blueprint.index is None:
        return None
    raw = blueprint.index[1]
    files = [plan.name for plan in blueprint.files]
    size = [len(os.fsencode(file)) for file in files]
    most = _INDEX_REST + sum(
        _ESCAPED * (len(tensor.encode()) + size[at]) + _INDEX_ENTRY
        for tensor, at in zip(blueprint.names, blueprint.file.tolist(), strict=True)
    )
    if len(raw) > min(most, INDEX_LIMIT):
        return f"its index of {len(raw):,} bytes has more than the tensors' names in it"
    try:
        found = index_of(raw, "its index").weight_map
    except CheckpointError as error:
        return error.message
    owners = dict(zip(blueprint.names, blueprint.file.tolist(), strict=True))
    lacking = found is not None and len(found) < len(owners) and not partial
    if found is None or lacking or not owners.keys() >= found.keys():
        return "its index has other tensors than its files"
    if any(files[owners[tensor]] != file for tensor, file in found.items()):
        return "its index has tensors in other files than they are in"
    return None


def newer_fault(blueprint: Blueprint, fault: str | None, *, ranges: bool) -> str | None:
    """The same of a delta of the newer version, which has ranges or an index that names not all;
    ``fault`` is what is wrong in the older one.
    """
    if fault is not None:
        return index_fault(blueprint, partial=True)
    return None if ranges else "a version that it does not need"


def _path_fault(name: str) -> str | None:
    """Why no file of this name is made of what came from anywhere, whatever the file is."""
    fault = file_name_fault(name)
    if fault is not None:
        return fault
    if not _is_text(name):
        return "is not valid text"
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        return "has a control character in it"
    parts = [os.fsencode(part) for part in name.split("/")]
    if any(part.startswith(b".") for part in parts):
        return "would be hidden"
    if max(map(len, parts)) > _LONGEST_PART or len(os.fsencode(name)) > _LONGEST:
        return "is too long"
    return None


def _is_text(name: str) -> bool:
    """Whether a file can have this name; undecodable bytes are surrogates that stand for them."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _shown(name: str) -> str:
    return repr(name[:120])
