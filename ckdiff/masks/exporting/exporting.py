"""A mask store -> a file, or the shards of a checkpoint, in a format that other tools read."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.indexes import INDEX_NAME, shard_name_fault
from ckdiff.checkpoints.opening import open_for_planning, open_in
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import (
    CheckpointError,
    OutputError,
    PairingError,
    UsageError,
    printable,
)
from ckdiff.masks.exporting.format import Output
from ckdiff.masks.exporting.masks import Masks, compact, encoded, everything, text_label
from ckdiff.masks.exporting.recognising import foreign
from ckdiff.masks.exporting.registry import FORMATS
from ckdiff.options import (
    Observer,
    checked_observer,
    checked_output,
    checked_text,
)
from ckdiff.outputs.place import Place, write_errors
from ckdiff.outputs.rebuilt import RENAME_SHARD
from ckdiff.rules import Rule
from ckdiff.running.runners import Meter, interruptible
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import first_rows, several
from ckdiff.stores.table import IntArray


def export_masks(
    store: str | os.PathLike[str] | MaskStore,
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    packed: bool = False,
    invert: bool = False,
    rule: str | Rule | None = None,
    like: str | os.PathLike[str] | Checkpoint | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write the masks of a store to ``out`` in another format, in bounded memory.

    Without ``to`` the name of ``out`` says the format: ``.npz``, or ``.pt`` and the like for torch;
    all other names are safetensors. With ``like``, a checkpoint, ``out`` has its tensors and its
    shards. ``invert`` writes ones for elements that did not change. The output appears only when it
    is complete, and ``overwrite`` replaces only exported masks. Returns what ``ckdiff export
    --json`` prints. Raises a CkdiffError.
    """
    path = checked_output(out)
    to = _checked_format(to, path.name, packed=packed, like=like)
    _check_flags(packed=packed, invert=invert, overwrite=overwrite)
    observer = checked_observer(observer)
    opened = open_store(store)
    masks = Masks(opened, rule, invert=invert)
    with ExitStack() as stack:
        source = None if like is None else open_in(stack, like, open_for_planning)
        folder = source is not None and source.directory is not None
        place = Place(path, directory=folder, overwrite=overwrite, in_the_way=foreign)
        place.keep_away_from([] if source is None else [source], [opened.path])
        make = (packed and FORMATS[to].packed) or FORMATS[to].output
        groups, left_out = _groups(masks, source)
        outputs: dict[str, Output] = {name: make(masks, chosen) for name, chosen in groups.items()}
        _export(place, outputs, observer, folder=folder)
    _tell(masks, left_out, observer)
    return {
        "out": str(path),
        "to": to,
        "packed": packed,
        "polarity": masks.polarity,
        "rule": masks.rule,
        "store": opened.manifest_digest(),
        "files": sorted(outputs) if folder else [path.name],
        **masks.counts(np.concatenate([*groups.values()])),
        "left_out": left_out,
    }


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if value not in (True, False):
            raise UsageError(f"{name} must be True or False, not {value!r}")


def _checked_format(to: str | None, name: str, *, packed: bool, like: object) -> str:
    """The format that you want; UsageError where the arguments contradict each other."""
    suffix = os.path.splitext(name)[1].lower()
    said = [known for known, format_ in FORMATS.items() if suffix in format_.suffixes]
    if to is None:
        usual = [known for known, format_ in FORMATS.items() if suffix in format_.also]
        to = [*said, *usual, *FORMATS][0]
    else:
        FORMATS.check(checked_text("to", to))
    if said and to not in said:
        # readers go by the name: numpy and torch would refuse the file, or look for a pickle in it
        raise UsageError(
            f"{printable(name)} has the ending of {said[0]}, but the format is to be {to}",
            hint=f"leave out --to {to}, or choose another name",
        )
    if packed and FORMATS[to].packed is None:
        packers = " or ".join(known for known, format_ in FORMATS.items() if format_.packed)
        raise UsageError(f"packed masks go to {packers}, not to {to}", hint="leave out --packed")
    if like is not None and not FORMATS[to].shards:
        sharded = " or ".join(f"--to {known}" for known in FORMATS if FORMATS[known].shards)
        raise UsageError(
            f"--like gives the shards of safetensors files; {to} has none",
            hint=f"use {sharded}, and a name that fits",
        )
    return to


def _groups(masks: Masks, like: Checkpoint | None) -> tuple[dict[str, IntArray], list[str]]:
    """File name -> the masks that go there; and what the checkpoint has but the store has not."""
    if like is None:
        return {"": everything(masks)}, []
    table = like.table
    where = {name: i for i, name in enumerate(table.names)}
    missing = [name for name in masks.names if name not in where]
    if missing:
        raise PairingError(
            f"{printable(like.label)} lacks {len(missing):,} of the store's tensors, such as "
            f"{printable(missing[0])}",
            hint="give the checkpoint that the store was made from",
        )
    files = like.file_index
    if not like.in_files:
        raise CheckpointError(
            f"{printable(like.label)} is not in safetensors files of whole tensors: there are no "
            "shards to spread the masks over",
            hint="leave out --like, or make such files of it with `ckdiff convert`",
        )
    groups: dict[str, list[int]] = {}
    for i, (name, shape) in enumerate(zip(masks.names, masks.shapes, strict=True)):
        at = where[name]
        if table.shapes[at] != shape:
            raise _misfit(masks, i, like, table.shapes[at])
        groups.setdefault(like.files[int(files[at])].name, []).append(i)
    for file in groups:  # the index says their names, and it is JSON
        if file != text_label(file):
            raise CheckpointError(
                f"{printable(like.label)} has a file whose name is not text: {printable(file)}",
                hint="rename it",
            )
    known = set(masks.names)
    left_out = [name for name in table.names if name not in known]
    return {name: np.array(group, np.int64) for name, group in groups.items()}, left_out


def _misfit(masks: Masks, i: int, like: Checkpoint, found: tuple[int, ...]) -> PairingError:
    """Why there is no mask of the shape that a tensor has in a checkpoint."""
    name, shape = printable(masks.names[i]), masks.shapes[i]
    if i in masks.resized and first_rows(found, shape):
        # neither ones nor zeros would be true of the others
        return PairingError(
            f"{name} has {found[0]:,} rows in {printable(like.label)}, and only the first "
            f"{shape[0]:,} were compared",
            hint="leave out --like: then there are masks of these rows",
        )
    return PairingError(
        f"{name} has the shape {list(found)} in {printable(like.label)} and {list(shape)} in the "
        "store",
        hint="give the checkpoint that the store was made from",
    )


def _tell(masks: Masks, left_out: list[str], observer: Observer) -> None:
    if masks.resized:
        names = [masks.names[i] for i in sorted(masks.resized)]
        observer.note(
            f"{len(names):,} tensors were compared in the rows that both sides have, and their "
            f"masks have no others: {several(names)}"
        )
    if left_out:
        observer.note(
            f"{len(left_out):,} of the checkpoint's tensors are not in the store and are left out: "
            + printable(", ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else ""))
        )


def _export(place: Place, outputs: dict[str, Output], observer: Observer, *, folder: bool) -> None:
    """Put all files into their place. Raises OutputError, BudgetError and Interrupted."""
    with interruptible(lambda: place.stopped_hint), place:
        place.check_disk(sum(output.size for output in outputs.values()))
        with write_errors(place.out):
            _write(place.path, outputs, observer, folder=folder)
        place.commit()


def _write(root: Path, outputs: dict[str, Output], observer: Observer, *, folder: bool) -> None:
    total = sum(output.data_size for output in outputs.values())
    meter = Meter(observer, total)

    def done(size: int) -> None:
        meter.add(size)
        meter.report()

    for name, output in outputs.items():
        if folder and (fault := shard_name_fault(name)) is not None:
            raise OutputError(
                f"the checkpoint's file {printable(name)} {fault}, so no masks are written there",
                hint=RENAME_SHARD,
            )
        path = root / name if folder else root
        path.parent.mkdir(parents=True, exist_ok=True)
        output.write(path, done)
    if folder:
        weight_map = {name: file for file, output in outputs.items() for name in output.names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (root / INDEX_NAME).write_bytes(encoded(compact(index)) + b"\n")
