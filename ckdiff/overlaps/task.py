"""From matched stores to the chunk task of an overlap, here and in the workers of a cluster."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ckdiff.checkpoints.opening import open_recipe
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.sameness import known_by
from ckdiff.dtypes import DTYPES
from ckdiff.errors import ClusterError, PairingError, printable
from ckdiff.overlaps.counting import OverlapTask
from ckdiff.overlaps.nulls.base import Base
from ckdiff.running.remote import SHARE
from ckdiff.stores.matching import Matched, first_rows, match
from ckdiff.stores.seeing import seen_by
from ckdiff.stores.summaries import By, group_index
from ckdiff.stores.table import IntArray, content_of, is_content_hash


def plan(
    matched: Matched, groups: IntArray, counted: tuple[str, ...], base: Checkpoint | None = None
) -> OverlapTask:
    """The chunk task of an overlap; ``groups`` has the group of each tensor.

    Raises PairingError for a base that does not fit.
    """
    return OverlapTask(
        matched.layout,
        matched.starts,
        matched.sources(),
        groups,
        counted,
        matched.dtypes,
        matched.shapes,
        matched.said(),
        None if base is None else _base(matched, base),
    )


def _base(matched: Matched, checkpoint: Checkpoint) -> Base:
    table = checkpoint.table
    place = {name: i for i, name in enumerate(table.names)}
    index = []
    for tensor, (name, dtype) in enumerate(zip(matched.names, matched.dtypes, strict=True)):
        i = place.get(name)
        if i is None or table.dtypes[i] != dtype or not _fits(matched, tensor, table.shapes[i]):
            what = "no" if i is None else "another dtype or shape for"
            raise PairingError(
                f"{printable(checkpoint.label)} has {what} {printable(name)}",
                hint="give --base the checkpoint that the runs started from",
            )
        index.append(i)
    hashes = [matched.base_hash(i) for i in range(len(matched.names))]
    bits = np.array([DTYPES[dtype].bits for dtype in matched.dtypes], np.int64)
    nbytes = matched.layout.elements * bits // 8
    return Base(checkpoint, np.array(index, np.int64), bits, nbytes, hashes, matched.names)


def _fits(matched: Matched, tensor: int, shape: tuple[int, ...]) -> bool:
    """Whether a base's tensor is what a mask is of, or the mask is of its first rows."""
    wanted, rows = matched.shapes[tensor], matched.resized.get(tensor)
    if rows is None:
        return shape == wanted
    return first_rows(shape, wanted) and shape[0] <= rows[0]


def check_one_base(matched: Matched, base: Checkpoint, null: str) -> None:
    """Raise PairingError where ``null`` would count values of another base than a store's.

    Content hashes are verified when the base is read. What a run did not read for being equal on
    both sides has no changed element there, and chance gives none either, whatever the values are;
    but a store derived from it may have some, and then only the hash of the base's file tells.
    """
    place = {name: i for i, name in enumerate(base.table.names)}
    for i, (name, recorded) in enumerate(
        zip(matched.names, zip(*matched.recorded, strict=True), strict=True)
    ):
        contents = set(map(content_of, recorded))
        if len(contents) == 1 and is_content_hash(recorded[0]):
            continue
        if len(set(filter(is_content_hash, contents))) > 1:
            raise PairingError(
                f"the null {null} needs stores with one base, but these differ in "
                f"{printable(name)}",
                hint="leave out the stores that started from another checkpoint",
            )
        for store, text, changed in zip(
            matched.stores, recorded, matched.changed[:, i].tolist(), strict=True
        ):
            if not changed or is_content_hash(text):
                continue
            if text and name in place and text == known_by(base, place[name]):
                continue
            raise PairingError(
                f"{printable(str(store.path))} was made from a run that did not read "
                f"{printable(name)}: whether {printable(base.label)} is its base is not known",
                hint="repeat that run with diff --verify",
            )


@dataclass(frozen=True, slots=True)
class OverlapRecipe:
    """What another process needs to make the same task. What it reads of ``base`` is verified."""

    stores: tuple[tuple[str, str], ...]  #: absolute path, and the manifest's digest
    rule: str
    by: By
    counted: tuple[str, ...]
    base: str | None  #: how it is opened

    def make(self, stack: ExitStack) -> OverlapTask:
        """See Recipe."""
        matched = match([path for path, _ in self.stores], self.rule)
        for store, (_, digest) in zip(matched.stores, self.stores, strict=True):
            if store.manifest_digest() != digest:
                raise ClusterError(
                    f"{printable(str(store.path))} is a different store on a worker than here",
                    hint=SHARE,
                )
        base = None
        if self.base is not None:
            base = seen_by(matched, stack.enter_context(open_recipe(self.base))).checkpoint
        _, groups = group_index(matched.names, matched.dtypes, self.by)
        return plan(matched, groups, self.counted, base)
