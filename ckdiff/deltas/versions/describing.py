"""What the versions of a stream are, and how much each changes."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckdiff.checkpoints.opening import open_in
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.form import version_name, version_text
from ckdiff.deltas.versions.given import given_versions
from ckdiff.deltas.versions.places import PLACES_MEMORY, count_places
from ckdiff.deltas.versions.reading import Version, WeightStream, check_complete
from ckdiff.errors import DeltaError
from ckdiff.options import Observer
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import Stopped


@dataclass(slots=True)
class Description:
    """Of a stream, or of one version of it."""

    rows: list[dict[str, Any]]  #: see ``describe``
    notes: list[str]


def describe(path: str, room: Room, observer: Observer) -> Description:
    """Say of each version ``version``, ``base_version``, ``full``, ``encoding``, ``tensors``,
    ``changed_bytes`` (of a full one all of its tensors'), ``bytes`` of its files, and ``share``:
    these as a part of the model's tensors, None while no full version says how large that is.

    The frames of ``xor`` are decoded for it, on threads and in bounded memory; digests are not
    checked. A newest version that is not complete is left out with a note. Raises DeltaError,
    CheckpointError, BudgetError and Interrupted.
    """
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    model: int | None = None
    stream = given_versions([path], room)
    with stream, interruptible():
        for version in _complete(stream, notes) if isinstance(stream, WeightStream) else (
            stream.versions
        ):  # fmt: skip
            row = _full(version) if version.full else _delta(version, room, observer)
            if version.full:
                model = int(row["changed_bytes"])
            row["share"] = row["bytes"] / model if model else None
            rows.append(row)
    return Description(rows, notes)


def _complete(stream: WeightStream, notes: list[str]) -> list[Version]:
    numbers = list(stream.numbers)
    try:
        check_complete(stream.where(stream.newest))
    except DeltaError as error:
        notes.append(f"{version_name(numbers.pop())} is ignored: {error.message}")
    return [stream.version(number) for number in numbers]


def _row(version: Version, tensors: int, changed: int) -> dict[str, Any]:
    said = version.said
    return {
        "version": version_text(version.number),
        "base_version": None if said is None else version_text(said.base_version),
        "full": said is None,
        "encoding": None if said is None else said.encoding,
        "tensors": tensors,
        "changed_bytes": changed,
        "bytes": sum(e.stat().st_size for e in Path(version.path).iterdir() if e.is_file()),
    }


def _full(version: Version) -> dict[str, Any]:
    with ExitStack() as stack:
        table = open_in(stack, os.fspath(version.path)).table
        return _row(version, len(table), int(table.nbytes.sum()))


def _delta(version: Version, room: Room, observer: Observer) -> dict[str, Any]:
    taken = room.taken
    version.open(room)
    try:
        return _row(version, len(version.frames), changed_bytes(version, observer))
    finally:
        version.close()
        room.give(room.taken - taken)


def changed_bytes(version: Version, observer: Observer) -> int:
    """How many bytes an open delta changes, on threads. Raises DeltaError and BudgetError."""
    tensors = list(version.frames)
    counts: list[int] = []
    meter = Meter(observer, sum(frame.size for frame in version.frames.values()))
    workers = fit_workers(None, len(tensors), Need(0, PLACES_MEMORY), None, option=False)

    def count(chunk: int, stop: threading.Event) -> int:
        if stop.is_set():
            raise Stopped
        return count_places(version, tensors[chunk])

    def finished(chunk: int, found: int) -> None:
        counts.append(found)
        meter.add(version.frames[tensors[chunk]].size)

    run_chunks(range(len(tensors)), count, workers=workers, done=finished, meter=meter)
    version.verify()
    return sum(counts)
