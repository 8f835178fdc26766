"""Which way two runs moved what both changed (arXiv:2603.22117): the same, or opposite ways.

Masks know no signs, so the base and the tuned checkpoints are read once more, a window at a time
beside the masks, and held against the content hashes in the stores. An element moved up where its
tuned value is larger than the base's, down where it is smaller; one that became another zero, or is
no number on some side, moved neither way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.opening import Given, fetch_all, open_checkpoint, open_in
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, PairingError, UsageError, printable
from ckdiff.kernels import hashing
from ckdiff.kernels.casting import widen
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import Bytes, views
from ckdiff.options import Observer, checked_text
from ckdiff.running.memory import Need, fit_workers
from ckdiff.running.runners import Meter, interruptible, run_chunks
from ckdiff.running.threads import Stopped
from ckdiff.stores.maskwalk import MaskSpans, walk, working_memory
from ckdiff.stores.matching import Matched, misfit
from ckdiff.stores.seeing import seen_by
from ckdiff.stores.summaries import By, group_index, group_order
from ckdiff.stores.table import content_of, is_content_hash

IntArray = npt.NDArray[np.int64]

_PIECE = 1 << 19  #: elements that are looked at together


def directions(
    matched: Matched,
    by: By,
    base: Given,
    tuned: Sequence[Given],
    *,
    key: str | None = None,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer,
) -> IntArray:
    """(rows, pairs of stores, 3): the elements both changed that moved the same way, opposite ways,
    and neither way; rows are those of the overlap, pairs in row-major order.

    ``tuned`` has the checkpoint of each store, in order. Raises UsageError, PairingError, and
    CheckpointError where a checkpoint is not what its store was made from.
    """
    if len(tuned) != len(matched.stores):
        raise UsageError(
            f"{len(matched.stores)} stores need {len(matched.stores)} tuned checkpoints, but "
            f"{len(tuned)} were given",
            hint="give --tuned once for each store, in their order",
        )
    groups, index = group_index(matched.names, matched.dtypes, by)
    with ExitStack() as stack:
        opening = partial(open_checkpoint, key=key and checked_text("key", key))
        opened = [open_in(stack, given, opening) for given in (base, *tuned)]
        fetch_all(opened)
        sides = [seen_by(matched, side).checkpoint for side in opened]
        task = DirectionTask(matched, sides, _places(matched, sides))
        many = fit_workers(workers, max(1, matched.layout.chunks), _need(task), memory)
        found = _counted(task, index, len(groups), many, observer)
    if by == "model":
        return found
    return np.concatenate([found.sum(0, keepdims=True), found[group_order(groups, by)]])


def _need(task: DirectionTask) -> Need:
    matched, sides = task.matched, len(task.sides)
    reading = sum(side.reader_memory(8 * _PIECE) for side in task.sides)
    return Need(
        tables=len(matched.names) * 24 * (sides + len(task.pairs)),
        worker=working_memory(sides - 1) + (24 + 10 * sides) * _PIECE + reading,
    )


def _counted(
    task: DirectionTask, index: IntArray, groups: int, workers: int, observer: Observer
) -> IntArray:
    """(groups, pairs, 3), verified; ``index`` has the group of each tensor."""
    matched, sides = task.matched, task.sides
    task.meter = meter = Meter(observer, len(sides) * matched.layout.total)
    found = np.zeros((groups, len(task.pairs), 3), np.int64)
    sums = np.zeros((len(sides), len(matched.names), 2), np.uint64)

    def done(chunk: int, part: Part) -> None:
        np.add.at(found, index[part.tensors], part.counts)
        sums[:, part.tensors] += part.sums

    with interruptible():
        run_chunks(range(matched.layout.chunks), task, workers=workers, done=done, meter=meter)
    _verify(matched, sides, task.index, sums)
    return found


@dataclass(slots=True, eq=False)
class Part:
    """What a chunk holds."""

    tensors: IntArray
    counts: IntArray  #: (tensors, pairs, 3)
    sums: npt.NDArray[np.uint64]  #: (sides, tensors, 2) of the content hashes


@dataclass(slots=True, eq=False)
class DirectionTask:
    """The chunk task. Shared by the threads of a process."""

    matched: Matched
    sides: Sequence[Checkpoint]  #: the base, then the tuned ones
    index: IntArray  #: (sides, tensors): positions in their tables; -1 where nothing was changed
    meter: Meter | None = None
    pairs: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        stores = len(self.sides) - 1
        self.pairs = [(a, b) for a in range(stores) for b in range(a + 1, stores)]

    def __call__(self, chunk: int, stop: threading.Event) -> Part:
        """See ChunkTask. Raises StoreCorrupt, CheckpointError, SourceChanged, Stopped."""
        layout, hasher = self.matched.layout, ContentHasher()
        span = layout.chunk_range(chunk)
        tensors = np.unique(layout.spans(*span).tensors)
        part = Part(
            tensors,
            np.zeros((len(tensors), len(self.pairs), 3), np.int64),
            np.zeros((len(self.sides), len(tensors), 2), np.uint64),
        )
        with ExitStack() as stack:
            readers = []
            for side in self.sides:
                readers.append(side.reader())
                stack.callback(readers[-1].close)
            for window in walk(layout, self.matched.starts, self.matched.sources(), *span):
                for tensor, start, elements, places in _pieces(window):
                    if stop.is_set():
                        raise Stopped
                    row = int(np.searchsorted(tensors, tensor))
                    if (self.index[:, tensor] >= 0).all():
                        masks = [window.memory[at : at + -(-elements // 8)] for at in places]
                        self._look(readers, hasher, part, (row, tensor, start, elements), masks)
                    if self.meter is not None:
                        self.meter.add(len(self.sides) * elements)
        return part

    def _look(
        self,
        readers: Sequence[SpanReader],
        hasher: ContentHasher,
        part: Part,
        piece: tuple[int, int, int, int],
        masks: Sequence[Bytes],
    ) -> None:
        row, tensor, start, elements = piece
        marked = [np.unpackbits(mask, count=elements, bitorder="little") for mask in masks]
        votes = np.zeros(elements, np.uint8)
        for flags in marked:
            votes += flags
        shared = np.flatnonzero(votes > 1)
        values = []
        for side, reader in enumerate(readers):
            at = int(self.index[side, tensor])
            dtype = self.sides[side].table.dtypes[at]
            bits = DTYPES[dtype].bits
            begin, size = start * bits // 8, np.array([elements * bits // 8], np.int64)
            where = np.array([at], np.int64), np.array([begin], np.int64), size
            data = views(reader.acquire(*where), size)[0]
            hasher.add(part.sums[side, row], data, begin, bits)
            values.append(_values(data, dtype, shared))
            reader.release()
        moved = [_sign(values[0], value, len(shared)) for value in values[1:]]
        for pair, (a, b) in enumerate(self.pairs):
            both = (marked[a][shared] & marked[b][shared]).view(np.bool_)
            product = moved[a][both] * moved[b][both]
            same, opposite = (int(np.count_nonzero(product == way)) for way in (1, -1))
            part.counts[row, pair] += [same, opposite, len(product) - same - opposite]


def _pieces(window: MaskSpans) -> Iterator[tuple[int, int, int, list[int]]]:
    """Tensor, first element, elements, and where each store's bits begin: a piece at a time."""
    spans = window.spans
    columns = zip(
        spans.tensors.tolist(), spans.starts.tolist(), spans.elements.tolist(),
        window.places.T.tolist(), strict=True,
    )  # fmt: skip
    for tensor, start, elements, places in columns:
        for at in range(0, elements, _PIECE):
            size = min(_PIECE, elements - at)
            yield tensor, start + at, size, [place + at // 8 for place in places]


def _values(data: Bytes, dtype: str, chosen: npt.NDArray[np.intp]) -> npt.NDArray[Any] | None:
    """Some elements as numbers that compare exactly; None where the dtype has none."""
    form = DTYPES[dtype]
    if not form.numeric:
        return None
    if form.kind != "float" or dtype in ("F32", "F64"):
        kind: Any = f"<{ {'int': 'i', 'uint': 'u'}.get(form.kind, 'f') }{form.bits // 8}"
        numbers: npt.NDArray[Any] = data.view(kind)[chosen]
        return numbers
    narrow = np.ascontiguousarray(data.view(f"<u{form.bits // 8}")[chosen])
    out = np.empty(len(narrow), np.float32)
    widen(narrow.view(np.uint8), dtype, "F32", out.view(np.uint8))
    return out


def _sign(
    base: npt.NDArray[Any] | None, tuned: npt.NDArray[Any] | None, size: int
) -> npt.NDArray[np.int8]:
    """1 where the tuned value is larger, -1 where it is smaller, 0 for neither.

    Both sides are floats, or of one dtype: a comparison of two float dtypes is exact.
    """
    if base is None or tuned is None:
        return np.zeros(size, np.int8)
    with np.errstate(invalid="ignore"):  # of a NaN
        found: npt.NDArray[np.int8] = (tuned > base).astype(np.int8) - (tuned < base)
    return found


def _places(matched: Matched, sides: Sequence[Checkpoint]) -> IntArray:
    """Where each side has each tensor; -1 for tensors that no two stores changed.

    Raises PairingError for one that a side lacks.
    """
    index = np.full((len(sides), len(matched.names)), -1, np.int64)
    several = np.flatnonzero((matched.changed > 0).sum(0) > 1)
    for k, side in enumerate(sides):
        places = {name: i for i, name in enumerate(side.table.names)}
        for i in several.tolist():
            name = matched.names[i]
            at = places.get(name, -1)
            found = side.table.shapes[at] if at >= 0 else None
            wrong = misfit(
                printable(side.label), name, found, matched.shapes[i], resized=i in matched.resized
            )
            if wrong is not None:
                which = "--base" if k == 0 else "--tuned"
                raise PairingError(wrong, hint=f"give {which} the checkpoint of the run")
            index[k, i] = at
    return index


def _verify(
    matched: Matched, sides: Sequence[Checkpoint], index: IntArray, sums: npt.NDArray[np.uint64]
) -> None:
    """Raise CheckpointError where a side is not what its stores were made from."""
    elements = matched.layout.elements.tolist()
    for k, side in enumerate(sides):
        for i in np.flatnonzero(index[k] >= 0).tolist():
            bits = DTYPES[side.table.dtypes[int(index[k, i])]].bits
            low, high = sums[k, i].tolist()
            digest = hashing.finish(low, high, elements[i] * bits // 8)
            for store in range(len(matched.stores)) if k == 0 else [k - 1]:
                table, at = matched.stores[store].table, int(matched.positions[store, i])
                wanted = content_of((table.base_hashes if k == 0 else table.tuned_hashes)[at])
                if is_content_hash(wanted) and wanted != digest:
                    name = "base" if k == 0 else "tuned"
                    raise CheckpointError(
                        f"{printable(side.label)} is not the {name} side of "
                        f"{printable(str(matched.stores[store].path))}: "
                        f"{printable(matched.names[i])} has other content",
                        hint=f"give --{name} the checkpoint that the store was made from",
                    )


def found_near(matched: Matched, base: Given) -> list[str] | None:
    """The tuned checkpoints of the stores, by what these say of them; None where one is not found.

    A store says the last parts of a path: they are looked for in the current directory, beside the
    store and beside the base, and above them by as many directories as there are parts. What is
    found is held against the content hashes, so that another checkpoint of that name is an error
    and not a wrong number.
    """
    found = []
    for store in matched.stores:
        side = store.manifest.get("tuned")
        label = str(side.get("label", "")) if isinstance(side, dict) else ""
        folders = [os.getcwd(), os.path.dirname(os.path.abspath(store.path))]
        if isinstance(base, (str, os.PathLike)) and "://" not in os.fspath(base):
            folders.append(os.path.dirname(os.path.abspath(os.fspath(base))))
        existing = [path for path in _places_of(label, folders) if label and os.path.exists(path)]
        if not existing:
            return None
        found.append(existing[0])
    return found


def _places_of(label: str, folders: Sequence[str]) -> Iterator[str]:
    for above in range(len(label.split("/"))):
        for folder in folders:
            yield os.path.normpath(os.path.join(folder, *[os.pardir] * above, label))
