"""A mask file -> a mask store: masks made elsewhere enter overlaps, set algebra and training.

The bits are first gathered, one tensor after the other, in a nameless file beside the output, and
encoded from there: an archive can only be read in order, and positions may come in any.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.budget import format_size
from ckdiff.checkpoints import Checkpoint, open_together
from ckdiff.checkpoints.openfile import OpenFile
from ckdiff.derived import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.diffing import diff
from ckdiff.errors import (
    BudgetError,
    CheckpointError,
    Interrupted,
    PairingError,
    UsageError,
    printable,
)
from ckdiff.exports.masks import CHANGED, FROZEN
from ckdiff.imports.maskfile import Item, MaskFile, Shape
from ckdiff.layout import CHUNK, Layout, Spans
from ckdiff.naming import natural_key
from ckdiff.options import Observer, checked_path
from ckdiff.rules import Rule
from ckdiff.store import MaskStore
from ckdiff.stores.table import UNKNOWN, IntArray
from ckdiff.writing.outputs import check_place, free_space
from ckdiff.writing.workdir import check_output, store_errors

_MOST = 1 << 60  # elements in all
_ZIP = b"PK\3\4"


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
        check_output(target.out, overwrite=target.overwrite)
    with ExitStack() as stack:
        found = _open(source, target.out, stack)
        if not found.items:
            raise PairingError(f"{printable(source)} holds no masks")
        polarity = _polarity(found, invert)
        text = str(Rule.parse(rule or found.rule or "exact"))
        found.items.sort(key=lambda item: natural_key(item.name))
        names = [item.name for item in found.items]
        if len(set(names)) < len(names):
            raise CheckpointError(f"{printable(source)} has two masks for one tensor")
        known, hashes = dict(found.tensors), dict[str, str]()
        if base is not None:

            def rehearse(sides: list[Checkpoint]) -> None:
                _check_names(sides[0], names)

            (checkpoint,) = open_together(stack, [base], rehearse)
            check_place(target.out, [checkpoint])
            known, hashes = _of_base(checkpoint, names, target.observer)
        kinds = [_kind(item, known.get(item.name)) for item in found.items]
        if sum(math.prod(shape) for _, shape in kinds) > _MOST:
            raise CheckpointError(f"{printable(source)} speaks of more elements than can be")
        shapes = [shape for _, shape in kinds]
        layout = Layout(np.array([math.prod(s) for s in shapes], np.int64))
        made_by: dict[str, Any] = {
            "operation": "import",
            "rule": text,
            "format": found.format,
            "polarity": polarity,
            "files": found.files,
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
        try:
            staged = _stage(found.items, layout, target.out, stack)
        except KeyboardInterrupt:
            raise Interrupted("interrupted", hint="nothing was written") from None
        return target.write(derived, Staged(staged, layout, invert=polarity == FROZEN))


def _open(path: str, out: Path, stack: ExitStack) -> MaskFile:
    """Tell the format by content, and open it."""
    if not os.path.isdir(path):
        file = OpenFile.open(path)
        try:
            begin = os.pread(file.fd, len(_ZIP), 0)
        except OSError as error:
            raise CheckpointError(f"{printable(path)}: cannot be read: {error.strerror}") from None
        finally:
            file.close()
        if begin == _ZIP:
            if _is_torch(path):
                from ckdiff.imports.torchfile import read_torch

                return read_torch(path)
            from ckdiff.imports.npz import read_npz

            return read_npz(path, stack)
    from ckdiff.imports.tensorfile import read_tensor_file

    return read_tensor_file(path, out, stack)


def _is_torch(path: str) -> bool:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False  # the reader of npz says what is wrong
    return any(name.endswith("/data.pkl") for name in names)


def _polarity(found: MaskFile, invert: bool) -> str:
    if invert and found.polarity == CHANGED:
        raise UsageError(
            "the file says that its ones mean changed", hint="leave out --invert; see combine"
        )
    return found.polarity or (FROZEN if invert else CHANGED)


def _of_base(
    base: Checkpoint, names: list[str], observer: Observer
) -> tuple[dict[str, tuple[str, Shape]], dict[str, str]]:
    """Dtypes and shapes, and content hashes, of the base's tensors."""
    _check_names(base, names)
    # a diff with itself hashes each tensor as any diff does
    table = diff(base, base, verify=True, observer=observer).table
    known = {record.name: (record.dtype, record.shape) for record in table}
    return known, dict(zip(table.names, table.base_hashes, strict=True))


def _check_names(base: Checkpoint, names: list[str]) -> None:
    missing = set(names) - set(base.table.names)
    if missing:
        first = min(missing, key=natural_key)
        raise PairingError(
            f"{printable(base.label)} lacks {len(missing):,} of the masks' tensors, such as "
            f"{printable(first)}",
            hint="is it the checkpoint that the masks were made for?",
        )


def _kind(item: Item, known: tuple[str, Shape] | None) -> tuple[str, Shape]:
    """The dtype and shape of the model's tensor that a mask is for."""
    name = printable(item.name)
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


def _stage(items: list[Item], layout: Layout, out: Path, stack: ExitStack) -> Bytes:
    """Gather the bits of all tensors, at their addresses, in memory that is a file."""
    size = layout.total // 8
    if not size:
        return np.empty(0, np.uint8)
    with store_errors(out):
        if free_space(out.parent) < size:
            raise BudgetError(
                f"{format_size(size)} are needed at {printable(str(out.parent))} meanwhile",
                hint="free some space or choose another place with -o",
            )
        file = stack.enter_context(tempfile.TemporaryFile(dir=out.parent))  # noqa: SIM115
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is said now, and not by a signal
        bits = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
    for item, start, elements in zip(
        items, layout.starts.tolist(), layout.elements.tolist(), strict=True
    ):
        room = bits[start // 8 : start // 8 - (-elements // 8)]
        {"flags": _put_flags, "packed": _put_packed, "indices": _put_indices}[item.kind](
            item, room, elements
        )
    return bits


def _put_flags(item: Item, room: Bytes, elements: int) -> None:
    at = 0
    for piece in item.read():  # all pieces but the last are whole bytes
        flags = piece.view(np.uint8)
        if flags.max() > 1:
            raise _bad(item, "has something else than 0 and 1")
        packed = np.packbits(flags, bitorder="little")
        room[at : at + len(packed)] = packed
        at += len(packed)


def _put_packed(item: Item, room: Bytes, elements: int) -> None:
    at = 0
    for piece in item.read():
        room[at : at + len(piece)] = piece.view(np.uint8)
        at += len(piece)
    if elements % 8 and room[-1] >> elements % 8:
        raise _bad(item, "has padding bits that are set")


def _put_indices(item: Item, room: Bytes, elements: int) -> None:
    for piece in item.read():
        if piece.min() < 0 or piece.max() >= elements:
            raise _bad(item, f"has a position outside its {elements:,} elements")
        places = piece.astype(np.int64)
        np.bitwise_or.at(room, places >> 3, (1 << (places & 7)).astype(np.uint8))
    ones = sum(
        int(np.bitwise_count(room[at : at + (1 << 20)]).sum(dtype=np.int64))
        for at in range(0, len(room), 1 << 20)
    )
    if ones != item.length:
        raise _bad(item, "names a position twice")


def _bad(item: Item, what: str) -> CheckpointError:
    return CheckpointError(f"the mask of {printable(item.name)} {what}")


class Staged(Maker):
    """Bits that lie ready at their addresses."""

    def __init__(self, bits: Bytes, layout: Layout, *, invert: bool) -> None:
        self._bits = bits
        self._layout = layout
        self._invert = invert
        self.total = layout.total // 8

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        size = (min(first + CHUNK, self._layout.total) - first) // 8
        mask[:size] = self._bits[first // 8 : first // 8 + size]
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
