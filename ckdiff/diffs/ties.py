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
from ckdiff.layout import IntArray
from ckdiff.stores.table import MaskTable, is_content_hash

_WINDOW = 1 << 20  # bytes that are compared at a time
_FIRST = 1 << 12  # bytes that are looked at first: nearly all candidates differ there
_SIDES = (("base", "removed"), ("tuned", "added"))


def tied_extras(
    sides: tuple[Checkpoint, Checkpoint], pairing: Pairing
) -> list[dict[str, Any]]:
    """Of the tensors that only one side has those with the bits of another of that side: their
    ``name``, ``same_as`` and ``side``.

    They have at least two dimensions, and not all of their elements are the same. Raises what
    reading raises.
    """
    found = []
    for (word, reason), checkpoint, index in zip(
        _SIDES, sides, (pairing.base_index, pairing.tuned_index), strict=True
    ):
        extra = [u.name for u in pairing.unpaired if u.reason == reason]
        twins = _twins(checkpoint, pairing, index, extra, word)
        found += [{"name": name, "same_as": other, "side": word} for name, other in twins]
    return found


def _twins(
    checkpoint: Checkpoint, pairing: Pairing, index: IntArray, extra: Sequence[str], side: str
) -> list[tuple[str, str]]:
    table = checkpoint.table
    if not extra:
        return []
    at = _positions(pairing, checkpoint, extra, side)
    alike: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    wanted = {(table.dtypes[i], table.shapes[i]) for i in at.values() if _eligible(table.shapes[i])}
    for name, i in [*zip(pairing.names, index.tolist(), strict=True), *at.items()]:
        if (key := (table.dtypes[i], table.shapes[i])) in wanted:
            alike[key].append((i, name))
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
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


def _positions(
    pairing: Pairing, checkpoint: Checkpoint, names: Sequence[str], side: str
) -> dict[str, int]:
    """Where the table has the tensors of these names, which renaming may have changed."""
    positions = pairing.tuned_at if side == "tuned" else None
    if positions is None:
        positions = {name: i for i, name in enumerate(checkpoint.table.names)}
    return {name: positions[name] for name in names}


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


def tied_pairs(table: MaskTable) -> list[tuple[str, str]]:
    """Compared tensors that have the content of an earlier one on both sides, with its name."""
    first: dict[Any, str] = {}
    found = []
    for i, name in enumerate(table.names):
        hashes = table.base_hashes[i], table.tuned_hashes[i]
        if not _eligible(table.shapes[i]) or not all(map(is_content_hash, hashes)):
            continue
        key = (*hashes, table.shapes[i], table.dtypes[i])
        if (other := first.setdefault(key, name)) != name:
            found.append((name, other))
    return found
