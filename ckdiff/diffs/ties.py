"""Tensors of one side that hold the bits of another of the same side.

A head that shares its weights with the embedding is one tensor in some checkpoints and two in
others. Only candidates are read: those of the same dtype and shape, and of these as much as it
takes to tell them apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from ckdiff.checkpoints.pairing import Pairing
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.kernels.memory import views
from ckdiff.stores.table import MaskTable, is_content_hash

_WINDOW = 1 << 20  # bytes that are compared at a time
_FIRST = 1 << 12  # bytes that are looked at first: nearly all candidates differ there
_SIDES = (("base", "removed"), ("tuned", "added"))


def tied_extras(
    sides: tuple[Checkpoint, Checkpoint], pairing: Pairing, tuned_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Of the tensors that only one side has those with the bits of another of that side: their
    ``name``, ``same_as`` and ``side``.

    They have at least two dimensions, and not all of their elements are the same. Raises what
    reading raises.
    """
    found = []
    columns = (sides[0].table.names, tuned_names), (pairing.base_index, pairing.tuned_index)
    for (word, reason), checkpoint, names, index in zip(_SIDES, sides, *columns, strict=True):
        extra = {u.name for u in pairing.unpaired if u.reason == reason}
        at = {name: i for i, name in enumerate(names) if name in extra} if extra else {}
        if not at:
            continue
        # what is there on both sides, and of another shape or dtype, may be whose bits they are
        both = {u.name for u in pairing.unpaired if u.reason in ("reshaped", "retyped")}
        pairs = [*zip(pairing.names, index.tolist(), strict=True)]
        pairs += [(name, i) for i, name in enumerate(names) if name in both]
        twins = _twins(checkpoint, at, pairs)
        found += [{"name": name, "same_as": other, "side": word} for name, other in twins]
    return found


def _twins(
    checkpoint: Checkpoint, at: dict[str, int], paired: list[tuple[str, int]]
) -> list[tuple[str, str]]:
    """Of the tensors ``at`` these positions those with the bits of another, and its name."""
    table = checkpoint.table
    alike: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    wanted = {(table.dtypes[i], table.shapes[i]) for i in at.values() if _eligible(table.shapes[i])}
    for name, i in [*paired, *at.items()]:
        if (key := (table.dtypes[i], table.shapes[i])) in wanted:
            alike[key].append((i, name))
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
    if not wanted:
        return []
    with closing(checkpoint.reader()) as reader:
        for name, i in at.items():
            others = alike.get((table.dtypes[i], table.shapes[i]), [])
            size = int(table.nbytes[i])
            twin = next(
                (
                    other
                    for j, other in others
                    if j != i and other not in taken and _same_bits(reader, i, j, size)
                ),
                None,
            )
            if twin is not None and not _constant(reader, i, size, table.shapes[i]):
                found.append((name, twin))
                taken.add(name)
    return found


def _eligible(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and 0 not in shape


def _same_bits(reader: SpanReader, one: int, other: int, size: int) -> bool:
    start, step = 0, _FIRST
    while start < size:
        count = min(step, size - start)
        tensors, starts = np.array([one, other], np.int64), np.full(2, start, np.int64)
        nbytes = np.full(2, count, np.int64)
        first, second = views(reader.acquire(tensors, starts, nbytes), nbytes)
        same = np.array_equal(first, second)
        reader.release()
        if not same:
            return False
        start, step = start + count, _WINDOW
    return True


def _constant(reader: SpanReader, tensor: int, size: int, shape: tuple[int, ...]) -> bool:
    """Whether all elements of a tensor have the same bits."""
    width = max(1, size // int(np.prod(shape, dtype=np.int64)))
    pattern, start = None, 0
    step = _WINDOW // width * width
    while start < size:
        count = min(step, size - start)
        columns = (np.array([value], np.int64) for value in (tensor, start, count))
        tensors, starts, nbytes = columns
        (data,) = views(reader.acquire(tensors, starts, nbytes), nbytes)
        pattern = data[:width].copy() if pattern is None else pattern
        same = bool((data.reshape(-1, width) == pattern).all())
        reader.release()
        if not same:
            return False
        start += count
    return True


def tied_pairs(table: MaskTable, base: Checkpoint, pairing: Pairing) -> list[tuple[str, str]]:
    """Compared tensors that have the content of an earlier one on both sides, with its name.

    What all of whose elements are the same is not counted: it is read from ``base`` to know that.
    """
    first: dict[Any, str] = {}
    found: list[tuple[int, str]] = []
    if len(set(table.base_hashes)) == len(table.base_hashes):
        return []
    for i, name in enumerate(table.names):
        hashes = table.base_hashes[i], table.tuned_hashes[i]
        if not _eligible(table.shapes[i]) or not all(map(is_content_hash, hashes)):
            continue
        other = first.setdefault((*hashes, table.shapes[i], table.dtypes[i]), name)
        if other != name:
            found.append((i, other))
    if not found:
        return []
    with closing(base.reader()) as reader:
        sizes, at = base.table.nbytes, pairing.base_index
        return [
            (table.names[i], other)
            for i, other in found
            if not _constant(reader, int(at[i]), int(sizes[at[i]]), base.table.shapes[at[i]])
        ]
