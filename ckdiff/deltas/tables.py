"""What the tables of a delta say of each tensor, held against each other and the manifest.

A delta's digests can be made anew by anybody. So nothing that is said twice may differ, and
everything that a delta is to fill must be there before any of it is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.parts import Tensors, called
from ckdiff.deltas.ranges import Ranges
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.layout import bits_of


def check_tables(
    manifest: dict[str, Any],
    ranges: Ranges,
    blueprint: Blueprint,
    windows: Windows,
    tensors: Tensors,
    sizes: IntArray,
) -> None:
    """Raise ValueError where the tables contradict each other; ``sizes`` are the windows' frames.

    The manifest is one that ``read_manifest`` gave.
    """
    if len(set(blueprint.names)) != len(blueprint.names):
        raise ValueError("two of its files have a tensor of the same name")
    _check_unpaired(manifest["unpaired"], blueprint, tensors.based)
    bits = bits_of(blueprint.dtypes)
    elements = blueprint.nbytes * 8 // bits
    based, changed = tensors.based, tensors.changed
    same = (tensors.base_hashes == tensors.tuned_hashes).all(axis=1)
    filled = np.bincount(windows.tensor[sizes > 0], minlength=len(based))
    totals = np.diff(np.concatenate(([0], np.cumsum(sizes)))[windows.first])
    encoding = ENCODINGS[manifest["encoding"]]
    counted, whole = based & encoding.counted(bits), encoding.whole(bits)
    wrong = {
        "counts other new elements than it can have": (ranges.fresh > changed)
        | (changed - ranges.fresh > ranges.elements),
        "has a count of changes that it cannot have": (changed < 0)
        | (changed > np.where(based, elements, 0)),
        "has hashes of a base that it does not have": ~based & tensors.base_hashes.any(axis=1),
        "changed and is the same, or the other way round": based
        & ~ranges.grown
        & (same != (changed == 0)),
        "has other changes than it counts": based
        & (((filled > 0) != (changed > 0)) | (filled > changed) & ~whole)
        | counted & (totals != changed),
        "has no base, and is not all there": ~based & (filled != np.diff(windows.first)),
    }
    for problem, where in wrong.items():
        if where.any():
            raise ValueError(f"{called(blueprint.names[int(where.argmax())])} {problem}")
    _check_counts(manifest, ranges, changed)


def _check_counts(manifest: dict[str, Any], ranges: Ranges, changed: IntArray) -> None:
    if manifest["elements"] != int(ranges.elements.sum()):
        raise ValueError("it counts other elements than its tensors have")
    if manifest["changed"] != int(changed.sum() - ranges.fresh.sum()):
        raise ValueError("it counts other changes than its tensors do")


def _check_unpaired(
    listed: list[dict[str, Any]], blueprint: Blueprint, based: npt.NDArray[np.bool_]
) -> None:
    """The tensors without a base must be those that are listed as such, and as they are."""
    alone = {blueprint.names[i]: i for i in np.flatnonzero(~based).tolist()}
    removed = set[str]()
    for item in listed:
        name = item["name"]
        if item["reason"] == "removed":
            removed.add(name)
            continue
        at = alone.pop(name, -1)
        if at < 0 or (item["tuned_dtype"], item["tuned_shape"]) != (
            blueprint.dtypes[at],
            list(blueprint.shapes[at]),
        ):
            raise ValueError(f"{called(name)} is not one of its tensors without a base")
    if alone:
        raise ValueError(f"{called(next(iter(alone)))} has no base, and no reason for it")
    if not removed.isdisjoint(blueprint.names):
        raise ValueError("a tensor that was removed is there")
