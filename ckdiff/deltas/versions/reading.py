"""A stream of weight versions as it lies on the disk: which there are, and what each holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from ckdiff.checkpoints.indexes import SUFFIX, read_index
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.parts import called
from ckdiff.deltas.room import Room, index_cost
from ckdiff.deltas.versions.form import (
    INDEX_NAME,
    PREFIX,
    Index,
    parse_index,
    shard_numbers,
    version_name,
    version_number,
)
from ckdiff.deltas.versions.version import AGAIN, listed
from ckdiff.deltas.versions.version import Frame as Frame  # also for those who import it here
from ckdiff.deltas.versions.version import Version as Version
from ckdiff.errors import CheckpointError, DeltaError, printable
from ckdiff.outputs.ownership import SUFFIX as PARTIAL


def _strange(name: str, every: bool) -> bool:
    """Whether a name that is no version's is one that somebody may take for a version's: with
    another number of digits; with ``every``, whether it is of anything that is not ours.
    """
    if every:
        return name.startswith(PREFIX) and not name.endswith(PARTIAL)
    return name.startswith(PREFIX) and name.removeprefix(PREFIX).isdigit()


@dataclass(frozen=True, slots=True)
class Chain:
    """What leads to a version: a full version or none, and deltas, the oldest first."""

    seed: Version | None  #: None where it begins with the local checkpoint
    deltas: list[Version]
    target: int  #: the version that it leads to


class WeightStream:
    """The versions in a directory. A context manager that closes what was opened of them.

    As engines do, it passes over what lies beside them, such as what another writer is making
    under a name of its own; ``writing`` does not, as nothing is to be published into another's
    directory.
    """

    def __init__(self, path: str, room: Room, *, writing: bool = False) -> None:
        self.path, self.room = path, room
        self._found: dict[int, Version] = {}
        names = listed(path)
        numbers = (version_number(name) for name in names)
        #: which there are, in order
        self.numbers = sorted(number for number in numbers if number is not None)
        others = [name for name in names if version_number(name) is None]
        foreign = [name for name in others if not name.startswith(PREFIX)]
        if foreign and (writing or not self.numbers):
            raise DeltaError(
                f"{printable(path)} is not a stream of weight versions: it holds "
                f"{called(foreign[0])}",
                hint=f"its directories are called {version_name(1)} and so on",
            )
        strange = [name for name in others if _strange(name, writing or not self.numbers)]
        if strange:
            raise DeltaError(
                f"{printable(path)}: {called(strange[0])} is not the name of a version",
                hint=f"versions are called {version_name(1)} and so on",
            )

    @property
    def newest(self) -> int:
        """The newest version's number; 0 in an empty stream."""
        return self.numbers[-1] if self.numbers else 0

    def __iter__(self) -> Iterator[Version]:
        return (self.version(number) for number in self.numbers)

    def where(self, number: int) -> str:
        """The directory of a version."""
        return os.path.join(self.path, version_name(number))

    def version(self, number: int) -> Version:
        """A version by its number, its index read. Raises DeltaError, also where it is missing."""
        if number not in self._found:
            if number not in self.numbers:
                raise DeltaError(
                    f"{printable(self.path)} has no {version_name(number)}",
                    hint=f"it has {self._range()}",
                )
            self._found[number] = self._read(number)
        return self._found[number]

    def chain(self, target: int | None = None, *, base_version: int = 0) -> Chain:
        """How a checkpoint that is at ``base_version`` gets to ``target``, or to the newest.

        It begins with the newest full version up to there, unless the checkpoint is further.
        Raises DeltaError for links that are missing, or lead elsewhere.
        """
        target = self.newest if target is None else target
        if target == base_version:
            return Chain(None, [], target)
        if target < base_version:
            raise DeltaError(
                f"the checkpoint is at version {base_version}, which is newer than {target}",
                hint="give the checkpoint that the stream begins with",
            )
        deltas: list[Version] = []
        number = target
        while number != base_version:
            if number < base_version:
                raise DeltaError(
                    f"{deltas[-1].shown}: is made from version {number}, and the checkpoint is at "
                    f"version {base_version}, which does not lead to it",
                    hint="give the checkpoint that the stream begins with",
                )
            if number not in self.numbers:
                raise self._missing(number, deltas)
            found = self.version(number)
            if found.said is None:
                return Chain(found, deltas[::-1], target)
            deltas.append(found)
            number = found.said.base_version
        return Chain(None, deltas[::-1], target)

    def close(self) -> None:
        """Close what was opened; may be called more than once."""
        for version in self._found.values():
            version.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, number: int) -> Version:
        return read_version(self.where(number), self.room, number)

    def _missing(self, number: int, deltas: list[Version]) -> DeltaError:
        if not deltas:
            return DeltaError(
                f"{printable(self.path)} has no {version_name(number)}",
                hint=f"it has {self._range()}",
            )
        name = "the checkpoint that the stream begins with" if not number else version_name(number)
        return DeltaError(
            f"{deltas[-1].shown}: is made from {name}, which is missing",
            hint="fetch it, or begin with a full version",
        )

    def _range(self) -> str:
        if not self.numbers:
            return "none"
        return f"{version_name(self.numbers[0])} to {version_name(self.newest)}"


def read_version(path: str, room: Room, number: int | None = None) -> Version:
    """The version in a directory, its index read. ``number`` is the one that its name says.

    Raises DeltaError, also for a full version of which nothing says which it is, and BudgetError.
    """
    index = os.path.join(path, INDEX_NAME)
    check_complete(path)
    found = Index({}, None)
    if os.path.lexists(index):
        try:
            raw = read_index(index)
        except (CheckpointError, ValueError) as error:
            text = error.message if isinstance(error, CheckpointError) else f"{index}: {error}"
            raise DeltaError(printable(text), hint=AGAIN) from None
        room.take(index_cost(raw), printable(index))
        found = parse_index(raw, index)
    if found.said is None:
        if number is None:
            raise DeltaError(
                f"{printable(path)} does not say which version it is",
                hint=f"versions are called {version_name(1)} and so on",
            )
        return Version(number, path, None, {})
    if number not in (None, found.said.version):
        raise DeltaError(
            f"{printable(index)}: says that it is version {found.said.version}", hint=AGAIN
        )
    return Version(found.said.version, path, found.said, dict(found.weight_map))


def open_stream(path: str | os.PathLike[str], room: Room | None = None) -> WeightStream:
    """The versions in a directory, by their names; what they hold is read when it is asked for.

    Raises DeltaError, and later BudgetError where tables do not fit into ``room``.
    """
    return WeightStream(os.fspath(path), Room() if room is None else room)


def opened(stack: ExitStack, room: Room, chain: Chain, table: TensorTable) -> None:
    """Open a chain's deltas and check all that their headers say against the base's ``table``."""
    for version in chain.deltas:
        stack.callback(version.close)
        version.open(room)
        version.check(table)


def check_complete(path: str) -> None:
    """Raise DeltaError for a version that is not there to its end, as far as names tell.

    The index comes last. Only a full version in one file, or in files of other names than a
    delta's, can do without.
    """
    if os.path.lexists(os.path.join(path, INDEX_NAME)):
        return
    names = [name for name in listed(path) if name.endswith(SUFFIX)]
    if not names or any(shard_numbers(name) is not None for name in names):
        raise DeltaError(
            f"{printable(path)} is incomplete: it has no {INDEX_NAME}",
            hint="let whoever writes it finish, or remove it",
        )
