"""What a path holds, as far as can be told without reading its data."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ckdiff.checkpoints.opening import open_for_planning
from ckdiff.checkpoints.pairing import is_adapter
from ckdiff.deltas.container import Delta
from ckdiff.deltas.ownheader import is_delta
from ckdiff.deltas.ranges import parts, resized
from ckdiff.deltas.room import Room
from ckdiff.deltas.versions.describing import describe
from ckdiff.deltas.versions.form import version_number
from ckdiff.deltas.versions.given import STREAM, VERSION, kind_of
from ckdiff.deltas.versions.reading import read_version
from ckdiff.diffs.result import unpaired_names
from ckdiff.layout import bits_of
from ckdiff.options import checked_observer, checked_path
from ckdiff.reports.provenance import provenance
from ckdiff.runs.timelines.file import is_timeline
from ckdiff.runs.timelines.result import open_timeline
from ckdiff.stores.maskstore import open_store
from ckdiff.stores.recognising import is_store
from ckdiff.stores.summaries import rule_counts


def info(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, Any]:
    """Say what ``path`` is: its ``kind`` is ``delta``, ``store``, ``timeline``, ``stream`` or
    ``checkpoint``.

    ``key`` is the path of the state dict in torch files that hold more.

    Returns what ``ckdiff info --json`` prints. It reads only headers and tables, and enough of
    weight versions to tell how many bytes they change. ``ckdiff check`` and ``ckdiff apply`` verify
    the data. Raises DeltaError, StoreError and CheckpointError if the path is damaged or something
    else, and BudgetError for a delta whose tables are larger than the default memory.
    """
    text = checked_path("the path", path)
    if Path(text).is_dir() and is_store(Path(text)):
        return _store(text)
    if is_timeline(text):
        return {"kind": "timeline", "path": text, **open_timeline(text).to_dict()}
    if is_delta(text):
        return _delta(text)
    if _is_stream(text):
        return _stream(text)
    return _checkpoint(text, key)


def _delta(path: str) -> dict[str, Any]:
    room = Room(each=0, hint="it may be damaged or hostile; ckdiff apply takes --memory")
    with Delta(path, room) as delta:
        manifest, blueprint = delta.manifest, delta.blueprint
        return {
            "kind": "delta",
            "path": path,
            "ckdiff": manifest["ckdiff"],
            "encoding": delta.encoding,
            "size": delta.size,
            "rebuilt_size": sum(plan.size for plan in blueprint.files),
            "files": [plan.name for plan in blueprint.files],
            "index": None if blueprint.index is None else blueprint.index[0],
            "base": manifest["base"],
            "tensors": len(blueprint.names),
            "paired": int(delta.tensors.based.sum()),
            "elements": manifest["elements"],
            "changed": manifest["changed"],
            "density": manifest["changed"] / max(manifest["elements"], 1),
            "unpaired": unpaired_names(manifest["unpaired"]),
            "unpaired_details": manifest["unpaired"],
            "resized": resized(delta.ranges.odd, blueprint),
            "parts": parts(delta.ranges.odd, blueprint),
            "lossy": manifest["lossy"],
        }


def _is_stream(path: str) -> bool:
    """Whether it is a stream of weight versions, or a delta of one; a full one is a checkpoint."""
    kind = kind_of(path)
    if kind == VERSION:
        number = version_number(os.path.basename(os.path.abspath(path)))
        return not read_version(path, _room(), number).full
    return kind == STREAM


def _stream(path: str) -> dict[str, Any]:
    found = describe(path, _room(), checked_observer(None))
    return {"kind": "stream", "path": path, "versions": found.rows, "notes": found.notes}


def _room() -> Room:
    return Room(each=0, hint="it may be damaged or hostile; ckdiff check takes --memory")


def _store(path: str) -> dict[str, Any]:
    store = open_store(path)
    elements = store.table.total_elements
    totals = {rule: int(counts.sum()) for rule, counts in store.table.changed.items()}
    return {
        "kind": "store",
        "path": path,
        "tensors": len(store.table),
        "elements": elements,
        "masks": list(store.masks),
        "rules": rule_counts(totals, elements),
        **provenance(store),
    }


def _checkpoint(path: str, key: str | None) -> dict[str, Any]:
    with closing(open_for_planning(path, key=key)) as checkpoint:
        table = checkpoint.table
        counts = table.nbytes * 8 // bits_of(table.dtypes)
        dtypes = dict[str, int]()
        for dtype, count in zip(table.dtypes, counts.tolist(), strict=True):
            dtypes[dtype] = dtypes.get(dtype, 0) + count
        commit = checkpoint.origin.get("commit")
        return {
            "kind": "checkpoint",
            "path": path,
            **({"commit": commit} if commit else {}),
            "files": [file.name for file in checkpoint.files],
            "size": sum(file.size for file in checkpoint.files),
            "tensors": len(table),
            "elements": int(np.sum(counts)),
            "dtypes": dtypes,
            **({"adapter": True} if is_adapter(table.names) else {}),
            "notes": list(checkpoint.notes),
        }
