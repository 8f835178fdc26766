"""Two open checkpoints, paired and laid out: what a diff compares, whoever does it.

A worker of a cluster makes the same comparison from its recipe: it opens both checkpoints by path,
checks that it sees what the others see, and writes mask objects into the work directory itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.checkpoints.labels import labels
from ckdiff.checkpoints.opening import open_recipe, place_in
from ckdiff.checkpoints.pairing import Matching, Pairing, pair, renamed
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, TensorTable
from ckdiff.checkpoints.sameness import FilePair, known_by, same_tensors
from ckdiff.diffs.merging import merged_tensors
from ckdiff.diffs.sides import Side
from ckdiff.dtypes import DTYPES
from ckdiff.errors import ClusterError, printable
from ckdiff.layout import Layout, Spans, bits_of
from ckdiff.rules import RuleSet
from ckdiff.running.remote import SHARE
from ckdiff.stores.sharedwork import check_plan
from ckdiff.stores.sink import ObjectSink

if TYPE_CHECKING:
    from ckdiff.diffs.casting import Casting
    from ckdiff.diffs.task import DiffTask
    from ckdiff.stores.chunkresult import ChunkResult


_NOTHING = "--dequantize: no tensor is quantised in a way that ckdiff knows"
_READ_AHEAD = 1 << 25  # elements read for each worker while it is not there yet


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors are compared, under which names, and what of them."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    common_rows: bool = False
    unfuse: bool = True
    dequantize: bool = False

    def pair(self, base: TensorTable, tuned: TensorTable, *, rename: bool = True) -> Pairing:
        """See ``pair``; two float dtypes are compared by value."""
        return pair(
            base,
            tuned,
            include=self.include,
            exclude=self.exclude,
            rename=self.rename if rename else (),
            matching=Matching(by_value=True, common_rows=self.common_rows),
        )


def side_by_side(
    base: Checkpoint, tuned: Checkpoint, selection: Selection, same: Sequence[FilePair] = ()
) -> Comparison:
    """Both sides as they are compared: quantised tensors by what they stand for, if that is asked
    for; and where one has fused tensors and the other their parts, all of it part by part.

    Raises UsageError and PairingError.
    """
    if not selection.dequantize:
        return _by_parts(base, tuned, selection, same)
    from ckdiff.checkpoints.views.blockscale import dequantised

    (first, notes), (second, more) = dequantised(base), dequantised(tuned)
    comparison = _by_parts(first, second, selection, same)
    comparison.dequantised = first is not base or second is not tuned
    comparison.notes = (*notes, *more, *comparison.notes)
    if not comparison.dequantised:
        comparison.notes = (*comparison.notes, _NOTHING)
    return comparison


def _by_parts(
    base: Checkpoint, tuned: Checkpoint, selection: Selection, same: Sequence[FilePair]
) -> Comparison:
    names, unused = renamed(tuned.table.names, selection.rename)
    if not selection.unfuse or _pairs_whole(base.table, names, tuned.table):
        comparison = Comparison(base, tuned, selection, same)
        comparison.tuned_names = names
        return comparison
    from ckdiff.checkpoints.views.parts import PartsView
    from ckdiff.checkpoints.views.unfusing import SideView, unfuse

    found = unfuse(base.table, replace(tuned.table, names=names))
    if found.base is None and found.tuned is None:
        comparison = Comparison(base, tuned, selection, same)
        comparison.tuned_names = names
    else:
        everything = SideView(np.arange(len(names), dtype=np.int64), names, [])
        seen = (
            base if found.base is None else PartsView(base, found.base),
            PartsView(tuned, found.tuned or everything),
        )
        seen[1].table.absent = renamed(tuned.table.absent, selection.rename)[0]
        pairing = selection.pair(seen[0].table, seen[1].table, rename=False)
        pairing.warnings[:0] = unused
        comparison = Comparison(*seen, selection, same, pairing)
    comparison.notes = found.notes
    return comparison


def _pairs_whole(base: TensorTable, names: list[str], tuned: TensorTable) -> bool:
    """Whether all tensors of both sides pair as they are: then nothing is fused on one side."""
    if len(names) != len(base):
        return False
    if names == base.names:
        return base.shapes == tuned.shapes
    shapes = dict(zip(base.names, base.shapes, strict=True))
    return [shapes.get(name) for name in names] == tuned.shapes


class Comparison:
    """A base and a tuned checkpoint side by side. It does not own them.

    Tensors at one place of the files in ``same``, pairs of files, are not read.
    """

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        selection: Selection,
        same: Sequence[FilePair] = (),
        pairing: Pairing | None = None,
    ) -> None:
        self.base, self.tuned, self.selection = base, tuned, selection
        self.tuned_names = tuned.table.names  #: after renaming, in the order of its table
        self.dequantised = False  #: whether a side is seen by what its quantised tensors stand for
        self.notes: tuple[str, ...] = ()  #: of what is compared otherwise than it is stored
        self.pairing = found = pairing or selection.pair(base.table, tuned.table)
        self.shapes = found.shapes(base.table.shapes)
        elements = base.table.nbytes[found.base_index] * 8
        elements //= bits_of([base.table.dtypes[i] for i in found.base_index.tolist()])
        for i in found.resized:
            elements[i] = math.prod(self.shapes[i])
        self.layout = Layout(elements)
        self.sides = (
            Side.of(base, found.base_index, elements),
            Side.of(tuned, found.tuned_index, elements),
        )
        self.dtypes = self.sides[0].dtypes  #: of the base
        #: the dtypes by whose values pairs are compared: the base's, or a wider one
        self.kinds = list(self.dtypes)
        for i, wide in found.retyped.items():
            self.kinds[i] = wide
        self.bits = bits_of(self.kinds)
        self.nbytes: IntArray = self.sides[0].nbytes + self.sides[1].nbytes  #: of both sides
        self.same = tuple(same)
        #: equal, and not read; reading nothing of an empty tensor gives it a content hash
        self.known = same_tensors((base, tuned), (found.base_index, found.tuned_index), self.same)
        self.known &= self.nbytes > 0
        self.known[[*found.retyped, *found.resized]] = False
        self.bytes_known = int(self.nbytes[self.known].sum())  #: of both sides
        self.bytes_to_read = int(self.nbytes.sum()) - self.bytes_known  #: of both sides

    def __repr__(self) -> str:
        sides = " and ".join(printable(side.label) for side in (self.base, self.tuned))
        return f"<Comparison of {sides}: {len(self.pairing):,} tensors>"

    def knowing(self, same: Sequence[FilePair]) -> Comparison:
        """The same, where these are the files that are equal: of fetched ones more may be known
        than their headers said, or less.
        """
        if tuple(same) == self.same:
            return self
        known = Comparison(self.base, self.tuned, self.selection, same, self.pairing)
        known.notes, known.tuned_names = self.notes, self.tuned_names
        known.dequantised = self.dequantised
        return known

    def one_memory(self) -> str | None:
        """What to say where both sides are the same memory; None where they are not."""
        base, tuned = self.base.addresses, self.tuned.addresses
        if base is None or tuned is None:
            return None
        places = base[self.pairing.base_index]
        same = np.flatnonzero((places == tuned[self.pairing.tuned_index]) & (places > 0))
        if not len(same):
            return None
        return (
            f"{len(same):,} tensors are the same memory on both sides, such as "
            f"{printable(self.pairing.names[int(same[0])])}: keep a copy, such as clone(), "
            "of what you compare with later values"
        )

    def to_read(self, first: int, stop: int) -> Spans:
        """What of the addresses [first, stop) is read."""
        return self.layout.spans(first, stop).without(self.known)

    def read_ahead(self, workers: int) -> None:
        """Ask the disk for what so many workers need first; blocks until it was asked."""
        for chunk in range(min(workers, self.layout.chunks)):
            first, end = self.layout.chunk_range(chunk)
            spans = self.to_read(first, min(end, first + _READ_AHEAD))
            for side in self.sides:
                side.checkpoint.read_ahead(side.index[spans.tensors], *spans.byte_ranges(side.bits))

    def nbytes_of(self, chunk: int) -> int:
        """Bytes of both sides that are read for a chunk."""
        spans = self.to_read(*self.layout.chunk_range(chunk))
        return sum(int(spans.byte_ranges(side.bits)[1].sum()) for side in self.sides)

    def cuts(self, step: int) -> IntArray:
        """Addresses at which spans are cut so that what lies in one place is not copied.

        They are multiples of ``step`` inside tensors: where one place ends within a step, that
        step is cut out, and is all that is gathered.
        """
        found = [np.zeros(0, np.int64)]
        for side in self.sides:
            places = side.checkpoint.borders
            if not places:
                continue
            for i, tensor in enumerate(side.index.tolist()):
                if tensor in places:
                    begin = self.layout.starts[i]
                    at = begin + places[tensor]
                    both = np.concatenate([at // step * step, -(-at // step) * step])
                    inside = (begin < both) & (both < begin + self.layout.elements[i])
                    found.append(both[inside])
        # numpy imports much for unique(), and mostly there is nothing
        return np.unique(np.concatenate(found)) if len(found) > 1 else found[0]

    def casting(self) -> Casting:
        """What is widened before it is compared."""
        from ckdiff.diffs.casting import Casting

        return Casting.of(self.sides, self.kinds, self.pairing.retyped)

    def known_by(self) -> dict[int, str]:
        """For the tensors that are not read, what their content is known by; it may be empty."""
        places = np.flatnonzero(self.known).tolist()
        return {i: known_by(self.base, int(self.pairing.base_index[i])) for i in places}

    def provenance(self, unpaired: list[dict[str, Any]]) -> dict[str, Any]:
        """What a store records about where it comes from."""
        chosen, names = self.selection, labels(self.base, self.tuned)
        return {
            "base": _identity(self.base, names[0]),
            "tuned": _identity(self.tuned, names[1]),
            "unpaired": unpaired,
            "selection": {
                "include": list(chosen.include),
                "exclude": list(chosen.exclude),
                "rename": list(chosen.rename),
                **({"common_rows": True} if chosen.common_rows else {}),
                **({"dequantize": True} if self.dequantised else {}),
            },
        }

    def tensors_digest(self) -> str:
        """Which tensors are compared, under which names, and which of each side is which."""
        digest = hashlib.sha256()
        for index in (self.pairing.base_index, self.pairing.tuned_index):
            digest.update(index.tobytes())
        for column in (self.pairing.names, self.dtypes, self.sides[1].dtypes, self.shapes):
            digest.update(repr(column).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def seen(self) -> str:
        """What is compared, as everybody sees it who shares the file system."""
        both = [self.tensors_digest(), self.base.seen(), self.tuned.seen()]
        return hashlib.sha256(json.dumps(both).encode()).hexdigest()

    def task(
        self,
        rules: RuleSet,
        *,
        with_statistics: bool,
        window: int,
        sink: ObjectSink | None,
        on_bytes: Callable[[int], None] = lambda size: None,
    ) -> DiffTask:
        """The chunk task; the rest is as in DiffTask."""
        from ckdiff.diffs.task import DiffTask
        from ckdiff.kernels import BLOCK, Kernels
        from ckdiff.kernels.hashing import UNIT

        present = list(dict.fromkeys(self.kinds))
        kernels = Kernels(
            [DTYPES[name] for name in present], list(rules.order), with_statistics=with_statistics
        )
        return DiffTask(
            sides=self.sides,
            layout=self.layout,
            kinds=self.kinds,
            known=self.known,
            slots=np.array([kernels.slot_of[name] for name in self.kinds], np.int64),
            kernels=kernels,
            comparing=kernels,
            masks={} if sink is None else rules.mask_columns,
            rules=len(rules),
            with_statistics=with_statistics,
            window=window,
            cuts=self.cuts(BLOCK if with_statistics else UNIT),
            merging=merged_tensors(self.sides, self.pairing.names),
            casting=self.casting(),
            sink=sink,
            on_bytes=on_bytes,
        )


def _identity(side: Checkpoint, label: str) -> dict[str, Any]:
    files = [file.to_dict() for file in side.files]
    return {"label": label, **side.origin, "files": files}


@dataclass(frozen=True, slots=True)
class DiffRecipe:
    """What another process needs to make the same task. Paths are absolute."""

    sides: tuple[str, str]  #: how base and tuned are opened
    selection: Selection
    rules: tuple[str, ...]  #: those whose masks are stored, where there is a work directory
    with_statistics: bool
    window: int
    seen: str  #: of the comparison
    out: str | None  #: how errors of writing name the store
    work: str | None  #: the work directory
    plan: str  #: its plan's digest
    same: tuple[FilePair, ...] = ()  #: files that are known to be equal

    def make(self, stack: ExitStack) -> RemoteDiff:
        """See Recipe."""
        base, tuned = (stack.enter_context(open_recipe(side)) for side in self.sides)
        comparison = side_by_side(base, tuned, self.selection, self.same)
        if comparison.seen() != self.seen:
            first, second = map(place_in, self.sides)
            raise ClusterError(
                f"a worker sees different files at {first} or {second}",
                hint=SHARE,
            )
        work = None if self.work is None else Path(self.work)
        sink = None
        if work is not None and self.out is not None:
            sink = ObjectSink(work / "store", Path(self.out), elsewhere=True)
        task = comparison.task(
            RuleSet.of(self.rules),
            with_statistics=self.with_statistics,
            window=self.window,
            sink=sink,
        )
        return RemoteDiff(task, work, self.plan)


@dataclass(frozen=True, slots=True, eq=False)
class RemoteDiff:
    """The chunk task of a diff in a worker of a cluster."""

    task: DiffTask
    work: Path | None
    plan: str

    def __call__(self, chunk: int, stop: threading.Event) -> ChunkResult:
        """See ChunkTask. Raises ClusterError where the work directory is not here as well."""
        if self.work is not None:
            check_plan(self.work, self.plan)  # for every chunk: another run may have it by now
        return self.task(chunk, stop)
