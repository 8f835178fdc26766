"""How checkpoints are called: by enough of their paths to tell them apart, and no more.

A store records it, so it depends on nothing but the last parts of the paths: not on the machine,
the current directory or how the path was spelled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ckdiff.checkpoints.protocol import Checkpoint

_MOST = 6  #: parts of a path
_STEP = r"(?:checkpoint|ckpt|(?:global_?)?steps?|iter|epoch|update|round|save|rank|v)?[-_=]?\d+"
#: parts of paths that many runs have: a step of a run, the file or the folder of a model
_USUAL = re.compile(
    rf"{_STEP}(?:[-_.]{_STEP})*(?:\.\w+)*"
    r"|(?:diffusion_pytorch_|pytorch_|tf_|adapter_)?(?:model|consolidated|weights|checkpoint)"
    r"(?:[-_.]?\d+(?:-of-\d+)?)?(?:\.\w+)*"
    r"|actor|best|checkpoints|ckpts?|critic|current|dcp|export|final|fsdp|hf|huggingface|last|latest"
    r"|merged|models|out|outputs?|policy|results?|save|saved|snapshots?|transformer|unet",
    re.ASCII | re.I,
)


def labels(base: Checkpoint, tuned: Checkpoint) -> tuple[str, str]:
    """What to call two checkpoints: the last part of the path of each; and those before it while
    it is a name like ``checkpoint-500``, which others have, or while both are called the same.
    """
    parts = _parts(base), _parts(tuned)
    least = [_telling(names) for names in parts]
    tried = []
    for taken in range(1, _MOST + 1):
        counts = [max(count, taken) for count in least]
        tried.append(["/".join(names[-n:]) for names, n in zip(parts, counts, strict=True)])
        if tried[-1][0] != tried[-1][1]:
            return tried[-1][0], tried[-1][1]
    return tried[0][0], tried[0][1]  # one and the same, or nothing near tells them apart


def labels_of(sides: Sequence[Checkpoint]) -> list[str]:
    """What to call the checkpoints of a run: as two are called, by more where others are so too."""
    parts = [tuple(_parts(side)) for side in sides]
    counts = [_telling(list(names)) for names in parts]
    while True:
        called = ["/".join(names[-n:]) for names, n in zip(parts, counts, strict=True)]
        meant: dict[str, set[tuple[str, ...]]] = {}
        for name, names in zip(called, parts, strict=True):
            meant.setdefault(name, set()).add(names)
        longer = [
            i
            for i, name in enumerate(called)
            if len(meant[name]) > 1 and counts[i] < min(len(parts[i]), _MOST)
        ]
        if not longer:
            return called
        for i in longer:
            counts[i] += 1


def _telling(parts: list[str]) -> int:
    """How many parts from the end it takes until one is a name of its own."""
    for count in range(1, min(len(parts), _MOST) + 1):
        if not _USUAL.fullmatch(parts[-count]):
            return count
    return 1


def _parts(side: Checkpoint) -> list[str]:
    """The parts of a local checkpoint's path; only its label where it has no path."""
    where = side.directory
    if where is None and len(side.open_files) == 1:
        where = side.open_files[0].path
    if where is None:
        return [side.label]
    path = os.path.abspath(where)
    if side.label == side.index_name:
        path = os.path.join(path, side.label)
    parts = [part for part in path.split(os.sep) if part]
    if parts[-1:] != [side.label]:
        return [side.label]
    for i in range(len(parts) - 1, 0, -1):  # a store holds only what is text
        if not _is_text(parts[i - 1]):
            return parts[i:]
    return parts


def _is_text(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return False
    return True
