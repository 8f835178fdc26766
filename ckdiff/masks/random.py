"""Random masks: as many changed elements as in another store, anywhere. The control for overlaps.

A first pass over the chunks finds the limits of what is sampled, a second draws; see sampling.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ckdiff.budget import usable_cores
from ckdiff.errors import CkdiffError, StoreCorrupt, UsageError, printable
from ckdiff.kernels.abi import LANES
from ckdiff.layout import Layout, Spans
from ckdiff.masks.sampling import Population, Seen, memory
from ckdiff.options import Observer, checked_int, checked_text
from ckdiff.rules import Rule
from ckdiff.running.threads import Stopped, run_threads
from ckdiff.stores.building import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.maskwalk import walk
from ckdiff.stores.matching import StorePath, match
from ckdiff.stores.table import IntArray, MaskTable
from ckdiff.stores.tally import Tally, Waiting

Within = Literal["tensor", "model"]

_SEEDS = 1 << 64
_WINDOW = 1 << 22  # elements drawn between two looks at whether to stop


def random_mask(
    like: StorePath,
    out: str | os.PathLike[str],
    *,
    seed: int,
    within: Within = "tensor",
    rule: str | Rule | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> MaskStore:
    """Write a random mask with exactly as many changed elements as the store ``like``.

    The number is kept in each tensor, or with ``within="model"`` only in all of them together.
    Every such mask is equally likely; which one it is depends on the seed, names, sizes and counts,
    and on nothing else. A run that was stopped is resumed by the same call. Raises a CkdiffError.
    """
    target = Target(out, overwrite=overwrite, workers=workers, observer=observer)
    seed = int(checked_int("seed", seed))
    if not 0 <= seed < _SEEDS:
        raise UsageError(f"seed must be from 0 to 2**64 - 1, not {seed}")
    if checked_text("within", within) not in get_args(Within):
        raise UsageError(f"within must be tensor or model, not {printable(within)!r}")
    store = open_store(like)
    target.keep_away_from([store])
    text = _counted_rule(store, rule)
    table = store.table
    layout = Layout(table.elements)
    changed = table.changed[text]
    if (changed < 0).any() or (changed > table.elements).any():
        raise StoreCorrupt(f"{printable(str(store.path))} counts more changed elements than it has")
    _require_counts(store, text, workers or usable_cores())
    populations = _populations(table, changed, seed, within)
    made_by: dict[str, Any] = {
        "operation": "random",
        "rule": text,
        "seed": seed,
        "within": within,
        "like": store.manifest_digest(),
    }
    columns = table.names, table.dtypes, table.shapes, layout, table.base_hashes
    derived = Derived(*columns, text, made_by, table.resized)
    return target.write(derived, RandomMask(layout, populations, by_tensor=within == "tensor"))


def _populations(
    table: MaskTable, changed: IntArray, seed: int, within: Within
) -> list[Population]:
    """What is drawn from: each tensor, or the model."""
    if within == "model":
        return [Population(seed, "model", table.total_elements, int(changed.sum()))]
    columns = zip(table.names, table.elements.tolist(), changed.tolist(), strict=True)
    return [Population(seed, f"tensor {name}", n, k) for name, n, k in columns]


def _counted_rule(store: MaskStore, rule: str | Rule | None) -> str:
    """The rule whose counts are kept; the store need not hold its mask."""
    shown = printable(str(store.path))
    if rule is not None:
        text = str(Rule.parse(rule))
        if text in store.rules:
            return text
        known = ", ".join(store.rules)
        raise UsageError(f"{shown} has no counts for the rule {text}", hint=f"it has {known}")
    if "exact" in store.masks or len(store.masks) == 1:
        return "exact" if "exact" in store.masks else store.masks[0]
    raise UsageError(
        f"{shown} has several masks", hint=f"name one of {', '.join(store.masks)} with --rule"
    )


def _require_counts(store: MaskStore, rule: str, workers: int) -> None:
    """Raise StoreCorrupt unless the store has the ones that it counts.

    A store can count many ones and hold none: then a few bytes of it would ask for a large mask. Of
    a rule that was only counted nothing can be said but that the store's masks are sound.
    """
    matched = match([store], rule if rule in store.masks else store.masks[0], least=1)
    said, layout = matched.said(), matched.layout
    tally = Tally(said)

    def count(chunk: int, stop: threading.Event) -> Waiting:
        part = Tally(said)
        for window in walk(layout, matched.starts, said.sources, *layout.chunk_range(chunk)):
            if stop.is_set():
                raise Stopped
            part.add(window)
        return part.waiting

    def join(chunk: int, waiting: Waiting) -> None:
        tally.join(waiting)

    run_threads(range(layout.chunks), count, workers=max(1, min(workers, layout.chunks)), done=join)


@dataclass(slots=True)
class _Window:
    """Some addresses of a chunk; columns are the pieces of tensors in them."""

    end: int  #: address
    rows: IntArray  #: which of the chunk's spans
    populations: list[int]
    words: list[int]  #: first mask word of the piece, counted in its population
    elements: list[int]
    places: list[int]  #: first byte of the chunk's mask


class RandomMask(Maker):
    """Draws the masks of populations: each a tensor, or one that is the model."""

    def __init__(
        self, layout: Layout, populations: Sequence[Population], *, by_tensor: bool
    ) -> None:
        self._layout = layout
        self._populations = populations
        self._by_tensor = by_tensor
        self._pending: set[int] = set()
        self.total = 2 * layout.total // 8
        self.need = memory(populations)

    # the first pass

    def prepare(
        self, chunks: Sequence[int], workers: int, tick: Callable[[], None], done: OnBytes
    ) -> None:
        """Find the limits of the populations that lie in ``chunks``."""
        if not chunks:
            return
        layout = self._layout
        if self._by_tensor:
            touched = (layout.spans(*layout.chunk_range(chunk)).tensors for chunk in chunks)
            wanted = set(np.concatenate(list(touched)).tolist())
        else:
            wanted = {0}
        while pending := {i for i in wanted if self._unsettled(i)}:
            self._find_limits(pending, workers, tick, done)
            done = _ignore  # looking again, where a limit was not found, is no progress

    def _find_limits(
        self, pending: set[int], workers: int, tick: Callable[[], None], done: OnBytes
    ) -> None:
        """Look at every element of the pending populations once."""
        self._pending = pending
        waiting: dict[int, Seen] = {}

        def survey(chunk: int, stop: threading.Event) -> dict[int, Seen]:
            return self._survey(chunk, stop, done)

        def gather(chunk: int, found: dict[int, Seen]) -> None:
            for i, seen in found.items():
                so_far = waiting.setdefault(i, Seen(0, 0, []))
                so_far.add(seen)
                if self._settled(i, so_far):
                    del waiting[i]

        run_threads(self._chunks_of(pending), survey, workers=workers, done=gather, tick=tick)

    def _unsettled(self, i: int) -> bool:
        population = self._populations[i]
        return population.limit is None and population.changed > 0

    def _chunks_of(self, pending: set[int]) -> list[int]:
        layout = self._layout
        if not self._by_tensor:
            return list(range(layout.chunks))
        index = sorted(pending)
        low = layout.starts[index] // layout.chunk
        high = (layout.starts[index] + layout.elements[index] - 1) // layout.chunk
        return sorted({c for a, b in zip(low.tolist(), high.tolist(), strict=True)
                       for c in range(a, b + 1)})  # fmt: skip

    def _survey(self, chunk: int, stop: threading.Event, done: OnBytes) -> dict[int, Seen]:
        """What the chunk holds of pending populations that go on in other chunks."""
        first, _ = self._layout.chunk_range(chunk)
        spans = self._layout.spans(*self._layout.chunk_range(chunk))
        found: dict[int, Seen] = {}
        begin = first
        for window in self._windows(first, spans):
            if stop.is_set():
                raise Stopped
            for i, word, elements in zip(
                window.populations, window.words, window.elements, strict=True
            ):
                if i in self._pending:
                    seen = found.pop(i, None) or Seen(0, 0, [])
                    seen.add(self._populations[i].look(word, elements))
                    if not self._settled(i, seen):  # small tensors are at once
                        found[i] = seen
            done((window.end - begin) // 8)
            begin = window.end
        return found

    def _settled(self, i: int, seen: Seen) -> bool:
        """Whether that was the whole population; then its limit is known, or will be sought anew.

        Called by one thread only: a population is whole either in one chunk or in ``prepare``.
        """
        population = self._populations[i]
        if seen.elements < population.elements:
            return False
        population.settle(seen.below, np.concatenate(seen.keys))
        return True

    # the second pass

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        begin = first
        for window in self._windows(first, spans):
            counts = [
                self._populations[i].draw(word, elements, mask[place:])
                for i, word, elements, place in zip(
                    window.populations, window.words, window.elements, window.places, strict=True
                )
            ]
            changed[window.rows] += np.array(counts, np.int64)
            done((window.end - begin) // 8)
            begin = window.end
            yield (window.end - first) // 8

    def verify(self, changed: IntArray) -> None:
        """See Maker: the numbers are exact, or there is a bug."""
        expected = [population.changed for population in self._populations]
        drawn = changed.tolist() if self._by_tensor else [int(changed.sum())]
        if drawn != expected:
            raise CkdiffError(
                f"a random mask must have exactly {sum(expected):,} changed elements, and "
                f"{sum(drawn):,} were drawn",
                hint="please report it",
            )

    def _windows(self, first: int, spans: Spans) -> Iterator[_Window]:
        end = min(first + self._layout.chunk, self._layout.total)
        for start in range(first, end, _WINDOW):
            stop = min(start + _WINDOW, end)
            inside = self._layout.spans(start, stop)
            own = inside.starts if self._by_tensor else inside.addresses
            yield _Window(
                stop,
                np.searchsorted(spans.tensors, inside.tensors),
                inside.tensors.tolist() if self._by_tensor else [0] * len(inside),
                (own // LANES).tolist(),
                inside.elements.tolist(),
                ((inside.addresses - first) // 8).tolist(),
            )


def _ignore(amount: int) -> None:
    """What ``done`` is where nobody wants to know."""
