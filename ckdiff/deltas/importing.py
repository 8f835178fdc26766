"""The door to imports: masks from files of other tools, and from weight versions.

Of a version the positions of changed elements are decoded twice, for how many there are and for
what they are; nothing in memory grows with the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import open_all, open_in, open_keyed
from ckdiff.checkpoints.protocol import Checkpoint, TensorTable
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.form import version_name, version_number
from ckdiff.deltas.versions.given import STREAM, kind_of
from ckdiff.deltas.versions.places import elements
from ckdiff.deltas.versions.reading import Version, WeightStream, read_version
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.layout import Layout
from ckdiff.masks.exporting.masks import CHANGED, text_label
from ckdiff.masks.importing import importing
from ckdiff.masks.importing.maskfile import Item, digest_of
from ckdiff.naming import natural_key
from ckdiff.options import Observer, checked_path
from ckdiff.outputs.checks import check_disk, check_place
from ckdiff.rules import Rule
from ckdiff.running.runners import interruptible
from ckdiff.stores.building import Derived, Target
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.table import UNKNOWN
from ckdiff.stores.workdir import check_early, store_errors

_FORMAT = "weight-version"


def import_masks(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rule: str | Rule | None = None,
    invert: bool = False,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    key: str | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> MaskStore:
    """Make a mask store at ``out`` from a file of masks (safetensors, npz or torch), or from a
    weight version: the elements that it changes.

    ``invert``: ones mean frozen; files by ``export_masks`` say so themselves. ``base``, a
    checkpoint, gives dtypes, shapes and content hashes, and must have all the tensors. The mask is
    stored under ``rule``: by default what the file says, else ``exact``. ``key`` is the path of
    the state dict in a base that holds more.

    For a version, the store has all tensors of the model. Their dtypes and shapes come from
    ``base`` (any checkpoint of the model), or from the full version before it. The rule is
    ``exact``, and hashes are unknown. Raises a CkdiffError.
    """
    source = checked_path("the mask file", path)
    if key is not None:
        with ExitStack() as stack:
            opened = open_keyed(stack, base, key)
            return import_masks(
                source, out, rule=rule, invert=invert, base=opened, overwrite=overwrite,
                observer=observer,
            )  # fmt: skip
    kind = kind_of(source)
    if kind == STREAM:
        raise UsageError(
            f"{printable(source)} is a stream of weight versions, and a mask needs one of them",
            hint=f"name it: {version_name(1)}",
        )
    if kind is None:
        return importing.import_masks(
            source, out, rule=rule, invert=invert, base=base, overwrite=overwrite,
            observer=observer,
        )  # fmt: skip
    if invert or (rule is not None and str(Rule.parse(rule)) != "exact"):
        raise UsageError(
            "a weight version says which elements changed, by the rule exact",
            hint="leave out the rule, and --invert",
        )
    return _of_version(
        source, base, Target(out, overwrite=overwrite, workers=None, observer=observer)
    )


def _of_version(
    source: str, base: str | os.PathLike[str] | Checkpoint | None, target: Target
) -> MaskStore:
    """The masks of the version in a directory."""
    with store_errors(target.out):
        check_early(target.out, overwrite=target.overwrite)
    with ExitStack() as stack:
        version = read_version(source, Room(), version_number(_name(source)))
        stack.callback(version.close)
        if version.full:
            raise version.fault(
                "is a full version, and does not say what changed",
                "ckdiff diff compares it with the one before it",
            )
        table = _model(stack, version, base, target)
        version.open(Room())
        version.check(table)
        return _write(version, table, target, stack)


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _model(
    stack: ExitStack,
    version: Version,
    base: str | os.PathLike[str] | Checkpoint | None,
    target: Target,
) -> TensorTable:
    """The tensors of the model. Raises DeltaError where nothing says what they are."""
    if base is not None:
        (checkpoint,) = open_all(stack, base)
        check_place(target.out, [checkpoint])
        return checkpoint.table
    try:
        if version_name(version.number) != _name(version.path):
            raise DeltaError("it is not in its stream")
        folder = os.path.dirname(os.path.abspath(version.path))
        with WeightStream(folder, Room()) as stream:
            seed = stream.chain(version.number).seed
        if seed is None:
            raise DeltaError("no full version is before it")
        return open_in(stack, seed.path).table
    except DeltaError as error:
        raise version.fault(
            f"does not say what tensors the model has: {error.message}",
            "give a checkpoint of the model with --base",
        ) from None


def _write(version: Version, table: TensorTable, target: Target, stack: ExitStack) -> MaskStore:
    order = sorted(range(len(table)), key=lambda i: natural_key(table.names[i]))
    names = [table.names[i] for i in order]
    dtypes, shapes = [table.dtypes[i] for i in order], [table.shapes[i] for i in order]
    layout = Layout(np.array([math.prod(shape) for shape in shapes], np.int64))
    made_by: dict[str, Any] = {
        "operation": "import",
        "rule": "exact",
        "format": _FORMAT,
        "polarity": CHANGED,
        "files": [
            {
                "label": text_label(f"{_name(version.path)}/{_name(file.path)}"),
                "digest": digest_of(file),
            }
            for file in version.shards
        ],
    }
    unknown = [UNKNOWN] * len(names)
    derived = Derived(names, dtypes, shapes, layout, unknown, "exact", made_by)
    check_disk(target.out, layout.total // 8, note=lambda message: None)
    with interruptible("nothing was written"):
        sizes = table.nbytes[order].tolist()
        items = [_item(version, *of) for of in zip(names, dtypes, sizes, strict=True)]
        staged = importing.stage(items, layout, target.out, stack)
        version.verify()
    return target.write(derived, importing.Staged(staged, layout, invert=False))


def _item(version: Version, name: str, dtype: str, nbytes: int) -> Item:
    """The positions of a tensor's changed elements; none of one that the version does not have."""
    position = np.dtype(np.int64)
    if name not in version.frames:
        return Item(name, "indices", (0,), position, lambda: iter(()))
    found = partial(elements, version, name, dtype, nbytes)
    count = sum(len(part) for part in found())

    def read() -> Iterator[bytes]:
        return (part.tobytes() for part in found())

    return Item(name, "indices", (count,), position, read)
