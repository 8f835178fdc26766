"""Indexes: which tensors count, and in which files they are; and what the files then hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from ckdiff.checkpoints.folders import called
from ckdiff.checkpoints.formats.strictjson import any_value, key_at, shown, skip_blank, string_map
from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.checkpoints.weightnames import choices
from ckdiff.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = "model" + INDEX_SUFFIX
#: bytes of the longest index that is read: what a header may have
INDEX_LIMIT = 100_000_000
_CHOICES = 5  # that a message lists


@dataclass(slots=True)
class Index:
    """What an index says."""

    weight_map: dict[str, str]  #: tensor name -> file name, without any ``./``
    metadata: dict[str, Any]  #: its ``metadata``; nothing where that is no object
    digest: bytes  #: of the bytes that it was read from


def index_of(raw: bytes, path: str) -> Index:
    """What the index at ``path`` says; raises CheckpointError for what is ambiguous or no index."""
    try:
        weight_map, metadata = _parsed(raw)
    except ValueError as error:
        raise not_an_index(path, error) from None
    plain: dict[str, str] = {}  # thousands of tensors have few files
    problems = []
    for file in dict.fromkeys(weight_map.values()):
        plain[file] = "/".join(part for part in file.split("/") if part != ".") or file
        if fault := file_name_fault(plain[file]):
            problems.append(f"{shown(file)} {fault}")
    if problems:
        more = f" and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: names files outside its directory: {', '.join(problems[:3])}{more}",
            hint="names of shards must be relative to the index",
        )
    if not weight_map:
        raise CheckpointError(f"{path}: names no tensors", hint="fetch the index again")
    mapped = {name: plain[file] for name, file in weight_map.items()}
    return Index(mapped, metadata, digest(raw))


def index_at(path: str) -> Index:
    """What the index at a local path says. Raises CheckpointError."""
    try:
        raw = read_index(path)
    except ValueError as error:
        raise not_an_index(path, error) from None
    return index_of(raw, path)


def not_an_index(path: str, error: ValueError) -> CheckpointError:
    """The error for a file that is called an index."""
    return CheckpointError(f"{path}: {error}", hint="the index must map tensor names to file names")


def file_name_fault(name: str) -> str | None:
    """Why a shard's file name must not be opened or made, or None. It is untrusted input."""
    if "\0" in name:
        return "has a NUL in it"
    if name.startswith("/"):
        return "is an absolute path"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "leaves its directory or has empty parts"
    return None


def shard_name_fault(name: str) -> str | None:
    """Why no shard of this name must be made, or None: an index can name any file."""
    fault = file_name_fault(name)
    if fault is None and any(part.startswith(".") for part in name.split("/")):
        return "is hidden"
    if fault is None and not name.endswith(SUFFIX):
        return f"is not called {SUFFIX}"
    return fault


def _parsed(raw: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The ``weight_map`` and the ``metadata`` of an index; ValueError for what is ambiguous."""
    pos = skip_blank(raw, 0)
    if raw[pos : pos + 1] != b"{":
        raise ValueError("does not begin with '{'")
    pos = skip_blank(raw, pos + 1)
    seen: set[str] = set()
    found: dict[str, Any] = {}
    mark = b"," if raw[pos : pos + 1] != b"}" else b"}"
    if mark == b"}":
        pos += 1
    while mark == b",":
        key, pos = key_at(raw, pos)
        if key in seen:
            raise ValueError(f"duplicate key {shown(key)}")
        seen.add(key)
        try:
            value, pos = (
                string_map(raw, pos)
                if key == "weight_map"
                else any_value(raw, pos, whole_numbers=False)
            )
        except ValueError as error:
            raise ValueError(f"{shown(key)}: {error}") from None
        if key in ("weight_map", "metadata"):
            found[key] = value
        pos = skip_blank(raw, pos)
        mark = raw[pos : pos + 1]
        if mark not in (b",", b"}"):
            raise ValueError(f"',' or '}}' expected at byte {pos}")
        pos += 1
    if skip_blank(raw, pos) != len(raw):
        raise ValueError(f"goes on after its closing '}}' at byte {pos}")
    if "weight_map" not in found:
        raise ValueError("has no weight_map")
    metadata = found.get("metadata")
    return found["weight_map"], metadata if isinstance(metadata, dict) else {}


def digest(raw: bytes) -> bytes:
    """What two indexes are told apart by."""
    return bytes(xxhash.xxh3_128_digest(raw))


def read_index(path: str) -> bytes:
    """The bytes of an index; raises CheckpointError, and ValueError for one that is too long."""
    file = OpenFile.open(path)
    try:
        if file.size > INDEX_LIMIT:
            raise ValueError(f"an index of {file.size:,} bytes, more than {INDEX_LIMIT:,}")
        raw = file.read(0, file.size)
        file.check()
        return raw
    finally:
        file.close()


@dataclass(slots=True)
class Listed:
    """What of the tensors in the files of an index counts."""

    kept: list[list[bool]]  #: for each file, for each of its tensors
    missing: tuple[str, ...]  #: that the index names and their files lack
    warnings: tuple[str, ...]  #: for people, one line each


def joined_by_index(
    path: str, weight_map: Mapping[str, str], held: Sequence[tuple[str, Sequence[str]]]
) -> Listed:
    """Which tensors of the files an index at ``path`` lists count: those that it names, each from
    the file that it says.

    ``held`` has each file's name, as in ``weight_map``, with the names of its tensors.
    """
    kept: list[list[bool]] = []
    found: set[str] = set()
    left: dict[str, str] = {}  # what the index does not name
    for file, names in held:
        flags = [weight_map.get(name) == file for name in names]
        kept.append(flags)
        found.update(name for name, flag in zip(names, flags, strict=True) if flag)
        left.update((name, file) for name in names if name not in weight_map)
    missing = tuple(name for name in weight_map if name not in found)
    warnings = []
    if left:
        name, file = next(iter(left.items()))
        count = f"{len(left):,} tensor{'s' * (len(left) > 1)}"
        warnings.append(
            f"{path}: left out {count} that the index does not list, "
            f"{_one(left)}{shown(name)} of {called(file)}"
        )
    if missing:
        name = missing[0]
        elsewhere = next((file for file, names in held if name in names), None)
        there = "" if elsewhere is None else f"; it is in {called(elsewhere)}"
        count = f"{len(missing):,} tensor{'s' * (len(missing) > 1)}"
        warnings.append(
            f"{path}: lists {count} that its files lack, "
            f"{_one(missing)}{shown(name)} of {called(weight_map[name])}{there}"
        )
    return Listed(kept, missing, tuple(warnings))


def _one(items: Sequence[str] | Mapping[str, str]) -> str:
    return "such as " if len(items) > 1 else ""


def check_unlisted(path: str, held: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise CheckpointError where files that no index lists are not one model: a name that is in
    two of them. ``held`` is as in ``joined_by_index``, ``path`` how messages name the directory.
    """
    if len(held) == 1:  # nothing is in two of one
        return
    owner: dict[str, str] = {}
    for file, names in held:
        for name in names:
            first = owner.setdefault(name, file)
            if first != file:
                given = choices(file for file, _ in held)
                more = f" and {len(given) - _CHOICES:,} more" if len(given) > _CHOICES else ""
                listed = ", ".join(map(called, given[:_CHOICES])) + more
                raise CheckpointError(
                    f"{path}: is not one model: {shown(name)} is in both {called(first)} and "
                    f"{called(file)}, and no index says which counts",
                    hint=f"give the file that you want: {listed}",
                )
