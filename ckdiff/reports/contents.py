"""What a report shows, as plain data: every number in the page is one of these.

Made of mask stores, of what they say of themselves and of what they have in common; pictures and
tables are made from it and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckdiff._version import __version__
from ckdiff.checkpoints.opening import Given
from ckdiff.errors import PairingError, UsageError
from ckdiff.options import Observer
from ckdiff.overlaps.magnitudes import Magnitudes
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.overlaps.overlap import measured
from ckdiff.reports.provenance import provenance
from ckdiff.runs.structure import with_stripes
from ckdiff.runs.timelines.result import Timeline
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.matching import Matched, match
from ckdiff.stores.summaries import Stack, rule_counts, stacks, summarise

Data = dict[str, Any]
#: stores that are looked at together, and the position of the first of them
Alike = list[tuple[int, Matched]]

_LISTED = 1000  #: names of tensors that were not compared


def runs(stores: Sequence[MaskStore], labels: Sequence[str], rule: str) -> list[Data]:
    """One entry for each store: what it is of, its tables, and what was not compared."""
    return [_run(label, store, rule) for label, store in zip(labels, stores, strict=True)]


def _run(label: str, store: MaskStore, rule: str) -> Data:
    table = store.table
    if rule not in store.masks:
        raise UsageError(f"{label} has no {rule} mask", hint="choose another with --rule")
    elements = table.total_elements
    totals = {name: int(counts.sum()) for name, counts in table.changed.items()}
    said = provenance(store)
    details = said.pop("unpaired_details", [])
    said.pop("unpaired", None)
    model = summarise(table, "model")
    statistics = model[0].get("statistics") if model else None
    return {
        "label": label,
        "store": str(store.path),
        "tensors": len(table),
        "tensors_changed": int(np.count_nonzero(table.changed[rule])),
        "elements": elements,
        "rules": rule_counts(totals, elements),
        "layers": summarise(table, "layer"),
        "modules": summarise(table, "module"),
        "dtypes": summarise(table, "dtype"),
        "stacks": [_stack(stack) for stack in stacks(table, rule)],
        "statistics": statistics,
        "unpaired": {"tensors": len(details), "details": details[:_LISTED]},
        **said,
    }


def _stack(stack: Stack) -> Data:
    return {
        "name": stack.name,
        "layers": stack.layers,
        "modules": stack.modules,
        "elements": stack.elements.tolist(),
        "changed": stack.changed.tolist(),
    }


def tensors(stores: Sequence[MaskStore], rule: str) -> Data:
    """The tensors of all stores in columns: ``changed`` and ``density`` have one for each store.

    A tensor that a store lacks, or has in another shape, is null there.
    """
    place: dict[tuple[str, tuple[int, ...]], int] = {}
    columns: Data = {"name": [], "dtype": [], "shape": [], "elements": [], "changed": []}
    for store in stores:
        table = store.table
        counts = table.changed[rule].tolist()
        found: dict[int, int] = {}
        for i, key in enumerate(zip(table.names, table.shapes, strict=True)):
            at = place.setdefault(key, len(place))
            if at == len(columns["name"]):
                columns["name"].append(table.names[i])
                columns["dtype"].append(table.dtypes[i])
                columns["shape"].append("×".join(map(str, table.shapes[i])))
                columns["elements"].append(int(table.elements[i]))
            found[at] = counts[i]
        columns["changed"].append(found)
    size = len(place)
    columns["changed"] = [[found.get(i) for i in range(size)] for found in columns["changed"]]
    columns["density"] = [_densities(column, columns["elements"]) for column in columns["changed"]]
    return columns


def _densities(changed: list[int | None], elements: list[int]) -> list[float | None]:
    counts = zip(changed, elements, strict=True)
    return [None if count is None else count / size if size else 0.0 for count, size in counts]


def side_by_side(stores: Sequence[MaskStore], rule: str) -> Alike:
    """All stores side by side, or each by itself where they have no tensor in common."""
    try:
        return [(0, match(stores, rule, least=1))]
    except PairingError:
        return [(i, match([store], rule, least=1)) for i, store in enumerate(stores)]


def agreement(
    alike: Alike,
    *,
    base: Given | None,
    key: str | None,
    memory: str | int | None,
    observer: Observer,
) -> Data:
    """``overlap``: what two stores and more agree on; ``magnitudes``: density by size of the base.

    Each is None where there is nothing to say: one store, no base.
    """
    nothing: Data = {"overlap": None, "magnitudes": None}
    (_, matched), *others = alike
    if base is None and not others and len(matched.stores) < 2:
        return nothing
    if others:
        observer.note("note: the stores have no tensor in common: agreement is not shown")
        return nothing
    for note in matched.notes():
        observer.note(note)
    names = ("model", "tensor") if base is None else ("magnitude", "model", "tensor")
    heard = None if base is None else Magnitudes(matched.dtypes, len(matched.stores))
    found = measured(
        matched, names, "model", base=base, key=key, memory=memory, observer=observer, heard=heard
    )
    overlap = None
    if len(matched.stores) > 1:
        overlap = found.head() | {"rows": found.rows()}
        overlap["words"] = {name: _words(name) for name in names}
    return {"overlap": overlap, "magnitudes": None if heard is None else heard.rows()}


def shapes(alike: Alike, *, memory: str | int | None, observer: Observer) -> Data | None:
    """Where inside its matrices an update is, by kind of module, and the stripes of some."""
    out: Data = {"modules": [], "stripes": [], "shared": None}
    for first, together in alike:
        found, stripes = with_stripes(together, memory=memory, observer=observer)
        for key, rows in (("modules", found.by_module()), ("stripes", stripes.rows())):
            out[key] += [row | {"store": first + row["store"]} for row in rows]
        if len(alike) == 1 < len(found.stores):
            out["shared"] = _shared(found.shared_rows())
    return out if out["modules"] else None


def _shared(rows: list[Data]) -> Data | None:
    """Means over all pairs and matrices that have changes; None without any."""
    out = {}
    for side in ("rows", "columns"):
        some = [row for row in rows if row[side] is not None and row[f"{side}_chance"] is not None]
        if not some:
            return None
        for key in (side, f"{side}_chance"):
            out[key] = sum(row[key] for row in some) / len(some)
    return out


def timelines(opened: Sequence[Timeline]) -> list[Data]:
    """What each timeline says, and its layers."""
    return [found.to_dict() | {"layers": found.summary("layer")} for found in opened]


def _words(name: str) -> Data:
    null = NULLS[name]
    return {"given": null.given, "rules_out": null.rules_out, "leaves": null.leaves}


def head(title: str) -> Data:
    """What every report begins with."""
    return {"title": title, "version": __version__}
