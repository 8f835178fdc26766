"""Which files a path means: one file, the shards an index names, or all of a directory."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass

import xxhash

from ckdiff.checkpoints.formats.strictjson import any_value, key_at, shown, skip_blank, string_map
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_SUFFIX
#: bytes of the longest index that is read: what a header may have
INDEX_LIMIT = 100_000_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT_SUFFIXES = (*_PICKLED, ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
#: what people write who mean a repository of the hub, by its name or the address of its page
_ON_THE_HUB = re.compile(r"(?:https?://[^/]+/)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)


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
        raise _no_index(path, error) from None
    return parsed_index(raw, root, path)


def parsed_index(raw: bytes, root: str, path: str) -> Shards:
    """What the bytes of the index at ``path``, which lies in ``root``, name; CheckpointError."""
    try:
        weight_map = _parse_index(raw)
    except ValueError as error:
        raise _no_index(path, error) from None
    files = sorted(set(weight_map.values()), key=natural_key)
    problems = [f"{shown(file)} {why}" for file in files if (why := file_name_fault(file))]
    if problems:
        raise CheckpointError(
            f"{path}: names files that are not inside its directory: {_some(problems)}",
            hint="shards must be given by names relative to the index",
        )
    if not files:
        raise CheckpointError(f"{path}: names no tensors", hint="fetch the index again")
    return Shards(root, files, path, weight_map, digest(raw))


def _no_index(path: str, error: ValueError) -> CheckpointError:
    return CheckpointError(f"{path}: {error}", hint="the index must map tensor names to file names")


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


def _parse_index(raw: bytes) -> dict[str, str]:
    """The ``weight_map`` of an index; ValueError for whatever is ambiguous or not JSON."""
    pos = skip_blank(raw, 0)
    if raw[pos : pos + 1] != b"{":
        raise ValueError("does not begin with '{'")
    pos = skip_blank(raw, pos + 1)
    seen: set[str] = set()
    weight_map: dict[str, str] | None = None
    mark = b"," if raw[pos : pos + 1] != b"}" else b"}"
    if mark == b"}":
        pos += 1
    while mark == b",":
        key, pos = key_at(raw, pos)
        if key in seen:
            raise ValueError(f"duplicate key {shown(key)}")
        seen.add(key)
        try:
            if key == "weight_map":
                weight_map, pos = string_map(raw, pos)
            else:
                _, pos = any_value(raw, pos, whole_numbers=False)
        except ValueError as error:
            raise ValueError(f"{shown(key)}: {error}") from None
        pos = skip_blank(raw, pos)
        mark = raw[pos : pos + 1]
        if mark not in (b",", b"}"):
            raise ValueError(f"',' or '}}' expected at byte {pos}")
        pos += 1
    if skip_blank(raw, pos) != len(raw):
        raise ValueError(f"goes on after its closing '}}' at byte {pos}")
    if weight_map is None:
        raise ValueError("has no weight_map")
    return weight_map


def file_name_fault(name: str) -> str | None:
    """Why a shard's file name must not be opened or made, or None. It is untrusted input."""
    if "\0" in name:
        return "has a NUL in it"
    if name.startswith("/"):
        return "is an absolute path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leaves its directory or is empty in parts"
    return None


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
