"""A mask file -> a mask store: masks made elsewhere enter overlaps, set algebra and training.

The bits are first gathered, one tensor after the other, and encoded from there: see staging. What
the file says about sizes is believed only as far as its bytes go.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import fetch_all, open_all
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, PairingError, UsageError, printable
from ckdiff.layout import Layout, Spans
from ckdiff.masks.exporting.masks import CHANGED, FROZEN, text_label
from ckdiff.masks.importing.contenthashes import content_hashes
from ckdiff.masks.importing.maskfile import (
    Item,
    MaskFile,
    Notes,
    Shape,
    digest_of,
    shown,
)
from ckdiff.masks.importing.opening import open_mask_file
from ckdiff.masks.importing.staging import Staging
from ckdiff.naming import natural_key
from ckdiff.options import Observer, checked_path
from ckdiff.outputs.checks import check_disk, check_place
from ckdiff.rules import Rule
from ckdiff.running.memory import Need
from ckdiff.running.runners import interruptible
from ckdiff.stores.building import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.table import UNKNOWN, IntArray
from ckdiff.stores.workdir import check_early, store_errors

_MOST_DECLARED = 1 << 36  # elements of a tensor of which only positions are there
_MOST = 1 << 42  # elements in all


def import_masks(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rule: str | Rule | None = None,
    invert: bool = False,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> MaskStore:
    """Make a mask store at ``out`` from a file of masks: safetensors, npz or torch.

    ``invert``: ones mean frozen; files by ``export_masks`` say so themselves. ``base``, a
    checkpoint, gives dtypes, shapes and content hashes, and must have all the tensors. The mask is
    stored under ``rule``: by default what the file says, else ``exact``. Raises a CkdiffError.
    """
    target = Target(out, overwrite=overwrite, workers=None, observer=observer)
    source = checked_path("the mask file", path)
    if invert not in (True, False):
        raise UsageError(f"invert must be True or False, not {invert!r}")
    with store_errors(target.out):
        check_early(target.out, overwrite=target.overwrite)
    with ExitStack() as stack:
        found = open_mask_file(source, stack)
        if found.checkpoint is not None:
            check_place(target.out, [found.checkpoint])
        if not found.items:
            raise PairingError(f"{printable(source)} holds no masks")
        polarity = _polarity(found.notes, invert)
        text = str(Rule.parse(rule or found.notes.rule or "exact"))
        found.items.sort(key=lambda item: natural_key(item.name))
        names = [item.name for item in found.items]
        if len(set(names)) < len(names):
            raise CheckpointError(f"{printable(source)} has two masks for one tensor")
        known, hashes = dict(found.tensors), dict[str, str]()
        if base is not None:
            (checkpoint,) = open_all(stack, base)
            _check_names(checkpoint, names)
            check_place(target.out, [checkpoint])
            fetch_all([checkpoint])
            known, hashes = _of_base(checkpoint, names, target.observer)
        kinds = [_kind(item, known.get(item.name)) for item in found.items]
        _check_extent(source, found.items, kinds, declared=base is None)
        shapes = [shape for _, shape in kinds]
        layout = Layout(np.array([math.prod(s) for s in shapes], np.int64))
        made_by: dict[str, Any] = {
            "operation": "import",
            "rule": text,
            "format": found.format,
            "polarity": polarity,
            "files": _identity(found),
        }
        derived = Derived(
            names,
            [dtype for dtype, _ in kinds],
            shapes,
            layout,
            [hashes.get(name, UNKNOWN) for name in names],
            text,
            made_by,
        )
        # nothing is gathered for a store that could not be written; the store itself says more
        check_disk(target.out, layout.total // 8, note=lambda message: None)
        with interruptible("nothing was written"):
            found.prove()
            staged = stage(found.items, layout, target.out, stack)
            found.check()
        return target.write(derived, Staged(staged, layout, invert=polarity == FROZEN))


def _identity(found: MaskFile) -> list[dict[str, str]]:
    """What the store says about the files: names and digests."""
    names = [os.path.basename(file.path) for file in found.files]
    if found.checkpoint is not None:
        names = [source.name for source in found.checkpoint.files]
    return [
        {"label": text_label(name), "digest": digest_of(file)}
        for name, file in zip(names, found.files, strict=True)
    ]


def _check_extent(
    source: str, items: list[Item], kinds: list[tuple[str, Shape]], *, declared: bool
) -> None:
    """Refuse elements that no model has, before anything is made for them.

    A byte of flags or of bits proves elements by being there. Positions do not: their file says in
    a few bytes how many elements there are, and a model with few ones is rightly a small file. So
    what is only declared is believed up to 2**36 elements for a tensor, four times those of the
    largest known ones, and all are up to 2**42, several times the largest known models. In a store
    2**36 elements without ones take about 2.5 MB, and 2**42 take 150 MB: that is the most that a
    file can ask for without filling it.
    """
    total = 0
    for item, (_, shape) in zip(items, kinds, strict=True):
        elements = math.prod(shape)
        if declared and item.kind == "indices" and elements > _MOST_DECLARED:
            raise CheckpointError(
                f"{printable(source)} declares {elements:,} elements of {shown(item.name)} "
                "but has only a few bytes for them",
                hint="give the model with --base",
            )
        total += elements
    if total > _MOST:
        raise CheckpointError(
            f"{printable(source)} declares {total:,} elements, more than any model has",
            hint="is the file whole? make it again",
        )


def _polarity(found: Notes, invert: bool) -> str:
    if invert and found.polarity == CHANGED:
        raise UsageError(
            "the file says that 1 means changed", hint="leave out --invert; see combine"
        )
    return found.polarity or (FROZEN if invert else CHANGED)


def _of_base(
    base: Checkpoint, names: list[str], observer: Observer
) -> tuple[dict[str, tuple[str, Shape]], dict[str, str]]:
    """Dtypes and shapes, and content hashes, of the base's tensors."""
    table = base.table
    known = dict(zip(table.names, zip(table.dtypes, table.shapes, strict=True), strict=True))
    return known, content_hashes(base, names, observer)


def _check_names(base: Checkpoint, names: list[str]) -> None:
    missing = set(names) - set(base.table.names)
    if missing:
        first = min(missing, key=natural_key)
        raise PairingError(
            f"{printable(base.label)} lacks {len(missing):,} of the masks' tensors, such as "
            f"{shown(first)}",
            hint="is it the checkpoint that the masks were made for?",
        )


def _kind(item: Item, known: tuple[str, Shape] | None) -> tuple[str, Shape]:
    """The dtype and shape of the model's tensor that a mask is for."""
    name = shown(item.name)
    if known is None:
        if item.kind == "flags":
            return "BOOL", item.shape  # what the weights are is not known
        raise UsageError(
            f"the file does not say what shape {name} has", hint="give the model with --base"
        )
    dtype, shape = known
    elements = math.prod(shape)
    fits = {
        "flags": item.shape == shape,
        "packed": item.shape == (-(-elements // 8),),
        "indices": item.length <= elements,
    }
    if not fits[item.kind]:
        raise PairingError(
            f"the mask of {name} has the shape {list(item.shape)}, its tensor {list(shape)}",
            hint="is it the model that the masks were made for?",
        )
    return dtype, shape


def stage(items: list[Item], layout: Layout, out: Path, stack: ExitStack) -> Staging:
    """Gather the bits of all tensors, and prove them: nothing of the store is begun before."""
    staging = Staging(layout, out, stack)
    for item, start, elements in zip(
        items, layout.starts.tolist(), layout.elements.tolist(), strict=True
    ):
        staging.add(item, start, elements)
    staging.finish()
    return staging


class Staged(Maker):
    """Bits that lie ready at their addresses."""

    def __init__(self, bits: Staging, layout: Layout, *, invert: bool) -> None:
        self._bits = bits
        self._layout = layout
        self._invert = invert
        self.total = layout.total // 8
        self.need = Need(tables=bits.memory, worker=1 << 20)

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        size = (min(first + self._layout.chunk, self._layout.total) - first) // 8
        self._bits.read(first, mask[:size])
        places = (spans.addresses - first) // 8
        for row, (at, elements) in enumerate(
            zip(places.tolist(), spans.elements.tolist(), strict=True)
        ):
            part = mask[at : at - (-elements // 8)]
            if self._invert:
                np.invert(part, out=part)
                if elements % 8:
                    part[-1] &= (1 << elements % 8) - 1
            changed[row] = np.bitwise_count(part).sum(dtype=np.int64)
            done(len(part))
            yield at + len(part)
