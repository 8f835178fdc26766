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
from ckdiff.errors import UsageError
from ckdiff.options import Observer
from ckdiff.overlaps.magnitudes import Magnitudes
from ckdiff.overlaps.nulls.registry import NULLS
from ckdiff.overlaps.overlap import measured
from ckdiff.reports.provenance import provenance
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.matching import match
from ckdiff.stores.shortnames import short_names
from ckdiff.stores.summaries import Stack, rule_counts, stacks, summarise

Data = dict[str, Any]

_LISTED = 1000  #: names of tensors that were not compared


def runs(stores: Sequence[MaskStore], rule: str) -> list[Data]:
    """One entry for each store: what it is of, its tables, and what was not compared."""
    labels = short_names([str(store.path) for store in stores])
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
    """The tensors of all stores in columns: ``changed`` has a column for each store.

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
    return columns


def agreement(
    stores: Sequence[MaskStore],
    rule: str,
    *,
    base: Given | None,
    key: str | None,
    memory: str | int | None,
    observer: Observer,
) -> Data:
    """``overlap``: what two stores and more agree on; ``magnitudes``: density by size of the base.

    Each is None where there is nothing to say: one store, no base.
    """
    if len(stores) < 2 and base is None:
        return {"overlap": None, "magnitudes": None}
    matched = match(stores, rule, least=1)
    for note in matched.notes():
        observer.note(note)
    names = ("model", "tensor") if base is None else ("magnitude", "model", "tensor")
    heard = None if base is None else Magnitudes(matched.dtypes, len(stores))
    found = measured(
        matched, names, "model", base=base, key=key, memory=memory, observer=observer, heard=heard
    )
    overlap = None
    if len(stores) > 1:
        overlap = found.head() | {"rows": found.rows()}
        overlap["words"] = {name: _words(name) for name in names}
    return {"overlap": overlap, "magnitudes": None if heard is None else heard.rows()}


def _words(name: str) -> Data:
    null = NULLS[name]
    return {"given": null.given, "rules_out": null.rules_out, "leaves": null.leaves}


def head(title: str) -> Data:
    """What every report begins with."""
    return {"title": title, "version": __version__}
