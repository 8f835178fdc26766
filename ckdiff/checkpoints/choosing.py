"""Which files a path means: one file, the shards an index names, or all of a directory."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass

import xxhash

from ckdiff.checkpoints.contents import file_format
from ckdiff.checkpoints.explaining import not_weights
from ckdiff.checkpoints.folders import Choice, Folder, inside, some, where
from ckdiff.checkpoints.indexes import INDEX_LIMIT, file_name_fault, index_of, not_an_index
from ckdiff.checkpoints.nested import PIPELINE, no_checkpoint, pipeline_in, snapshot_in
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.weightnames import index_name, rank_of
from ckdiff.checkpoints.weights import METADATA, indexed_choice, weights_in
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

__all__ = [
    "INDEX_LIMIT",
    "INDEX_NAME",
    "INDEX_SUFFIX",
    "SUFFIX",
    "Choice",
    "Folder",
    "Shards",
    "choice_of",
    "choose",
    "digest",
    "file_name_fault",
    "find_shards",
    "indexed",
    "parsed_index",
    "read_index",
    "shard_name_fault",
]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_SUFFIX
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT_SUFFIXES = (*_PICKLED, ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
#: what people write who mean a repository of the hub, by its name or the address of its page
_ON_THE_HUB = re.compile(r"(?:https?://[^/]+/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)


def choice_of(folder: Folder, path: str = "") -> Choice:
    """The files that are the model: of ``folder`` itself, or of a file or folder ``path`` in it.

    A file or an index means exactly that. Raises CheckpointError where nothing is the model, where
    it cannot be said which of several is, and where a part of it is missing.
    """
    path = posixpath.normpath(path) if path else ""
    if path in ("", "."):
        return _of_directory(folder, "")
    parent, name = posixpath.split(path)
    names = folder.names(parent)
    if f"{name}/" in names:
        return _of_directory(folder, path)
    if name in names:
        return _of_file(folder, parent, name)
    raise CheckpointError(
        f"{where(folder, path)}: does not exist; there lie "
        f"{some(sorted(names, key=natural_key)) or 'no files'}",
        hint="check the path",
    )


def _of_file(folder: Folder, parent: str, name: str) -> Choice:
    """What a file that is given means: itself, or what it is the index of."""
    path = inside(parent, name)
    if index_name(name) is not None:
        return indexed_choice(folder, parent, name)
    if name in (PIPELINE, METADATA):
        return _of_directory(folder, parent)
    if (rank := rank_of(name)) is not None and rank[1] > 1:
        raise CheckpointError(
            f"{where(folder, path)}: is what one of {rank[1]:,} ranks has of a model",
            hint="give the directory that has the files of all ranks",
        )
    refused = not_weights(folder, path)
    if refused is not None:
        raise refused
    return Choice(file_format(folder, path), parent, (name,))


def _of_directory(folder: Folder, sub: str) -> Choice:
    names = sorted(folder.names(sub), key=natural_key)  # the order of a listing means nothing
    snapshot = snapshot_in(folder, sub, names)
    if snapshot is not None:
        sub, names = snapshot, sorted(folder.names(snapshot), key=natural_key)
    choice = pipeline_in(folder, sub, names) or weights_in(folder, sub, names)
    if choice is None:
        raise no_checkpoint(folder, sub, names)
    return choice


@dataclass(slots=True)
class Shards:
    """The files of a checkpoint before any is opened."""

    root: str  #: the directory that ``names`` are relative to
    names: list[str]  #: in natural order
    index: str | None = None  #: the path of the index, if there is one
    weight_map: dict[str, str] | None = None  #: tensor name -> file name, if there is an index
    index_digest: bytes = b""  #: of the bytes that the map was read from


def find_shards(path: str) -> Shards:
    """What ``path`` means. Raises CheckpointError; opens nothing but an index."""
    if not os.path.lexists(path):
        hub = _ON_THE_HUB.fullmatch(path)
        raise CheckpointError(
            f"{path or repr(path)}: does not exist",
            hint="give a safetensors file or a directory of them"
            + (f"; for a model of the hub write hf://{hub[1]}" if hub else ""),
        )
    if not os.path.isdir(path):
        root, name = os.path.split(os.path.abspath(path))
        if name.endswith(INDEX_SUFFIX):
            return indexed(root, name)
        return Shards(root, [name])
    try:
        names = sorted((n for n in os.listdir(path) if not n.startswith(".")), key=natural_key)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from None
    root = os.path.abspath(path)
    index, shards = choose(path, names)
    return Shards(root, shards) if index is None else indexed(root, index)


def choose(path: str, names: list[str]) -> tuple[str | None, list[str]]:
    """(the index, no shards) or (None, the shards) of a directory that holds ``names``.

    ``path`` is how messages name the directory. Raises CheckpointError where it is no checkpoint.
    """
    if INDEX_NAME in names:
        return INDEX_NAME, []
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointError(
            f"{path}: holds {len(indexes)} indexes and none is {INDEX_NAME}: {_some(indexes)}",
            hint="give the path of the index that is meant",
        )
    if indexes:
        return indexes[0], []
    shards = [name for name in names if name.endswith(SUFFIX)]
    if not shards:
        raise _nothing_here(path, names)
    return None, shards


def indexed(root: str, name: str) -> Shards:
    """What the index ``name`` in ``root`` names. Raises CheckpointError."""
    path = os.path.join(root, name)
    try:
        raw = read_index(path)
    except ValueError as error:
        raise not_an_index(path, error) from None
    return parsed_index(raw, root, path)


def parsed_index(raw: bytes, root: str, path: str) -> Shards:
    """What the bytes of the index at ``path``, which lies in ``root``, name; CheckpointError."""
    index = index_of(raw, path)
    files = sorted(set(index.weight_map.values()), key=natural_key)
    return Shards(root, files, path, index.weight_map, index.digest)


def digest(raw: bytes) -> bytes:
    """What two indexes are told apart by."""
    return bytes(xxhash.xxh3_128_digest(raw))


def read_index(path: str) -> bytes:
    """The bytes of an index; raises CheckpointError, and ValueError for one that is too long."""
    file = OpenFile.open(path)
    try:
        if file.size > INDEX_LIMIT:
            raise ValueError(f"an index of {file.size:,} bytes, more than {INDEX_LIMIT:,}")
        parts: list[bytes] = []
        have = 0
        while have < file.size and (data := os.pread(file.fd, file.size - have, have)):
            parts.append(data)
            have += len(data)
        file.check()
        return b"".join(parts)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        file.close()


def shard_name_fault(name: str) -> str | None:
    """Why no shard of this name must be made, or None: an index can name any file."""
    fault = file_name_fault(name)
    if fault is None and any(part.startswith(".") for part in name.split("/")):
        return "is hidden"
    if fault is None and not name.endswith(SUFFIX):
        return f"is not called {SUFFIX}"
    return fault


def _nothing_here(path: str, names: list[str]) -> CheckpointError:
    if not names:
        return CheckpointError(
            f"{path}: is an empty directory", hint="give a safetensors file or a directory of them"
        )
    others = Counter(os.path.splitext(name)[1] for name in names)
    weights = [f"{others[suffix]} {suffix}" for suffix in _WEIGHT_SUFFIXES if others[suffix]]
    if weights:
        pickles = "ckdiff never unpickles: " if any(others[s] for s in _PICKLED) else ""
        return CheckpointError(
            f"{path}: holds no .safetensors file, only {', '.join(weights)}",
            hint=f"{pickles}save the model as safetensors first",
        )
    return CheckpointError(
        f"{path}: holds no .safetensors file, only {_some(names, 5)}",
        hint="give a safetensors file or a directory of them",
    )


def _some(items: list[str], limit: int = 3) -> str:
    text = ", ".join(items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit:,} more"
