"""What a new version follows: the newest one of its stream, and what its base has to be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckdiff.checkpoints.opening import open_local
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.form import (
    MOST_VERSION,
    OVERWRITE,
    TOO_LARGE_TO_OVERWRITE,
    version_name,
)
from ckdiff.deltas.versions.reading import Version, WeightStream, check_complete
from ckdiff.errors import CheckpointError, DeltaError, OutputError, UsageError, printable

_SHOWN = 3  # names in a message
_WAYS = "publish a full version: --full, or --full-when-needed"


@dataclass(frozen=True, slots=True)
class Expected:
    """What some version says of a tensor of the base."""

    checksum: str
    digest: str
    version: int


@dataclass(slots=True)
class Following:
    """The place of a new version in its stream."""

    number: int
    base_version: int  #: the newest one there is, or 0
    expected: dict[str, Expected] = field(default_factory=dict)  #: what is known of the base
    #: the full version that the base was made from: what is not expected yet is in its files
    full: Version | None = None


def follow(path: str, number: int | None, base: TensorTable | None, room: Room) -> Following:
    """Where a new version of the stream at ``path`` belongs, and what ``base`` has to be there.

    ``number`` is the one asked for. Without a base, for a full version, nothing is expected of it.
    Raises DeltaError for a stream that is incomplete or damaged, UsageError and BudgetError.
    """
    if number is not None and not 1 <= number <= MOST_VERSION:
        raise UsageError(f"a version is a number from 1 to {MOST_VERSION}, not {number}")
    if not os.path.lexists(path):
        return Following(number or 1, 0)
    with WeightStream(path, room, writing=True) as stream:
        newest = stream.newest
        if number is not None and number <= newest:
            taken = f"{version_name(number)} exists" if number in stream.numbers else "it is older"
            raise OutputError(
                f"version {number} cannot be made in {printable(path)}: {taken}",
                hint=f"its newest is {version_name(newest)}; leave out the number",
            )
        for there in stream.numbers:
            check_complete(stream.where(there))
        found = Following(newest + 1 if number is None else number, newest)
        if base is not None:
            found.full = _expect(stream, base, found.expected)
        return found


def _expect(
    stream: WeightStream, base: TensorTable, expected: dict[str, Expected]
) -> Version | None:
    """Collect the newest digest of each tensor, back to a full version, which is given, or to what
    is left.
    """
    number = stream.newest
    known = set(base.names)
    while number in stream.numbers:
        version = stream.version(number)
        if version.said is None:
            _check_like(version.path, base)
            return version
        version.open(stream.room)
        for name, frame in version.frames.items():
            if name not in known:
                raise other_base(f"it lacks {called(name)}, which {version.shown} has")
            if name not in expected:
                expected[name] = Expected(version.said.checksum, frame.digest, number)
        version.close()
        number = version.said.base_version
    return None


def _check_like(path: str, base: TensorTable) -> None:
    """Raise DeltaError unless a full version has the base's tensors."""
    with open_local(path) as full:
        differing = set(_facts(full.table)) ^ set(_facts(base))
    if differing:
        name = min(differing)[0]
        raise other_base(f"{called(name)} is not as {printable(path)} has it")


def _facts(table: TensorTable) -> list[tuple[str, str, tuple[int, ...]]]:
    return list(zip(table.names, table.dtypes, table.shapes, strict=True))


def other_base(why: str) -> DeltaError:
    """The error for a base that is not what the stream has come to."""
    return DeltaError(
        f"the base is not the newest version of the stream: {why}",
        hint="give the checkpoint that the newest version leads to, or publish a full version",
    )


def unsayable(base: TensorTable, tuned: TensorTable, encoding: str) -> str | None:
    """Why a delta cannot say how ``tuned`` differs from ``base``; None where it can."""
    kinds = dict(zip(base.names, zip(base.dtypes, base.shapes, strict=True), strict=True))
    others = dict(zip(tuned.names, zip(tuned.dtypes, tuned.shapes, strict=True), strict=True))
    paired = [name for name in tuned.names if name in kinds]
    found: dict[str, list[str]] = {
        "added": [name for name in tuned.names if name not in kinds],
        "removed": [name for name in base.names if name not in others],
        "reshaped": [name for name in paired if kinds[name][1] != others[name][1]],
        "retyped": [name for name in paired if kinds[name][0] != others[name][0]],
    }
    if encoding == OVERWRITE:
        sizes = zip(tuned.names, tuned.nbytes.tolist(), strict=True)
        found["too large for 32-bit positions"] = [
            name for name, nbytes in sizes if nbytes >= TOO_LARGE_TO_OVERWRITE
        ]
    said = [f"{_several(names)} {what}" for what, names in found.items() if names]
    return "; ".join(said) if said else None


def not_sayable(why: str) -> DeltaError:
    """The error for what a delta cannot say."""
    return DeltaError(f"a weight version cannot say this: {why}", hint=_WAYS)


def check_whole(table: TensorTable, label: str) -> None:
    """Raise CheckpointError where tensors are named that are not there, or cannot be read."""
    if table.absent:
        raise CheckpointError(
            f"{printable(label)}: not all of its tensors can be read: "
            f"{_several(table.absent)} missing, or of a kind that ckdiff does not read",
            hint="fetch or save the checkpoint again",
        )


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(map(called, names[:_SHOWN]))
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
