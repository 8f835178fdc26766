"""Which tensors of a chain of deltas, and of the base, each rebuilt tensor is made from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.deltas.container import Delta
from ckdiff.deltas.form import FORMS
from ckdiff.deltas.parts import UInt64, called
from ckdiff.errors import DeltaError, printable

_ALL = 2**63 - 1
Chosen = tuple[IntArray, IntArray, IntArray]


class Links:
    """Which tensor of each delta in a chain, and of the base, each rebuilt tensor is made from.

    Windows of a tensor begin at the same bytes in all of them, however many rows each has: so one
    window is made of one.
    """

    def __init__(self, base: Checkpoint, chain: list[Delta]) -> None:
        self.base, self.chain = base, chain
        last = chain[-1]
        count = len(last.blueprint.names)
        #: (deltas, tensors): position in that delta, or -1 where a later one has all of it
        self.position: IntArray = np.full((len(chain), count), -1, np.int64)
        here = np.arange(count)
        for k in reversed(range(len(chain))):
            self.position[k] = here
            before = self._before(k)
            here = np.where(here >= 0, before[here], -1)
        self.origin: IntArray = here  #: position in the base, or -1
        #: the first delta that takes part in each tensor
        self.start: IntArray = (self.position >= 0).argmax(axis=0)
        #: (deltas, tensors): bytes that each takes from what is before it
        self._taken = np.full((len(chain), count), _ALL, np.int64)
        for k, delta in enumerate(chain):
            there = (self.position[k] >= 0) & ((k > self.start) | (self.origin >= 0))
            self._taken[k, there] = delta.ranges.nbytes[self.position[k, there]]
        #: (deltas, tensors): bytes of that delta's tensor that somebody looks at
        ends = np.vstack([self._taken[1:], last.blueprint.nbytes[None]])
        self._looked_at = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
        self._frames = np.array([FORMS[dtype].frame for dtype in last.blueprint.dtypes], np.int64)

    def first(self, tensor: int, start: int) -> int:
        """The first delta that takes part in the window that begins at byte ``start``: none before
        it has these bytes.
        """
        taken = self._taken[:, tensor]
        beyond = np.flatnonzero(taken <= start)
        return int(beyond[-1]) if len(beyond) else int(self.start[tensor])

    def to_read(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Those of some windows of the result for which the base is read; and of each its tensor,
        the first byte in that, and how many.
        """
        found = self.chain[-1].windows
        tensor, start = found.tensor[windows], found.start[windows]
        there = (self.origin[tensor] >= 0) & (self._taken.min(axis=0)[tensor] > start)
        windows, tensor, start = windows[there], tensor[there], start[there]
        sizes = np.minimum(self._frames[tensor], self._taken[0, tensor] - start)
        return windows, self.origin[tensor], self._begin(tensor) + start, sizes

    def of_base(self, tensor: int) -> Iterator[tuple[int, Chosen]]:
        """All that the first delta takes of the base for a tensor, a window at a time: the first
        byte, and what to read.
        """
        here, frame = np.array([tensor], np.int64), int(self._frames[tensor])
        taken = int(self._taken[0, tensor])
        for start in range(0, taken, frame):
            size = np.array([min(frame, taken - start)], np.int64)
            yield start, (self.origin[here], self._begin(here) + start, size)

    def check_sums(self, base_sums: UInt64, out_sums: UInt64) -> None:
        """Raise DeltaError unless the base was the right one, and the result is."""
        first, last = self.chain[0], self.chain[-1]
        # what a later delta takes no rows of is not all read, and the result's hash has to do
        used = np.flatnonzero((self.origin >= 0) & (self._looked_at[0] >= self._taken[0]))
        wrong = used[
            (base_sums[used] != first.tensors.base_hashes[self.position[0, used]]).any(axis=1)
        ]
        names = last.blueprint.names
        if len(wrong):
            raise self.other_base(names[int(wrong[0])], len(wrong))
        bad = np.flatnonzero((out_sums != last.tensors.tuned_hashes).any(axis=1))
        if len(bad):
            raise last.damaged(f"what it makes of {called(names[int(bad[0])])} is wrong")

    def check_counts(self, changed: IntArray) -> None:
        """Raise DeltaError unless as many elements changed as the deltas say.

        ``changed`` is (tensors, deltas, 2): all, and those that have nothing in what is before.
        """
        for k, delta in enumerate(self.chain):
            taking_part = np.flatnonzero(self.position[k] >= 0)
            at = self.position[k, taking_part]
            all_made = self._looked_at[k, taking_part] >= delta.blueprint.nbytes[at]
            said = np.stack([delta.tensors.changed, delta.ranges.fresh], axis=1)[at]
            wrong = all_made & (changed[taking_part, k] != said).any(axis=1)
            if wrong.any():
                name = called(delta.blueprint.names[int(at[int(wrong.argmax())])])
                raise delta.damaged(f"other elements of {name} changed than it counts")

    def other_base(self, name: str, count: int = 1) -> DeltaError:
        """The error for a base that is not the one of the first delta."""
        others = f" and {count - 1:,} more" if count > 1 else ""
        return DeltaError(
            f"{printable(self.chain[0].path)} was not made for {printable(self.base.label)}:"
            f" {called(name)}{others} differ{'s' if count == 1 else ''}",
            hint="give the checkpoint that the delta was made from",
        )

    # inside

    def _begin(self, tensors: IntArray) -> IntArray:
        """The first byte in the base's tensors of what is taken from them."""
        begin: IntArray = self.chain[0].ranges.begin[self.position[0, tensors]]
        return begin

    def _before(self, k: int) -> IntArray:
        """For each tensor of delta ``k`` its position in what comes before, or -1 for none."""
        delta = self.chain[k]
        table = self.chain[k - 1].blueprint if k else self.base.table
        where = {name: i for i, name in enumerate(table.names)}
        made, odd = delta.blueprint, delta.ranges.odd
        found = np.full(len(made.names), -1, np.int64)
        for i in np.flatnonzero(delta.tensors.based).tolist():
            name, shape = made.names[i], made.shapes[i]
            if i in odd:
                name, shape = odd[i].base, odd[i].shape
            at = where.get(name, -1)
            same = at >= 0 and (table.dtypes[at], table.shapes[at]) == (made.dtypes[i], shape)
            if not same and not k:
                raise self.other_base(name)
            if not same or (k and not self._follows(k, i, at)):
                raise DeltaError(
                    f"{printable(delta.path)} does not follow {printable(self.chain[k - 1].path)}:"
                    f" {called(name)} differs",
                    hint="give the deltas in the order in which they were made",
                )
            found[i] = at
        return found

    def _follows(self, k: int, tensor: int, at: int) -> bool:
        """Whether a tensor of delta ``k`` is made from what the one before makes, at ``at``."""
        delta, former = self.chain[k], self.chain[k - 1]
        if delta.ranges.begin[tensor]:
            raise DeltaError(
                f"{called(delta.blueprint.names[tensor])} of {printable(delta.path)} is made from "
                "the middle of a tensor, which takes a base in files",
                hint="apply the earlier deltas first, then this one to the result",
            )
        if delta.ranges.nbytes[tensor] < former.blueprint.nbytes[at]:
            return True  # rows went: what is left has another hash, and only the result tells
        hashes = former.tensors.tuned_hashes[at] == delta.tensors.base_hashes[tensor]
        return bool(hashes.all())
