"""What weight versions a command was given: a stream, or versions by their directories."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Self

from ckdiff.checkpoints.indexes import SUFFIX
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.form import (
    INDEX_NAME,
    MOST_VERSION,
    PREFIX,
    parse_index,
    version_name,
    version_number,
)
from ckdiff.deltas.versions.reading import Chain, Version, WeightStream, read_version
from ckdiff.errors import CkdiffError, DeltaError, UsageError, printable
from ckdiff.options import checked_int, checked_path

StreamPath = str | os.PathLike[str]
STREAM, VERSION = "a stream of weight versions", "a weight version"
_NAMES = 1 << 16  # names in a directory that are looked at
_LOOKED_AT = 1 << 16  # bytes of an index that are looked at to tell whose it is


def kind_of(path: str) -> str | None:
    """STREAM or VERSION, or None for what is neither. Raises nothing.

    A version is known by its name, or by what its index says; a stream by the names in it, of
    which none is that of weights.
    """
    if not os.path.isdir(path):
        return None
    if version_number(_name(path)) is not None or _says_delta(path):
        return VERSION
    versions = False
    with suppress(OSError), os.scandir(path) as entries:
        for entry in islice(entries, _NAMES):
            if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                return None
            versions = versions or entry.name.startswith(PREFIX)
    return STREAM if versions else None


def as_paths(given: StreamPath | Sequence[StreamPath]) -> list[str]:
    """One path or several, as text. Raises UsageError."""
    listed = [given] if isinstance(given, (str, os.PathLike)) else list(given)
    if not listed:
        raise UsageError("there is no delta to apply", hint="give one or more, in order")
    return [checked_path("a stream or version", item) for item in listed]


def asked_versions(target: int | None, base_version: int | None) -> tuple[int | None, int | None]:
    """The version to go to and the one to begin at, where they are said. Raises UsageError."""
    found = [
        None if value is None else checked_int(name, value)
        for name, value in (("target", target), ("base_version", base_version))
    ]
    for number in found:
        if number is not None and not 0 <= number <= MOST_VERSION:
            raise UsageError(f"a version is a number from 0 to {MOST_VERSION}, not {number}")
    return found[0], found[1]


def given_versions(paths: Sequence[str], room: Room) -> WeightStream | NamedVersions:
    """What some paths hold: one stream, or versions in the order in which they follow each other.

    Raises DeltaError and UsageError.
    """
    kinds = [kind_of(path) for path in paths]
    if VERSION in kinds:
        for path, kind in zip(paths, kinds, strict=True):
            if kind != VERSION:
                raise UsageError(
                    f"{printable(path)} is not a weight version, but others are",
                    hint="give one stream, or versions of it in order",
                )
        return NamedVersions(paths, room)
    if len(paths) > 1:
        raise UsageError(
            f"{printable(paths[1])} is another stream",
            hint="give one stream, or versions of it in order",
        )
    stream = WeightStream(paths[0], room)
    if not stream.numbers:
        raise DeltaError(
            f"{printable(paths[0])} holds no weight versions",
            hint=f"give the directory that holds {version_name(1)} and so on",
        )
    return stream


class NamedVersions:
    """Versions that were named one by one. A context manager that closes what was opened."""

    def __init__(self, paths: Sequence[str], room: Room) -> None:
        self.versions: list[Version] = []
        for path in paths:
            found = read_version(path, room, version_number(_name(path)))
            for other in self.versions:
                if other.number == found.number:
                    raise DeltaError(
                        f"version {found.number} is given twice: {other.shown}, {found.shown}",
                        hint="give each once, in order",
                    )
            self.versions.append(found)

    def chain(self, target: int | None = None, *, base_version: int = 0) -> Chain:
        """How a checkpoint that is at ``base_version`` gets to ``target``, or to the last.

        It begins with the last full version up to there. Raises DeltaError where they do not follow
        each other, or not the checkpoint.
        """
        numbers = [version.number for version in self.versions]
        target = numbers[-1] if target is None else target
        if target == base_version:
            return Chain(None, [], target)
        if target not in numbers:
            raise DeltaError(f"version {target} is not one of those given", hint="give it too")
        seed: Version | None = None
        deltas: list[Version] = []
        at = base_version
        for version in self.versions[: numbers.index(target) + 1]:
            if version.said is None:
                seed, deltas, at = version, [], version.number
            elif version.number > base_version or seed is not None:
                if version.said.base_version != at:
                    raise _not_following(version, at, first=seed is None and not deltas)
                deltas.append(version)
                at = version.number
        if at != target:
            raise DeltaError(
                f"the checkpoint is at version {base_version}, which is newer than {target}",
                hint="give the checkpoint that the stream begins with",
            )
        return Chain(seed, deltas, target)

    def close(self) -> None:
        """Close what was opened; may be called more than once."""
        for version in self.versions:
            version.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _not_following(version: Version, at: int, *, first: bool) -> DeltaError:
    assert version.said is not None
    what = f"the checkpoint is at version {at}" if first else f"version {at} is before it"
    hint = "give them in the order in which they follow each other, and none left out"
    return DeltaError(
        f"{version.shown}: is made from version {version.said.base_version}, and {what}",
        hint=(
            "give the versions in between too, or give the checkpoint's version with --base-version"
        )
        if first
        else hint,
    )


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _says_delta(path: str) -> bool:
    """Whether the index in a directory says that it is of a delta, damaged or not."""
    index = os.path.join(path, INDEX_NAME)
    with suppress(OSError, CkdiffError):
        if not os.path.isfile(index):
            return False
        with open(index, "rb") as file:
            raw = file.read(_LOOKED_AT)
            if b'"delta_encoding"' not in raw and len(raw) == _LOOKED_AT:
                file.seek(-_LOOKED_AT, os.SEEK_END)  # writers may put it last
                return b'"delta_encoding"' in file.read()
        if b'"delta_encoding"' not in raw:
            return False
        return len(raw) == _LOOKED_AT or parse_index(raw, index).said is not None
    return True
