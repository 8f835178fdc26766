"""Tensors of one side that hold the bits of another of the same side.

A head that shares its weights with the embedding is one tensor in some checkpoints and two in
others. Only candidates are read: those of the same dtype and shape, and of these as much as it
takes to tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from ckdiff.checkpoints.pairing import Pairing
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.diffs.twins import Twins, constant
from ckdiff.errors import printable
from ckdiff.stores.table import MaskTable, is_content_hash

_FEW = 3  # notes that each have a line
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
    wanted = {(table.dtypes[i], table.shapes[i]) for i in at.values() if _eligible(table.shapes[i])}
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
    if not wanted:
        return []
    like = [
        (i, n) for n, i in [*paired, *at.items()] if (table.dtypes[i], table.shapes[i]) in wanted
    ]
    with closing(checkpoint.reader()) as reader:
        twins = Twins(checkpoint, reader)
        twins.add(like)
        for name, i in at.items():
            if (table.dtypes[i], table.shapes[i]) not in wanted:
                continue
            twin = twins.of(i, taken)
            size = int(table.nbytes[i])
            if twin is not None and not constant(reader, i, size, table.shapes[i]):
                found.append((name, twin))
                taken.add(name)
    return found


def tie_notes(tied: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A line on the extras of one side, and one on what is tied on both; a few by name."""
    said = [(t["name"], t["same_as"], f", only in {t['side']},") for t in tied]
    yield from _notes(said, "they are tied")
    both = [(name, other, "") for name, other in pairs]
    yield from _notes(both, "they are tied, and counted twice", " on both sides")


def _notes(said: Sequence[tuple[str, str, str]], end: str, where: str = "") -> Iterator[str]:
    """Each by itself where there are few, else all in one line."""
    if len(said) <= _FEW:
        for name, other, aside in said:
            text = f"{printable(name)}{aside} has the same bits as {printable(other)}{where}: {end}"
            yield f"note: {text}"
        return
    name, other, aside = said[0]
    yield (
        f"note: {len(said):,} tensors have the same bits as another{where}: {end}; the first is "
        f"{printable(name)}{aside} which is {printable(other)}"
    )


def _eligible(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and 0 not in shape


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
            if not constant(reader, int(at[i]), int(sizes[at[i]]), base.table.shapes[at[i]])
        ]
