"""Directories that hold checkpoints in folders: hub caches, pipelines, and what only looks so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ckdiff.checkpoints import deepspeed
from ckdiff.checkpoints.explaining import made_here, nothing_here
from ckdiff.checkpoints.folders import Choice, Folder, called, inside, some, where
from ckdiff.checkpoints.megatron import of_ranks
from ckdiff.checkpoints.weightnames import SAFETENSORS, choices, is_training_state, weight_name
from ckdiff.checkpoints.weights import has_weights, weights_in
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

PIPELINE = "model_index.json"
_PIPELINE_LIMIT, _REF_LIMIT = 1 << 20, 1 << 10  # bytes
_FOLDERS = 200  # that are looked into to say which can be given
_LISTED = 5
_CACHED = re.compile(r"models--.+")
_VERSION = re.compile(r"weight_v\d{6}/")


def snapshot_in(folder: Folder, sub: str, names: Sequence[str]) -> str | None:
    """The folder that a hub cache's ``models--org--name`` means: the snapshot of ``refs/main``, or
    the only one. None where it is no such folder; raises CheckpointError where it has several.
    """
    if "snapshots/" not in names or not ("refs/" in names or "blobs/" in names):
        return None
    at = inside(sub, "snapshots")
    snapshots = [name[:-1] for name in folder.names(at) if name.endswith("/")]
    main = ""
    if "refs/" in names and "main" in folder.names(inside(sub, "refs")):
        try:
            raw = folder.read(inside(sub, "refs/main"), _REF_LIMIT)
        except ValueError:
            raw = b""
        main = raw.decode("utf-8", "replace").strip()
    if main in snapshots:
        return inside(at, main)
    if len(snapshots) == 1:
        return inside(at, snapshots[0])
    if not snapshots:
        raise CheckpointError(
            f"{where(folder, sub)}: is a folder of the hub's cache without any snapshot",
            hint="download the model first",
        )
    listed = sorted(snapshots)
    raise CheckpointError(
        f"{where(folder, sub)}: is a folder of the hub's cache with {len(listed)} snapshots, and "
        f"refs/main names none of them: {some(listed, _LISTED)}",
        hint=f"give one of them, such as {where(folder, inside(at, listed[0]))}",
    )


def pipeline_in(folder: Folder, sub: str, names: Sequence[str]) -> Choice | None:
    """The checkpoint of a pipeline whose components lie in folders. None where it is none."""
    if PIPELINE not in names:
        return None
    said = _components(folder, inside(sub, PIPELINE))
    parts, without = [], []
    for name in sorted(said, key=natural_key):
        if f"{name}/" not in names:
            continue
        at = inside(sub, name)
        there = folder.names(at)
        choice = weights_in(folder, at, there)
        if choice is not None:
            parts.append((f"{name}/", choice))
        elif has_weights(there):
            without.append(name)
    if not parts:
        return None
    notes = [note for _, choice in parts for note in choice.notes]
    absent = [name for name in sorted(said, key=natural_key) if f"{name}/" not in names]
    others = [n for n in sorted(names, key=natural_key) if _is_beside(folder, sub, n, said)]
    label = where(folder, sub)
    if absent:
        notes.append(f"{label}: {PIPELINE} lists {some(absent, _LISTED)}, which is not there")
    if others or without:
        notes.append(f"{label}: skipped {some(choices([*others, *without]), _LISTED)}")
    return Choice("safetensors", sub, (), parts=tuple(parts), notes=tuple(notes))


def _is_beside(folder: Folder, sub: str, name: str, said: Sequence[str]) -> bool:
    """Whether something beside the components holds weights that no component has."""
    if name.startswith("."):
        return False
    if name.endswith("/"):
        return name[:-1] not in said and has_weights(folder.names(inside(sub, name[:-1])))
    return weight_name(name, (SAFETENSORS, ".ckpt")) is not None


def _components(folder: Folder, name: str) -> list[str]:
    """The components of a pipeline that are not null. Raises CheckpointError."""
    try:
        said: Any = json.loads(folder.read(name, _PIPELINE_LIMIT))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(
            f"{where(folder, name)}: is not the JSON of a pipeline",
            hint="give the folder of one component, or fetch the file again",
        )
    return [
        key
        for key, value in said.items()
        if not key.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and any(isinstance(item, str) for item in value)
        and key not in ("", ".", "..")
        and "/" not in key
    ]


def no_checkpoint(folder: Folder, sub: str, names: Sequence[str]) -> CheckpointError:
    """The error for a directory that is no checkpoint: which of its folders are, or what it is."""
    label = where(folder, sub)
    if (made := made_here(names)) is not None:
        return CheckpointError(f"{label}: {made[0]}, not a checkpoint", hint=made[1])
    if any(_VERSION.fullmatch(name) for name in names):
        return CheckpointError(
            f"{label}: is a stream of weight versions, not a checkpoint",
            hint="rebuild a checkpoint with `ckdiff apply BASE STREAM -o OUT`",
        )
    found = [] if deepspeed.files_of(names) else list(_below(folder, sub, names))
    if deepspeed.CONVERTER in names:  # of the same run: what lies below is not all of it
        found = [n for n in found if not deepspeed.has_model(folder.names(inside(sub, n)))]
    if not found:
        return nothing_here(folder, sub, names)
    # trainers put the optimizer's shards into a folder beside those of the model
    found = [name for name in found if not is_training_state(name.rpartition("/")[2])] or found
    parts = of_ranks(label, found)
    if parts is not None:
        return parts
    given = [where(folder, inside(sub, name)) for name in found]
    last = called(given[-1])
    return CheckpointError(
        f"{label}: holds no weights itself, but its "
        f"{'folder does' if len(found) == 1 else f'{len(found):,} folders do'}: "
        f"{some(found, _LISTED)}",
        hint=f"{'give one of them; ' * (len(found) > 1)}did you mean {last}?",
    )


def _below(folder: Folder, sub: str, names: Sequence[str]) -> Iterator[str]:
    """The folders that hold checkpoints, or where none does the folders in those."""
    budget = _FOLDERS
    level = [name[:-1] for name in names if name.endswith("/") and not name.startswith(".")]
    for _ in range(3):
        found, deeper = [], []
        for name in sorted(level, key=natural_key):
            if budget == 0:
                break
            budget -= 1
            try:
                there = folder.names(inside(sub, name))
            except CheckpointError:
                continue  # nobody asked for it
            last = name.rpartition("/")[2]
            if has_weights(there) or PIPELINE in there or _is_cached(last, there):
                found.append(name)
            deeper += [
                inside(name, one[:-1]) for one in there if one.endswith("/") and one[0] != "."
            ]
        if found:
            yield from found
            return
        level = deeper


def _is_cached(name: str, names: Sequence[str]) -> bool:
    return _CACHED.fullmatch(name) is not None and "snapshots/" in names
