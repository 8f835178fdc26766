"""Verifying a timeline: every byte, and that what it says agrees with what it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ckdiff.errors import StoreCorrupt, printable
from ckdiff.options import checked_function
from ckdiff.outputs.placing import MANIFEST
from ckdiff.runs.timelines.file import documents, first_width, step_folder
from ckdiff.runs.timelines.former import verify
from ckdiff.runs.timelines.result import Timeline, open_timeline
from ckdiff.stores.metadata import same_document
from ckdiff.stores.objects import INNER, OBJECT, check_absent

Progress = Callable[[int, int], None]
_PIECE = 1 << 22  # elements whose first moves are looked at at a time


def check_timeline(
    path: str | os.PathLike[str] | Timeline, progress: Progress | None = None
) -> dict[str, Any]:
    """Verify every byte of a timeline: each file against its digest, the stores of all steps, and
    the counts and first moves against the masks.

    Returns ``timeline``, ``objects`` (files), ``bytes`` and ``ok``. ``progress`` is called with
    (bytes done, bytes in all). Raises StoreCorrupt and StoreIncomplete.
    """
    timeline = path if isinstance(path, Timeline) else open_timeline(path)
    if progress is not None:
        checked_function("progress", progress)
    _check_files(timeline)
    stores = [timeline.store(step) for step in range(1, len(timeline) + 1)]
    sizes = [sum(size for size, _ in store.objects.values()) for store in stores]
    total = sum(size for size, _ in timeline.manifest["objects"].values()) + sum(sizes)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for key, known in timeline.manifest["objects"].items():
        verify(timeline.path, key, known)
        advance(known[0])
    _check_metadata(timeline)
    for store, size in zip(stores, sizes, strict=True):
        store.check()
        advance(size)
    _check_counts(timeline)
    if timeline.statistics:
        _check_paths(timeline)
    if timeline.manifest["first_moves"]:
        _check_first_moves(timeline)
    files = len(timeline.manifest["objects"]) + sum(len(store.objects) for store in stores) + 1
    return {"timeline": str(timeline.path), "objects": files, "bytes": total, "ok": True}


def _check_files(timeline: Timeline) -> None:
    """Raise StoreCorrupt for a file beside those that the manifests name."""
    known = set(timeline.manifest["objects"]) | {MANIFEST}
    steps = {step_folder(step) for step in range(1, len(timeline) + 1)}  # stores look themselves
    for folder, _, files in os.walk(timeline.path):
        relative = os.path.relpath(folder, timeline.path)
        if any(relative == step or relative.startswith(step + os.sep) for step in steps):
            continue
        for name in files:
            key = os.path.normpath(os.path.join(relative, name))
            if key not in known:
                raise StoreCorrupt(
                    f"{printable(str(timeline.path))} holds a file that its manifest does not "
                    f"know: {printable(key)}",
                    hint="remove it if nobody needs it",
                )


def _check_metadata(timeline: Timeline) -> None:
    """Raise StoreCorrupt where a Zarr reader would be told of another array than ours."""
    manifest = timeline.manifest
    width = first_width(len(timeline)) if manifest["first_moves"] else 0
    wanted = documents(
        len(timeline), manifest["tensors"], manifest["addresses"], width,
        statistics=timeline.statistics,
    )  # fmt: skip
    for key, document in wanted.items():
        if manifest["objects"][key][0] > 1 << 16 or not same_document(
            (timeline.path / key).read_bytes(), document
        ):
            raise _senseless(timeline, f"{key} does not describe what is there")


def _check_counts(timeline: Timeline) -> None:
    """Raise StoreCorrupt where counts do not agree with each other or with the stores."""
    counts, steps = timeline.counts, len(timeline)
    table = timeline.store(1).table
    for step in range(1, steps + 1):
        store = timeline.store(step)
        if (store.table.names, store.table.shapes) != (table.names, table.shapes):
            raise _senseless(timeline, f"step {step} is of other tensors")
        if store.masks != (timeline.rule,):
            raise _senseless(timeline, f"step {step} is under another rule")
        if store.table.changed[timeline.rule].tolist() != counts[step - 1].tolist():
            raise _senseless(timeline, f"the counts of step {step} are not those of its mask")
    if (counts < 0).any() or (counts > table.elements).any():
        raise _senseless(timeline, "counts are out of range")
    sums = counts.sum(1).tolist()
    said = timeline.manifest["steps"]
    keys = "changed_since_first", "changed_since_previous", "kept"
    if sums[:-1] != [step[key] for key in keys for step in said] or sums[-1] != timeline.moved:
        raise _senseless(timeline, "the counts of tensors do not add up to those of the steps")


def _check_paths(timeline: Timeline) -> None:
    """Raise StoreCorrupt where lengths and ways cannot be those of any run."""
    (lengths, ways), steps = timeline.paths, len(timeline)
    elements = timeline.store(1).table.elements
    onward, back, nonfinite = ways.reshape(3, steps, -1)
    if (ways < 0).any() or (onward + back + nonfinite > elements).any():
        raise _senseless(timeline, "ways are out of range")
    if not (lengths >= 0).all():  # a NaN is not
        raise _senseless(timeline, "lengths are out of range")
    moved, distances = lengths.reshape(2, steps, -1)
    first = (onward[0] + back[0] == 0) & (moved[0] == distances[0])
    if not first.all():
        raise _senseless(timeline, "the first step goes from where the run begins")
    if timeline.rule == "exact":
        counts = timeline.counts
        still = counts[:steps] == 0, counts[steps : 2 * steps] == 0
        if (distances[still[0]] > 0).any() or (moved[still[1]] > 0).any():
            raise _senseless(timeline, "lengths are of what did not change")


def _check_first_moves(timeline: Timeline) -> None:
    """Hold the first moves against the masks of all steps, a piece of a tensor at a time."""
    steps, counts = len(timeline), timeline.counts
    table = timeline.store(1).table
    for number, record in enumerate(table):
        found = 0
        for begin in range(0, record.elements, _PIECE):
            end = min(record.elements, begin + _PIECE)
            moves = timeline.first_moves_between(record.start + begin, record.start + end)
            expected = np.zeros(end - begin, moves.dtype)
            for step in range(steps, 0, -1):
                store = timeline.store(step)
                mask = store.mask(record.name, timeline.rule, start=begin, stop=end)
                expected[mask.reshape(-1)] = step
            if (moves != expected).any():
                raise _senseless(timeline, f"the first moves of {record.name} are not its masks'")
            found += int((moves > 0).sum())
        if found != counts[-1, number]:
            raise _senseless(timeline, f"what moved of {record.name} was counted otherwise")
    _check_last_object(timeline)


def _check_last_object(timeline: Timeline) -> None:
    """Raise StoreCorrupt where the last object has more, or less, than there are elements."""
    width = first_width(len(timeline))
    nbytes = timeline.manifest["addresses"] * width
    if not nbytes:
        return
    number = (nbytes - 1) // OBJECT
    inners = -(-(nbytes - number * OBJECT) // INNER)
    with timeline.first_object(number) as (fd, size, where):
        check_absent(fd, size, where, inners)


def _senseless(timeline: Timeline, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{printable(str(timeline.path))} makes no sense: {printable(why)}",
        hint="make the timeline again",
    )
