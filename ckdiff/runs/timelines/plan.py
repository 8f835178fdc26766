"""The plan of a timeline: what is compared, and what that takes, before anything is read."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff import budget
from ckdiff._version import __version__
from ckdiff.checkpoints.labels import labels_of
from ckdiff.checkpoints.opening import (
    Given,
    bytes_to_download,
    no_room,
    open_for_planning,
    open_in,
)
from ckdiff.checkpoints.pieces import told
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.diffs.comparison import Selection
from ckdiff.diffs.result import asked_for, details
from ckdiff.errors import CkdiffError, StoreCorrupt, StoreExists, UsageError, printable
from ckdiff.kernels.hashing import UNIT
from ckdiff.naming import natural_sorted
from ckdiff.options import Observer, Options, checked_output
from ckdiff.outputs.checks import check_disk, check_place
from ckdiff.rules import RuleSet
from ckdiff.runs.timelines.file import (
    MOST_STEPS,
    first_width,
    foreign,
    is_timeline,
    read_timeline,
    tables,
)
from ckdiff.runs.timelines.memory import allot
from ckdiff.runs.timelines.pairs import MarchingPairs, Pairs, left_out_note, pair_all
from ckdiff.runs.timelines.versions import versions_of
from ckdiff.stores.workdir import check_early, store_errors
from ckdiff.stores.writer import require_text


@dataclass(frozen=True, slots=True, eq=False)
class TimelinePlan:
    """The checkpoints of a run, open and paired, and who compares them with what memory.

    A context manager: whoever made it closes it, which closes what it opened.
    """

    options: Options
    observer: Observer = field(repr=False)
    out: Path
    rules: RuleSet
    pairs: Pairs
    marching: MarchingPairs  #: what is read and compared
    loaded: int  #: how many of the first steps are taken from the timeline that is there
    former: dict[str, Any] | None  #: the manifest of that timeline
    first_moves: bool
    checkpoints: list[dict[str, Any]]  #: as the manifest has them
    asked: list[str]
    workers: int
    window: int
    memory: int
    needed: int
    opened: float
    stack: ExitStack = field(repr=False)

    def __enter__(self) -> TimelinePlan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    @property
    def steps(self) -> int:
        """How many there are: the checkpoints but the first."""
        return len(self.pairs.comparisons)

    @property
    def width(self) -> int:
        """Bytes of a step's number, 0 where no first moves are kept."""
        return first_width(self.steps) if self.first_moves else 0

    @property
    def sources(self) -> list[Checkpoint]:
        """The checkpoints that are read, and versions that are folded."""
        found = [side.checkpoint for side in (*self.marching.read, *self.marching.sides)]
        return list({id(checkpoint): checkpoint for checkpoint in found}.values())

    @property
    def bytes_to_read(self) -> int:
        """Of all checkpoints."""
        return sum(int(side.nbytes.sum()) for side in self.marching.read)

    def nbytes_of(self, chunk: int) -> int:
        """Bytes of all sides that are read for a chunk."""
        layout = self.pairs.layout
        spans = layout.spans(*layout.chunk_range(chunk))
        return sum(int(spans.byte_ranges(side.bits)[1].sum()) for side in self.marching.read)

    @property
    def disk_at_most(self) -> int:
        """Bytes that the timeline takes if nothing of it compresses."""
        return _disk_at_most(self.pairs, self.width, statistics=self.options.stats)

    def cuts(self) -> IntArray:
        """Addresses at which spans are cut so that what lies in one place is not copied."""
        found = [each.cuts(UNIT) for each in self.pairs.comparisons]
        found = [cuts for cuts in found if len(cuts)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def identity(self) -> dict[str, Any]:
        """What decides whether the work of an earlier run can be used."""
        return {
            "ckdiff": __version__,
            "kind": "timeline",
            "rules": [str(rule) for rule in self.rules.reported],
            "first_moves": self.first_moves,
            "statistics": self.options.stats,
            "tensors": [each.tensors_digest() for each in self.pairs.comparisons],
            "checkpoints": [side.checkpoint.fingerprint() for side in self.pairs.sides],
            "former": None if self.former is None else _digest(self.former),
            "loaded": self.loaded,
        }

    def estimate(self) -> dict[str, Any]:
        """What running will read, write and need: for ``--dry-run``."""
        layout = self.pairs.layout
        return {
            "checkpoints": self.asked,
            "steps": self.steps,
            "steps_known": self.loaded,
            "tensors": len(self.pairs.names),
            "elements": int(layout.elements.sum()),
            "chunks": layout.chunks,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_download": bytes_to_download(self.sources),
            "disk_at_most": self.disk_at_most,
            "memory": self.memory,
            "memory_needed": self.needed,
            "workers": self.workers,
            "window": self.window,
            "rule": str(self.rules.masks[0]),
            "refusal": no_room(self.sources) or _refusal(self),
        }


def in_order(checkpoints: Sequence[Given], patterns: Sequence[str] = ()) -> list[Given]:
    """The checkpoints that were given, and after them those that globs name, each in natural order.

    What a glob matches that is there already is not added again. Raises UsageError where there are
    fewer than two, or a glob matches nothing.
    """
    if isinstance(checkpoints, (str, os.PathLike)):
        checkpoints = [checkpoints]
    found: list[Given] = list(checkpoints)
    known = {os.path.abspath(given) for given in found if isinstance(given, (str, os.PathLike))}
    for pattern in patterns:
        matches = natural_sorted(glob.glob(pattern))
        if not matches:
            raise UsageError(f"nothing matches the glob {printable(pattern)}")
        found += [path for path in matches if os.path.abspath(path) not in known]
        known.update(map(os.path.abspath, matches))
    if len(found) < 2:
        raise UsageError(
            "a timeline takes two checkpoints or more",
            hint="the first, and one for each step; or --glob 'run/checkpoint-*'",
        )
    if len(found) - 1 > MOST_STEPS:
        raise UsageError(f"a timeline has at most {MOST_STEPS:,} steps, not {len(found) - 1:,}")
    return found


def plan(
    checkpoints: Sequence[Given],
    out: str | os.PathLike[str],
    options: Options,
    observer: Observer,
    *,
    first_moves: bool = True,
) -> TimelinePlan:
    """Open all checkpoints by their headers, and plan their timeline.

    Raises what a run would raise before it reads anything, but for a dry run what is wrong with the
    output and its disk, which the estimate says.
    """
    rules, resident = RuleSet.of(options.rules), budget.resident_anonymous()
    if len(rules.masks) != 1:
        raise UsageError("a timeline has one rule", hint="make one for each rule")
    place = checked_output(out)
    with ExitStack() as stack:
        opening = partial(open_for_planning, key=options.key)
        run = versions_of(stack, checkpoints, options.key, options.memory)
        opened = [open_in(stack, given, opening) for given in run]
        began = time.perf_counter()
        pairs, described = _paired(opened, place, options)
        loaded, former = _known(place, pairs, described, rules, options)
        _tell(opened, pairs, observer)
        marching = pairs.of(range(loaded + 1, len(opened)))
        width = first_width(len(opened) - 1) if first_moves else 0
        held = max(0, budget.resident_anonymous() - resident)
        means = allot(pairs, marching, loaded, len(rules), width, held=held, options=options)
        found = TimelinePlan(
            options, observer, place, rules, pairs, marching, loaded, former, first_moves,
            described, [asked_for(g, s) for g, s in zip(run, opened, strict=True)],
            *means, began,
            stack.pop_all(),
        )  # fmt: skip
    if not options.dry_run:
        try:
            _check_output(found)
        except BaseException:
            found.stack.close()
            raise
    return found


def _paired(
    opened: Sequence[Checkpoint], out: Path, options: Options
) -> tuple[Pairs, list[dict[str, Any]]]:
    """What is compared, and the checkpoints as the manifest has them."""
    check_place(out, opened)
    pairs = pair_all(opened, Selection(tuple(options.include), tuple(options.exclude)))
    described = _described(opened)
    unpaired = [details(each.pairing.unpaired) for each in pairs.comparisons]
    said = zip(pairs.comparisons, unpaired, strict=True)
    require_text([described, pairs.names, [each.provenance(them) for each, them in said]])
    return pairs, described


def _described(opened: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The checkpoints as the manifest has them: ``seen`` tells whether one is still the same."""
    return [
        {
            "label": label,
            **side.origin,
            "files": [file.to_dict() for file in side.files],
            "seen": hashlib.sha256(json.dumps(_seen(side)).encode()).hexdigest(),
        }
        for label, side in zip(labels_of(opened), opened, strict=True)
    ]


def _seen(side: Checkpoint) -> list[Any]:
    """What a checkpoint is known by: on the hub its commit, wherever its files are by now."""
    if "commit" in side.origin:
        return [dict(side.origin), [file.to_dict() for file in side.files]]
    return side.seen()


def _known(
    out: Path,
    pairs: Pairs,
    described: list[dict[str, Any]],
    rules: RuleSet,
    options: Options,
) -> tuple[int, dict[str, Any] | None]:
    """How many steps need not be compared, because the timeline that is there has them, and its
    manifest: all of its steps but the last, which is what new ones are compared with.

    Raises StoreExists where it is a timeline of something else.
    """
    if options.overwrite or not is_timeline(out):
        return 0, None
    try:
        former = read_timeline(out)
    except StoreCorrupt:
        return 0, None  # said where the output is checked
    if options.stats and not former["statistics"]:
        problem: str | None = "without statistics"
    else:
        problem = _unlike(former, pairs, described, rules, out)
    if problem is not None:
        hint = "--overwrite makes it anew, and reads all checkpoints"
        if problem == _THESE:
            hint = f"ckdiff show prints it; {hint}"
        raise StoreExists(f"{printable(str(out))} is a timeline {problem}", hint=hint)
    return len(former["steps"]) - 1, former


_THESE = "of just these checkpoints"


def _unlike(
    former: dict[str, Any],
    pairs: Pairs,
    described: list[dict[str, Any]],
    rules: RuleSet,
    out: Path,
) -> str | None:
    """Why checkpoints cannot be appended to a timeline, or None."""
    known = former["checkpoints"]
    if former["rule"] != str(rules.masks[0]):
        return f"under the rule {former['rule']}"
    for at, checkpoint in enumerate(known):
        # it may be called otherwise now: by more of its path, where another is called so too
        if at >= len(described) or described[at] | {"label": checkpoint["label"]} != checkpoint:
            return f"of other checkpoints: {printable(checkpoint['label'])} is not what is given"
    if len(known) == len(described):
        return _THESE
    if former["ckdiff_version"] != __version__:
        return f"by ckdiff {former['ckdiff_version']}"
    from ckdiff.runs.timelines.former import tensors_of

    try:
        same = tensors_of(out, former) == (pairs.names, pairs.comparisons[0].dtypes, pairs.shapes)
    except CkdiffError:
        same = False
    return None if same else "of other tensors"


def _tell(opened: Sequence[Checkpoint], pairs: Pairs, observer: Observer) -> None:
    for note in dict.fromkeys(note for side in opened for note in side.notes):
        observer.note(told(note))
    for warning in dict.fromkeys(w for each in pairs.comparisons for w in each.pairing.warnings):
        observer.note(f"warning: {warning}")
    if (said := left_out_note(pairs)) is not None:
        observer.note(said)


def _disk_at_most(pairs: Pairs, width: int, *, statistics: bool) -> int:
    layout, steps = pairs.layout, len(pairs.comparisons)
    tensors = len(pairs.names)
    masks = steps * (layout.total // 8 + layout.chunks * 4096 + tensors * 350)
    rows = sum(rows for rows, _ in tables(steps, statistics=statistics).values())
    return masks + layout.total * width + 8 * rows * tensors


def _check_output(found: TimelinePlan) -> None:
    overwrite = found.options.overwrite or found.former is not None
    with store_errors(found.out):
        check_early(found.out, overwrite=overwrite, strange=foreign)
    check_disk(found.out, found.disk_at_most, note=lambda message: None)


def _refusal(found: TimelinePlan) -> str | None:
    try:
        _check_output(found)
    except CkdiffError as error:
        return error.one_line()
    return None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
