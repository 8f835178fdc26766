"""A timeline that is finished: what it says of a run, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import StoreCorrupt, UsageError, printable
from ckdiff.naming import natural_sorted
from ckdiff.options import checked_int, checked_path
from ckdiff.runs.timelines.file import (
    LENGTHS,
    WAYS,
    first_object_key,
    first_width,
    read_timeline,
)
from ckdiff.runs.timelines.former import open_step, read_counts, read_table, unpaired_at
from ckdiff.runs.timelines.paths import in_all, said
from ckdiff.runs.timelines.shown import TimelineShown
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.objects import INNER, OBJECT, read_inners
from ckdiff.stores.summaries import checked_by, group_index, group_order

if TYPE_CHECKING:
    from ckdiff.naming import By
    from ckdiff.runs.timelines.run import Outcome


class Timeline(TimelineShown):
    """A finished timeline. ``to_dict()`` is what ``ckdiff timeline --json`` prints."""

    def __init__(
        self, path: Path, *, asked: Sequence[str] | None = None, outcome: Outcome | None = None
    ) -> None:
        self.path = path  #: the directory
        self.manifest: dict[str, Any] = read_timeline(path)
        self._outcome = outcome
        #: as they were asked for; of a timeline that was opened, as it calls them
        self.checkpoints = list(asked or (c["label"] for c in self.manifest["checkpoints"]))
        self.rule: str = self.manifest["rule"]
        self.elements: int = self.manifest["elements"]
        self.moved: int = self.manifest["moved"]  #: elements that differed at some step
        self.statistics: bool = self.manifest["statistics"]  #: whether it was made with them
        self._counts: npt.NDArray[np.int64] | None = None
        self._paths: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]] | None = None
        self._stores: dict[int, MaskStore] = {}
        self._left_out: list[str] | None = None

    def __repr__(self) -> str:
        return f"<Timeline {printable(str(self.path))}: {len(self)} steps, {self.rule}>"

    def __len__(self) -> int:
        """How many steps there are: the checkpoints but the first."""
        return len(self.manifest["steps"])

    @property
    def never(self) -> int:
        """Elements that are equal to the first checkpoint's at every step."""
        return self.elements - self.moved

    @property
    def final(self) -> int:
        """Elements that differ at the last step."""
        return int(self.manifest["steps"][-1]["changed_since_first"])

    @property
    def returned(self) -> int:
        """Elements that differed at some step and are equal at the last."""
        return self.moved - self.final

    @property
    def steps(self) -> list[dict[str, Any]]:
        """A dict for each checkpoint but the first: ``checkpoint``, ``changed_since_first``,
        ``changed_since_previous``, ``kept`` (that differ at this step and at the last),
        ``coverage`` (kept / final) and ``lasting`` (kept / changed_since_first), ``density`` and
        ``density_since_previous``. Shares of nothing are None. With statistics also
        ``step_length``, ``distance``, ``path_length``, ``path_ratio``, ``onward``, ``back``,
        ``sign_agreement`` and ``nonfinite``.
        """
        found = [
            {"checkpoint": checkpoint, **_shares(step, self.final, self.elements)}
            for checkpoint, step in zip(self.checkpoints[1:], self.manifest["steps"], strict=True)
        ]
        for step, more in zip(found, self._ways_of_all(), strict=False):
            step |= more
        return found

    def _ways_of_all(self) -> list[dict[str, Any]]:
        """What statistics say of each step; nothing without them."""
        if not self.statistics:
            return []
        lengths, ways = self.paths
        return said(lengths.cumsum(1)[:, -1], ways.sum(1))

    def store(self, step: int) -> MaskStore:
        """The masks of a step, from 1 on, against the first checkpoint."""
        step = checked_int("step", step)
        if not 1 <= step <= len(self):
            raise UsageError(f"there is no step {step}", hint=f"steps are 1 to {len(self)}")
        if step not in self._stores:
            self._stores[step] = open_step(self.path, self.manifest, step)
        return self._stores[step]

    @property
    def left_out(self) -> list[str]:
        """Tensors that are not compared, because some checkpoint lacks them or has another shape,
        in natural order. Verified when first used.
        """
        if self._left_out is None:
            every = range(1, len(self) + 1)
            found = (t["name"] for k in every for t in unpaired_at(self.path, self.manifest, k))
            self._left_out = natural_sorted(list(dict.fromkeys(found)))
        return self._left_out

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Counts for each tensor, (3 * steps + 1, tensors). For each step: changed since the first
        checkpoint; then for each step: changed since the step before; then for each step: changed
        at this step and at the last one too. The last line counts what differed at any step.
        Verified when first used.
        """
        if self._counts is None:
            self._counts = read_counts(self.path, self.manifest)
        return self._counts

    @property
    def paths(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Two arrays for each tensor. Lengths (2 * steps, tensors): how far the elements moved at
        each step, then how far they are from the first checkpoint. Counts (3 * steps, tensors):
        onward, then back, then left out. Verified when first used. Raises UsageError if there are
        no statistics.
        """
        if not self.statistics:
            raise UsageError(
                f"{printable(str(self.path))} has no statistics", hint="make it with --stats"
            )
        if self._paths is None:
            lengths, ways = (read_table(self.path, self.manifest, name) for name in (LENGTHS, WAYS))
            self._paths = lengths, ways
        return self._paths

    def first_moves(self, name: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        """For each element of a tensor the first step at which it differed, or 0, in the tensor's
        shape, as uint8 or uint16. Raises UsageError if the timeline has none, and StoreCorrupt.
        """
        if not self.manifest["first_moves"]:
            raise UsageError(f"{printable(str(self.path))} keeps no first moves")
        table = self.store(1).table
        record = table[table.find(name)]
        flat = self.first_moves_between(record.start, record.start + record.elements)
        return flat.reshape(record.shape)

    def first_moves_between(self, begin: int, end: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The first moves at element addresses [begin, end)."""
        width = first_width(len(self))
        found: npt.NDArray[np.unsignedinteger[Any]]
        found = self._bytes(begin * width, end * width).view(f"<u{width}")
        return found

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Bytes of the flat array of first moves."""
        out = np.empty(end - begin, np.uint8)
        for number in range(begin // OBJECT, -(-end // OBJECT)):
            at = number * OBJECT
            low, high = max(begin, at), min(end, at + OBJECT)
            first, stop = (low - at) // INNER, -(-(high - at) // INNER)
            with self.first_object(number) as (fd, size, where):
                data = read_inners(fd, size, where, first, stop)
            out[low - begin : high - begin] = data[low - at - first * INNER :][: high - low]
        return out

    @contextmanager
    def first_object(self, number: int) -> Iterator[tuple[int, int, str]]:
        """An object of the first moves, open: descriptor, size, how messages name it."""
        key = first_object_key(number)
        size, path = self.manifest["objects"][key][0], self.path / key
        where = printable(str(path))
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if os.fstat(fd).st_size != size:
                    raise StoreCorrupt(f"{where} does not have its {size} bytes any more")
                yield fd, size, where
            finally:
                os.close(fd)
        except OSError as error:
            raise StoreCorrupt(f"cannot read {where}: {error.strerror}") from error

    def summary(self, by: By = "layer") -> list[dict[str, Any]]:
        """Rows by tensor, layer, module, dtype or model: ``group``, ``elements``, ``never``,
        ``returned``, ``final`` and ``steps``, a list of dicts as in ``steps`` without
        ``checkpoint``.
        """
        checked_by(by)
        table = self.store(1).table
        names, index = group_index(table.names, table.dtypes, by)
        elements = np.zeros(len(names), np.int64)
        np.add.at(elements, index, table.elements)
        sums = np.zeros((len(names), len(self.counts)), np.int64)
        np.add.at(sums, index, self.counts.T)
        rows = [
            self._row(names[i], int(elements[i]), sums[i].tolist()) for i in group_order(names, by)
        ]
        if self.statistics:
            found = []
            for table_of in self.paths:
                groups = np.zeros((len(names), len(table_of)), table_of.dtype)
                np.add.at(groups, index, table_of.T)
                found.append(groups)
            for row, i in zip(rows, group_order(names, by), strict=True):
                ways = said(found[0][i], found[1][i])
                row["steps"] = [step | way for step, way in zip(row["steps"], ways, strict=True)]
                row |= in_all(ways)
        return rows

    def _row(self, group: str, elements: int, sums: list[int]) -> dict[str, Any]:
        steps = len(self)
        final, moved = sums[steps - 1], sums[-1]
        said = [
            dict(zip(_COUNTED, (sums[i], sums[steps + i], sums[2 * steps + i]), strict=True))
            for i in range(steps)
        ]
        return {
            "group": group,
            "elements": elements,
            "never": elements - moved,
            "returned": moved - final,
            "final": final,
            "steps": [_shares(step, final, elements) for step in said],
        }

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract of ``timeline``."""
        found = {
            "timeline": str(self.path),
            "checkpoints": self.checkpoints,
            "rule": self.rule,
            "elements": self.elements,
            "tensors": self.manifest["tensors"],
            "steps": self.steps,
            "never": self.never,
            "returned": self.returned,
            "final": self.final,
            "first_moves": self.manifest["first_moves"],
            "left_out": self.left_out,
        }
        if self.statistics:
            found |= in_all(self._ways_of_all())
        if self._outcome is not None:
            found["bytes_read"] = self._outcome.bytes_read
            found["bytes_resumed"] = self._outcome.bytes_resumed
            found["seconds"] = self._outcome.seconds
        return found


_COUNTED = ("changed_since_first", "changed_since_previous", "kept")


def _shares(step: dict[str, int], final: int, elements: int) -> dict[str, Any]:
    first, previous, kept = (step[key] for key in _COUNTED)
    return {
        "changed_since_first": first,
        "changed_since_previous": previous,
        "coverage": kept / final if final else None,
        "lasting": kept / first if first else None,
        "kept": kept,
        "density": first / elements if elements else 0.0,
        "density_since_previous": previous / elements if elements else 0.0,
    }


def open_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Open a timeline, and verify its manifest. Raises StoreIncomplete and StoreCorrupt."""
    return Timeline(Path(checked_path("the timeline", path)))
