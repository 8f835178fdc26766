"""The checkpoint that a delta was made from, found by what it holds.

A delta says the names and sizes of its base's files, and the hashes of its tensors. Names and sizes
choose among directories; models of one kind have the same, so hashes decide, of the smallest
tensors first. What is found is verified once more while the delta is applied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

from ckdiff.checkpoints.opening import open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.deltas.container import Delta
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.checksums import content_digest
from ckdiff.deltas.versions.encoding import WINDOW
from ckdiff.deltas.versions.form import CONTENT, PACKED, shard_name
from ckdiff.deltas.versions.given import given_versions, kind_of
from ckdiff.deltas.versions.holding import digests
from ckdiff.deltas.versions.reading import Version, WeightStream
from ckdiff.errors import CheckpointError, DeltaError, UsageError, printable
from ckdiff.options import Observer, Options, checked_path
from ckdiff.running.memory import Need, fit_workers

_ENTRIES, _DEPTH = 1 << 17, 8  # of the directory that is looked through
_FIRST = 64 << 20  # bytes of a candidate's smallest tensors that are hashed before the rest


def find_base(
    where: object, deltas: Sequence[str], observer: Observer, workers: int | None,
    memory: str | int | None,
) -> str:  # fmt: skip
    """The path of the checkpoint under the directory ``where`` that a chain begins with.

    The first of ``deltas`` says it, a delta in a file, a packed weight version, or a stream that
    begins with one. The hub's cache is a directory like others; links to directories are not
    followed. Raises DeltaError where there is none, and UsageError for what does not say what it
    was made from.
    """
    if not deltas:
        raise UsageError("there is no delta to apply", hint="give one or more, in order")
    options, delta = Options(workers=workers, memory=memory), deltas[0]
    folder = checked_path("the directory", where)
    if not os.path.isdir(folder):
        raise UsageError(
            f"{printable(folder)} is not a directory to search for the base",
            hint="give one that the base lies in, or leave out --find-base",
        )
    with ExitStack() as stack:
        room = Room(options.memory)
        made = stack.enter_context(Delta(_file_of(delta), room))
        sizes = {str(name): int(size) for name, size in made.manifest["base"]["files"]}
        if not sizes or not made.tensors.based.any():
            raise UsageError(
                f"{printable(delta)} does not say which files it was made from",
                hint="give the base itself",
            )
        seen = 0
        for place in _places(folder, sizes):
            seen += os.path.isdir(place)  # a file in it is tried by itself as well
            with suppress(CheckpointError, OSError), ExitStack() as inside:
                (opened,) = open_all(inside, place)
                need = Need(room.taken, WINDOW + opened.reader_memory(WINDOW))
                tensors = len(opened.table)
                threads = fit_workers(options.workers, tensors, need, options.memory)
                if _holds(made, opened, threads):
                    opened.verify()
                    observer.note(f"the base is {printable(place)}")
                    return place
    looked = f"{seen:,} have files of its names and sizes" if seen else "none has files like its"
    raise DeltaError(
        f"what {printable(delta)} was made from is not under {printable(folder)}: {looked}",
        hint=f"it was made from {_named(sizes)}",
    )


def _named(sizes: Mapping[str, int]) -> str:
    name, size = next(iter(sizes.items()))
    more = f" and {len(sizes) - 1:,} more" if len(sizes) > 1 else ""
    return f"{printable(name[:200])} of {size:,} bytes{more}"


def _file_of(delta: str) -> str:
    """The file of a delta. Raises UsageError for versions that do not say their base."""
    if kind_of(delta) is None:
        return delta
    with given_versions([delta], Room()) as given:
        first: Version
        if isinstance(given, WeightStream):
            first = given.version(given.numbers[0])
        else:
            first = given.versions[0]
    if first.said is None or first.said.encoding != PACKED:
        raise UsageError(
            f"{first.shown} does not say what it was made from",
            hint="only deltas in files and packed versions do: give the base itself",
        )
    return os.path.join(first.path, shard_name(0, 1))


def _places(folder: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Directories, or single files, that have files of the base's names and sizes, in order."""
    left = _ENTRIES
    waiting = [(folder, 0)]
    while waiting:
        here, depth = waiting.pop(0)
        names: list[str] = []
        with suppress(OSError), os.scandir(here) as entries:
            for entry in entries:
                left -= 1
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)
                if not left:
                    raise UsageError(
                        f"{printable(folder)} holds more than {_ENTRIES:,} files",
                        hint="give a directory nearer to the base",
                    )
        if all(_size(os.path.join(here, name)) == size for name, size in sizes.items()):
            yield here
            if len(sizes) == 1:
                yield os.path.join(here, *sizes)
        if depth < _DEPTH:
            waiting += [(os.path.join(here, name), depth + 1) for name in sorted(names)]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def _holds(made: Delta, opened: Checkpoint, workers: int) -> bool:
    """Whether a checkpoint has all that the delta's tensors are made from, as far as hashes of
    whole tensors say.
    """
    there = {name: at for at, name in enumerate(opened.table.names)}
    wanted: dict[int, str] = {}
    for at, name in enumerate(made.blueprint.names):
        if not made.tensors.based[at] or at in made.ranges.odd:
            continue
        found = there.get(name, -1)
        if found < 0 or opened.table.dtypes[found] != made.blueprint.dtypes[at]:
            return False
        if opened.table.shapes[found] != tuple(made.blueprint.shapes[at]):
            return False
        wanted[found] = content_digest(made.tensors.base_hashes[at])
    order = sorted(wanted, key=lambda found: int(opened.table.nbytes[found]))
    few, taken = 0, 0
    while few < len(order) and taken + int(opened.table.nbytes[order[few]]) <= _FIRST:
        taken += int(opened.table.nbytes[order[few]])
        few += 1
    for some in (order[:few], order[few:]):
        held = digests(opened, dict.fromkeys(some, CONTENT), workers)
        if any(held[at] != wanted[at] for at in some):
            return False
    return bool(wanted)
