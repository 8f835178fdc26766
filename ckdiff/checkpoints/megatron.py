"""Checkpoints of Megatron that are not read: those of several ranks, and those of other back ends.

Its ``torch_dist`` is a ``torch.distributed.checkpoint``, and read as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ckdiff.checkpoints.folders import Folder, called, inside, some, where
from ckdiff.errors import CheckpointError

SAVE = "load it with Megatron, and save it with --ckpt-format torch_dist"  #: a hint
FORM = "metadata.json"  #: the file that says how the tensors were saved
_FORM_LIMIT = 1 << 16  # bytes
_RANK = re.compile(r"mp_rank_[0-9]{2,}(?:_[0-9]{3,})*", re.ASCII)
_READ = ("torch_dist", "fsdp_dtensor")  # back ends that write a torch.distributed.checkpoint


def of_ranks(label: str, folders: Sequence[str]) -> CheckpointError | None:
    """The error for folders of which each holds the weights of one rank of several, of tensor or
    pipeline parallelism; None where they are no such folders.
    """
    sets: dict[str, list[str]] = {}  # one for each step
    for name in folders:
        above, _, last = name.rpartition("/")
        if _RANK.fullmatch(last):
            sets.setdefault(above, []).append(name)
    ranks = next((names for names in sets.values() if len(names) > 1), None)
    if ranks is None:
        return None
    return CheckpointError(
        f"{label}: holds a Megatron checkpoint of {len(ranks):,} ranks, each with its part of the "
        f"tensors: {some(ranks)}",
        hint=f"{SAVE}, or make one model of it with Megatron's tools/checkpoint/convert.py",
    )


def of_other_backend(folder: Folder, sub: str) -> CheckpointError | None:
    """The error for a directory with ``FORM`` and without what is read, if Megatron wrote it."""
    try:
        said: Any = json.loads(folder.read(inside(sub, FORM), _FORM_LIMIT))
    except (ValueError, RecursionError):
        return None
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if not isinstance(backend, str):
        return None
    label = where(folder, sub)
    if backend in _READ:
        return CheckpointError(
            f"{label}: is a Megatron checkpoint ({called(backend)}) without .metadata: it was not "
            "saved completely",
            hint="give a checkpoint that was saved completely",
        )
    return CheckpointError(
        f"{label}: is a Megatron checkpoint of the back end {called(backend)}, which ckdiff does "
        "not read",
        hint=SAVE,
    )
