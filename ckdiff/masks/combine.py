"""Set algebra on mask stores: which elements changed in all, some, one or an odd number of runs."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.errors import CkdiffError, UsageError, one_of, printable
from ckdiff.kernels import counting
from ckdiff.kernels.abi import SEG_TARGET
from ckdiff.layout import ALIGNMENT, Spans
from ckdiff.naming import OPERATIONS
from ckdiff.options import Observer, checked_text
from ckdiff.rules import Rule
from ckdiff.running.memory import Need
from ckdiff.stores.building import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.maskstream import MaskSource
from ckdiff.stores.maskwalk import walk, working_memory
from ckdiff.stores.matching import Matched, StorePath, match
from ckdiff.stores.table import UNKNOWN, IntArray, content_of, hash_of_rows
from ckdiff.stores.tally import Tally, recount


@dataclass(frozen=True, slots=True)
class Operation:
    """What an element's votes decide."""

    text: str  #: as in the manifest
    kernel: str  #: kind of the ``combine`` kernel
    threshold: int  #: votes that are needed, where they are counted

    @classmethod
    def parse(cls, text: str, stores: int) -> Operation:
        """``at-least=2`` for that many stores; raises UsageError."""
        text = checked_text("the operation", text)
        if text == "difference":
            return cls(text, "difference", 0)
        if text == "symmetric-difference":
            return cls(text, "odd", 0)
        counting = f"at-least:{stores.bit_length()}"  # digits of the largest number of votes
        if text == "intersection":
            return cls(text, counting, stores)
        if text == "union":
            return cls(text, counting, 1)
        least = re.fullmatch(r"at-least=([0-9]{1,9})", text, re.ASCII)
        if least is None:
            raise UsageError(
                f"there is no operation {printable(text)!r}", hint=one_of(text, OPERATIONS)
            )
        threshold = int(least[1])
        if not 1 <= threshold <= stores:
            raise UsageError(
                f"at-least={threshold} makes no sense with {stores} stores",
                hint=f"give a number from 1 to {stores}",
            )
        return cls(f"at-least={threshold}", counting, threshold)


def combine(
    operation: str,
    stores: Sequence[StorePath],
    out: str | os.PathLike[str],
    *,
    rule: str | Rule | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> MaskStore:
    """Combine the masks of 2 to 64 stores into a new store at ``out``, in bounded memory.

    ``operation`` is ``intersection``, ``union``, ``difference`` (the first without all others),
    ``symmetric-difference`` (an odd number of votes) or ``at-least=K``. Tensors are matched by name
    and shape. A run that was stopped is resumed by the same call. Raises a CkdiffError: UsageError,
    PairingError, StoreExists, StoreCorrupt and others of :mod:`ckdiff.errors`.
    """
    target = Target(out, overwrite=overwrite, workers=workers, observer=observer)
    matched = match(stores, rule)
    chosen = Operation.parse(operation, len(matched.stores))
    target.keep_away_from(matched.stores)
    base_hashes = _base_hashes(matched)
    for note in matched.notes():
        target.observer.note(note)
    made_by: dict[str, Any] = {
        "operation": chosen.text,
        "rule": matched.rule,
        "stores": [
            {"label": Path(os.path.abspath(store.path)).name, "digest": store.manifest_digest()}
            for store in matched.stores
        ],
        "left_out": matched.left_out,
    }
    derived = Derived(
        matched.names,
        matched.dtypes,
        matched.shapes,
        matched.layout,
        base_hashes,
        matched.rule,
        made_by,
        matched.resized,
    )
    return target.write(derived, Combination(matched, chosen))


class Combination(Maker):
    """Several masks in, one out."""

    def __init__(self, matched: Matched, operation: Operation) -> None:
        self._said = matched.said()
        self._counted = Tally(self._said)
        self._lock = threading.Lock()
        self._layout = matched.layout
        self._starts = matched.starts
        self._sources: list[MaskSource] = self._said.sources
        self._operation = operation
        self.total = len(self._sources) * matched.layout.total // 8
        self.need = Need(tables=0, worker=working_memory(len(self._sources)))

    def prepare(
        self, chunks: Sequence[int], workers: int, tick: Callable[[], None], done: OnBytes
    ) -> None:
        """See Maker. Of chunks that are done already, the inputs' tensors that go on in others are
        counted again: only as a whole can they be held against their counts.
        """
        layout = self._layout
        again = []
        for chunk in sorted(set(range(layout.chunks)) - set(chunks)):
            first, end = layout.chunk_range(chunk)
            spans = layout.spans(first, end)
            parts = spans.elements < layout.elements[spans.tensors]
            padded = -(-spans.elements // ALIGNMENT) * ALIGNMENT
            begins = spans.addresses[parts]
            again += list(zip(begins.tolist(), (begins + padded[parts]).tolist(), strict=True))
        recount(self._said, self._starts, again, self._counted)

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker. Raises StoreCorrupt, also where an input's bits are not as many as it says."""
        tally = Tally(self._said)
        stores, layout = len(self._sources), self._layout
        end = min(first + layout.chunk, layout.total)
        for window in walk(layout, self._starts, self._sources, first, end):
            tally.add(window)
            rows = np.searchsorted(spans.tensors, window.spans.tensors)
            segments = window.segments(rows)
            places = (window.spans.addresses - first) // 8
            if len(segments) != len(places):  # each tensor has its own row, so none are merged
                raise CkdiffError("masks to combine were cut otherwise", hint="please report it")
            segments[:, SEG_TARGET] = places
            kind, threshold = self._operation.kernel, self._operation.threshold
            counting.combine(kind, segments, window.memory, threshold, mask, changed)
            done(stores * int(window.sizes.sum()))
            yield int(places[-1] + window.sizes[-1])
        with self._lock:
            self._counted.join(tally.waiting)


def _base_hashes(matched: Matched) -> list[str]:
    """What each shared tensor started from where all stores agree about it, else UNKNOWN."""
    found, disputed = [], {*matched.other_base, *matched.unknown_base}
    columns = zip(*matched.recorded, strict=True)
    for i, (name, hashes) in enumerate(zip(matched.names, columns, strict=True)):
        contents = set(map(content_of, hashes))
        if len(contents) == 1:
            text = contents.pop()
        else:
            text = UNKNOWN if name in disputed else matched.base_hash(i)
        if text and i in matched.resized:
            text = hash_of_rows(text, matched.shapes[i][0], matched.resized[i][0])
        found.append(text)
    return found
