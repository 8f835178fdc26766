"""Whether what lies at an output is exported masks: by content, for a name proves nothing.

``--overwrite`` may replace what an export made, of whatever format, and nothing else. So a file
must say that its masks were exported and hold those masks and nothing besides; and a directory must
hold such files, the index that they imply, and nothing besides.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from ckdiff.checkpoints.indexes import INDEX_NAME, index_at
from ckdiff.errors import CkdiffError, printable
from ckdiff.masks.exporting.indices import Indices


def foreign(out: Path) -> str | None:
    """What is at an output that an export must not replace, or None; see Policy.

    OSError passes through.
    """
    if not out.is_dir():
        return "is not a file of exported masks" if exported(out) is None else None
    weight_map, folders = dict[str, str](), set[str]()
    for name in _files(out):
        names = None if name == INDEX_NAME else exported(out / name)
        if names is not None:
            if not weight_map.keys().isdisjoint(names):
                return f"holds {printable(name)}, which has masks that another file has too"
            weight_map |= dict.fromkeys(names, name)
            folders.update(map(str, Path(name).parents))
        elif name != INDEX_NAME:
            return f"holds {printable(name)}, which is not a file of exported masks"
    for root, inside, _ in os.walk(out):
        for folder in inside:
            name = os.path.relpath(os.path.join(root, folder), out)
            if name not in folders:
                return f"holds {printable(name)}, a directory that no export made"
    if not os.path.lexists(out / INDEX_NAME):
        return f"holds no {INDEX_NAME}, which every export of shards has"
    if not _implied(out, weight_map):
        return f"holds {INDEX_NAME}, which is not the index of the masks in it"
    return None


def exported(path: Path) -> list[str] | None:
    """The names of what is in a file that an export made, or None where it is another file.

    A link is never one. OSError passes through.
    """
    from ckdiff.masks.importing.opening import open_mask_file

    if not stat.S_ISREG(os.lstat(path).st_mode):
        return None
    with ExitStack() as stack:
        try:
            masks = open_mask_file(os.fspath(path), stack)
        except CkdiffError:
            return None
        itself = [file.path for file in masks.files] == [os.path.abspath(path)]  # and no index
        names = {item.name for item in masks.items}
        whole = names == masks.tensors.keys() and not masks.notes.others
        if not itself or not masks.notes.ours or not whole:
            return None
        suffix = Indices.suffix if masks.notes.encoding == Indices.encoding else ""
        return [item.name + suffix for item in masks.items]


def _files(out: Path) -> Iterator[str]:
    """What is in a directory besides directories, by its path in there."""
    for root, folders, names in os.walk(out):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *links]):
            yield os.path.relpath(os.path.join(root, name), out)


def _implied(out: Path, weight_map: dict[str, str]) -> bool:
    """Whether the index says where the exported masks are, and nothing else."""
    if not stat.S_ISREG(os.lstat(out / INDEX_NAME).st_mode):
        return False
    try:
        return index_at(os.path.join(out, INDEX_NAME)).weight_map == weight_map
    except CkdiffError:
        return False
