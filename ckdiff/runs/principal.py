"""Masks that a checkpoint alone gives: its principal weights, and its smallest (arXiv:2511.08567).

That paper asks where updates land: on the weights that carry a matrix's leading singular vectors,
or on small ones. Here both are mask stores like any other, so that their overlap with an update,
beside that of a random mask of the same size, is one command.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import ExitStack
from typing import Any, Literal, get_args

from ckdiff.checkpoints.labels import labels
from ckdiff.checkpoints.opening import Given, fetch_all, open_checkpoint, open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import PairingError, UsageError, printable
from ckdiff.options import Observer, checked_int, checked_text
from ckdiff.outputs.checks import check_place
from ckdiff.rules import Rule
from ckdiff.runs.principals.hashing import content_hashes
from ckdiff.runs.principals.making import Chosen, LowMask, PrincipalMask
from ckdiff.runs.structures.result import as_matrix
from ckdiff.runs.values import has_numbers
from ckdiff.stores.building import Derived, Maker, Target
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import Matched, StorePath, match, misfit, several
from ckdiff.stores.seeing import seen_by
from ckdiff.stores.table import UNKNOWN, content_of

Kind = Literal["principal", "low"]


def principal(
    checkpoint: Given,
    out: str | os.PathLike[str],
    *,
    like: StorePath,
    kind: Kind,
    alpha: float,
    rank: int | None = None,
    rule: str | Rule | None = None,
    key: str | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> MaskStore:
    """Write a mask of the principal or of the smallest weights of a checkpoint, with the layout of
    the store ``like``.

    In each matrix (a tensor of more dimensions is its first one times all others) exactly
    ``round(alpha * elements)`` are marked, as Python rounds: a half to the even number. ``low``
    marks those of the smallest \\|w\\|, ``principal`` those of the largest \\|reconstruction\\|
    from the ``rank`` largest singular values, by default the fewest with 90 % of the energy. Ties
    go to the lower address; other tensors are empty. ``principal`` has one matrix and its singular
    vectors in memory. A run that was stopped is resumed by the same call. Raises a CkdiffError.
    """
    # one matrix is in memory at a time; in order, so that none is decomposed twice
    many = 1 if kind == "principal" else workers
    target = Target(out, overwrite=overwrite, workers=many, observer=observer)
    share = _checked(kind, alpha, rank)
    store = open_store(like)
    target.keep_away_from([store])
    matched = match([store], rule, least=1)
    with ExitStack() as stack:
        opened = open_in(stack, checkpoint, lambda given: open_checkpoint(given, key=key))
        check_place(target.out, [opened])
        fetch_all([opened])
        seen = seen_by(matched, opened).checkpoint
        index, without = _index(matched, seen)
        if without:
            target.observer.note(
                f"warning: matrices without numbers, whose masks are empty: {several(without)}"
            )
        chosen = Chosen(seen, index, matched.layout, _wanted(matched, without, share))
        shapes = [as_matrix_of(shape) for shape in matched.shapes]
        low = kind == "low"
        maker: Maker = LowMask(chosen) if low else PrincipalMask(chosen, shapes, rank, memory)
        hashes = content_hashes(seen, index, matched, workers=workers)
        made_by = _made_by(kind, share, rank, matched, hashes, opened)
        return target.write(_derived(matched, hashes, made_by), maker)


def as_matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a tensor that is no matrix is one row."""
    return as_matrix(shape) if len(shape) > 1 else (1, math.prod(shape))


def _checked(kind: object, alpha: object, rank: int | None) -> float:
    """The share. Raises UsageError for what makes no sense."""
    if checked_text("kind", kind) not in get_args(Kind):
        raise UsageError(f"kind must be principal or low, not {printable(repr(kind))}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be a number from 0 to 1, not {printable(repr(alpha))}")
    if rank is not None and checked_int("rank", rank) < 1:
        raise UsageError(f"rank must be at least 1, not {rank}")
    if rank is not None and kind == "low":
        raise UsageError("--kind low has no rank", hint="leave out --rank")
    return float(alpha)


def _index(matched: Matched, checkpoint: Checkpoint) -> tuple[list[int], list[str]]:
    """Where the checkpoint has each tensor, -1 where not; and matrices that have no numbers.

    Raises PairingError for a matrix that it has not, or has in another shape.
    """
    table, without = checkpoint.table, []
    places = {name: i for i, name in enumerate(table.names)}
    index = []
    for i, (name, shape) in enumerate(zip(matched.names, matched.shapes, strict=True)):
        at = places.get(name, -1)
        found = table.shapes[at] if at >= 0 else None
        wrong = misfit(
            printable(checkpoint.label), name, found, shape, resized=i in matched.resized
        )
        if len(shape) > 1 and wrong is not None:
            raise PairingError(wrong, hint="give a checkpoint of the same model as --like")
        if wrong is None and len(shape) > 1 and not has_numbers(table.dtypes[at]):
            without.append(name)
        index.append(at if wrong is None else -1)
    return index, without


def _wanted(matched: Matched, without: list[str], share: float) -> list[int]:
    empty = set(without)
    columns = zip(matched.names, matched.shapes, matched.layout.elements.tolist(), strict=True)
    return [
        round(share * elements) if len(shape) > 1 and name not in empty else 0
        for name, shape, elements in columns
    ]


def _made_by(
    kind: str,
    share: float,
    rank: int | None,
    matched: Matched,
    hashes: list[str],
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    said = json.dumps([matched.names, matched.shapes, hashes]).encode()
    digest = hashlib.sha256(said).hexdigest()[:32]
    found = {
        "operation": kind,
        "rule": matched.rule,
        "alpha": repr(share),
        "like": matched.stores[0].manifest_digest(),
        "files": [{"label": labels(checkpoint, checkpoint)[0], "digest": digest}],
    }
    return found | ({} if rank is None else {"rank": rank})


def _derived(matched: Matched, hashes: list[str], made_by: dict[str, Any]) -> Derived:
    """The base of the mask is the checkpoint; what is of first rows says so as the store does."""
    recorded, store = [], matched.stores[0]
    for i, found in enumerate(hashes):
        said = store.table.base_hashes[int(matched.positions[0][i])]
        if i in matched.resized:
            recorded.append(said if content_of(said) == found else UNKNOWN)
        else:
            recorded.append(found)
    columns = matched.names, matched.dtypes, matched.shapes, matched.layout
    return Derived(*columns, recorded, matched.rule, made_by, matched.resized)
